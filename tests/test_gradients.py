"""Derivatives: right in fp64, repeatable, once only, and nothing kept where none is asked for."""

import gc
import weakref

import cases
import pytest
import torch

from sslkern import losses

SHAPES = {"primal": (9, 4), "dual": (5, 7)}


def _views(op, shape, dtype=torch.float64, device="cpu", **kwargs):
    return [torch.randn(*shape, dtype=dtype, device=device, **kwargs) for _ in range(op.inputs)]


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("op_name", cases.OPS)
def test_gradcheck(op_name, form, backend):
    """Every op, form and estimator agrees with finite differences in fp64; alone, stacked, and transposed."""
    if backend == "triton":
        pytest.skip("gradcheck is for fp64 on the CPU")
    op = cases.OPS[op_name]
    n, d = SHAPES[form]
    for layout in (lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: torch.stack([x, 2 * x.roll(1, 0)])):
        views = [layout(x).requires_grad_() for x in _views(op, (n, d))]
        assert torch.autograd.gradcheck(lambda *x: op.call(*x, form), views)


@pytest.mark.parametrize("op_name", ("cross_correlation", "vicreg", "vicreg, unbiased"))
def test_only_one_view_requires_grad(op_name, backend, device):
    """The gradient of one view has the bits it has when both are asked for; the other gets none."""
    op = cases.OPS[op_name]
    for shape in (*SHAPES.values(), (2, 9, 6)):
        views = _views(op, shape, torch.float32, device)
        _, both = cases.value_and_grad(op.call, views)
        for k in range(2):
            asked = [x.detach().clone().requires_grad_(i == k) for i, x in enumerate(views)]
            torch.autograd.backward([out.sum() for out in op.call(*asked)])
            assert torch.equal(asked[k].grad, both[k]) and asked[1 - k].grad is None


@pytest.mark.parametrize("op_name", cases.OPS)
def test_second_backward_has_the_same_bits(op_name, backend, device):
    """retain_graph: saved buffers are not scaled in place, whatever the upstream gradient in between."""
    op = cases.OPS[op_name]
    for shape in SHAPES.values():
        views = [x.requires_grad_() for x in _views(op, shape, torch.float32, device)]
        outputs = op.call(*views)
        first = torch.autograd.grad(outputs, views, [torch.ones_like(out) for out in outputs], retain_graph=True)
        kept = [grad.clone() for grad in first]
        torch.autograd.grad(outputs, views, [torch.full_like(out, 3.0) for out in outputs], retain_graph=True)
        again = torch.autograd.grad(outputs, views, [torch.ones_like(out) for out in outputs])
        assert all(map(torch.equal, first, kept)) and all(map(torch.equal, first, again))


@pytest.mark.parametrize(
    "loss",
    (
        lambda a, b: losses.swav_loss([a, b], a.detach()),
        lambda a, b: losses.sigreg_loss(a, num_slices=None),
        lambda a, b: losses.frossl_loss(a, b),
    ),
    ids=("prototypes", "direction_means", "nuclear"),
)
def test_gradients_from_the_forward_survive_a_kept_graph(loss):
    """They are scaled in place in the last backward alone; under compilers and torch.func in none."""
    a, b = (torch.randn(20, 17, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = loss(a, b) * 3
    first = torch.autograd.grad(value, a, retain_graph=True)[0]
    kept = first.clone()
    again = torch.autograd.grad(value, a, 2 * torch.ones_like(value), retain_graph=True)[0]
    last = torch.autograd.grad(value, a, 4 * torch.ones_like(value))[0]
    assert torch.equal(first, kept) and torch.equal(again, 2 * kept) and torch.equal(last, 4 * kept)
    torch.testing.assert_close(torch.func.grad(loss)(a, b) * 3, kept)


@pytest.mark.parametrize("op_name", cases.OPS)
def test_double_backward_raises(op_name, backend, device):
    """A second derivative is never silently zero: not alone, and not beside a term that has one."""
    op = cases.OPS[op_name]
    for beside in (False, True):
        views = [x.requires_grad_() for x in _views(op, (6, 9), torch.float32, device)]
        total = sum(out.sum() for out in op.call(*views))
        if beside:
            total = total + views[0].pow(3).sum()
        with pytest.raises(RuntimeError, match="differentiated once"):
            (grad,) = torch.autograd.grad(total, views[:1], create_graph=True)
            grad.square().sum().backward()


@pytest.mark.parametrize("op_name", cases.OPS)
def test_no_graph_without_grad(op_name, backend, device):
    """Outputs hang on no graph where no input asks for a gradient or grad mode is off."""
    op = cases.OPS[op_name]
    plain = _views(op, (6, 9), torch.float32, device)
    asking = [x.clone().requires_grad_() for x in plain]
    with torch.no_grad():
        quiet = op.call(*asking)
    with torch.inference_mode():
        inference = op.call(*asking)
    for outputs in (op.call(*plain), quiet, inference):
        assert not any(out.requires_grad for out in outputs)
        assert all(map(torch.equal, outputs, op.call(*asking)))


@pytest.mark.parametrize("op_name", cases.OPS)
def test_inputs_die_with_the_graph(op_name, backend, device):
    """Nothing but the graph holds the inputs: no reference cycle, with the collector off."""
    op = cases.OPS[op_name]
    gc.disable()
    try:
        views = [x.requires_grad_() for x in _views(op, (6, 9), torch.float32, device)]
        outputs = op.call(*views)
        torch.autograd.backward([out.sum() for out in outputs])
        watched = [weakref.ref(x) for x in (*views, *outputs)]
        del views, outputs
        assert not any(ref() is not None for ref in watched)
        unused = [x.requires_grad_() for x in _views(op, (6, 9), torch.float32, device)]
        outputs, watched = op.call(*unused), [weakref.ref(x) for x in unused]
        del unused, outputs
        assert not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


def test_an_input_changed_in_place_is_noticed(backend, device):
    """What the backward needs is saved through autograd, which refuses a tensor that was written since."""
    for op in cases.OPS.values():
        views = _views(op, (6, 9), torch.float32, device)
        leaves = [x.requires_grad_() for x in views]
        inner = [x * 1 for x in leaves]
        total = sum(out.sum() for out in op.call(*inner))
        inner[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
