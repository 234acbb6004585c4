"""Values and gradients of every op against fp64, by one rule and no other constants (`cases.outside_rule`)."""

import cases
import pytest
import torch
from rules import complaints

from sslkern import backend as backends


def in_turn(names, op_name, turn, special=False):
    """What Triton takes of the cases, which it compiles or interprets one by one. Two estimators share the kernels: in
    turn 0 every case, for one of the two; in turns 1 and 2 the same, but the cases that are only a shape and a layout
    in one of both turns. `special`: all with values of their own, for both estimators."""
    taken = []
    for k, (name, case) in enumerate(cases.CASES.items()):
        own = case.values is not cases.same
        both = op_name == "cross_correlation" or cases.inputs_of(case, 1, torch.float32)[0].shape[-2] < 4
        mine = both or (k + turn) % 2 == ("unbiased" in op_name)
        if name in names and ((own and special) or (mine and (own or turn == 0 or k // 2 % 2 == turn - 1))):
            taken.append(name)
    return taken


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("op_name", cases.OPS)
def test_values_and_gradients_follow_fp64(op_name, dtype, backend, device):
    """Over every shape and layout, with random gradients of every output."""
    names = cases.cases_for(cases.OPS[op_name], backend, 40_000 if dtype == torch.float32 else 1300)
    if backend == "triton":
        names = in_turn(names, op_name, cases.DTYPES.index(dtype), special=dtype == torch.float32)
    found = [line for name in names for line in complaints(op_name, name, dtype, device)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("op_name", cases.OPS)
def test_the_form_auto_would_not_take_agrees(op_name, backend, device):
    """The value does not depend on the form, up to the cancellation that "auto" avoids."""
    op, found = cases.OPS[op_name], []
    names = cases.cases_for(op, backend, 1300)
    for name in in_turn(names, op_name, 1, special=True) if backend == "triton" else names:
        n, d = cases.inputs_of(cases.CASES[name], 1, torch.float32)[0].shape[-2:]
        form = "primal" if n < op.threshold * d else "dual"
        found += complaints(op_name, name, torch.float32, device, form, forced=True)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("op_name", cases.OPS)
def test_auto_takes_the_smaller_side(op_name, backend, device):
    """The form "auto" has the bits of the form that its rule names, on both sides of the threshold."""
    op = cases.OPS[op_name]
    names = ("below .75", "below .8", "at .8", "33x17", "17x33")
    for name in names[:3] if cases.interpreted(backend) else names:
        inputs = cases.inputs_of(cases.CASES[name], op.inputs, torch.float32, device)
        n, d = inputs[0].shape
        wanted = op.call(*inputs, "dual" if n < op.threshold * d else "primal")
        assert all(map(torch.equal, op.call(*inputs), wanted)), name


@pytest.mark.parametrize("op_name", cases.OPS)
def test_reference_is_the_published_formula(op_name):
    """In fp64 the reference equals the published formula, values and gradients, in both forms."""
    op = cases.OPS[op_name]
    for name, case in cases.cases_for(op).items():
        inputs = [x.contiguous() for x in cases.inputs_of(case, op.inputs, torch.float64)]
        with backends.use("reference"):
            scale = cases.value_and_grad(op.scale_forced, inputs)
        plain = cases.value_and_grad(cases.by_slice(op.plain), inputs)
        for form in ("primal", "dual"):
            with backends.use("reference"):
                ours = cases.value_and_grad(lambda *views, form=form: op.call(*views, form), inputs)
            for parts in zip(ours, plain, scale, strict=True):
                for x, y, s in zip(*parts, strict=True):
                    assert (x - y).abs().max() <= 1e-9 * (1 + s.abs().max()), (name, form)


@pytest.mark.parametrize("op_name", ("covariance", "covariance, unbiased", "cross_correlation"))
def test_one_output_alone_and_stride_0_gradients(op_name, backend, device):
    """Each output alone is differentiable, and an expanded gradient counts as its dense copy."""
    op = cases.OPS[op_name]
    names = ("5x7", "33x17", "stack of stacks", "257x129")
    for name in names[:3] if cases.interpreted(backend) else names:
        inputs = [x.requires_grad_() for x in cases.inputs_of(cases.CASES[name], op.inputs, torch.float32, device)]
        outputs = op.call(*inputs)
        ones = [torch.ones_like(out) for out in outputs]
        grads = []
        for k in range(2):
            dense = [one if i == k else torch.zeros_like(one) for i, one in enumerate(ones)]
            alone = torch.autograd.grad(outputs[k], inputs, ones[k], retain_graph=True)
            expanded = torch.autograd.grad(
                outputs[k], inputs, torch.ones((), device=device).expand_as(ones[k]), retain_graph=True
            )
            both = torch.autograd.grad(outputs, inputs, dense, retain_graph=True)
            assert all(map(torch.equal, alone, both)), (name, k)
            assert all(map(torch.equal, alone, expanded)), (name, k)
            grads.append(alone)
        for first, second, whole in zip(*grads, torch.autograd.grad(outputs, inputs, ones), strict=True):
            torch.testing.assert_close(first + second, whole)


@pytest.mark.parametrize("op_name", cases.OPS)
def test_fp64_in_fp64_out(op_name, backend, device):
    """Outputs and gradients of float64 are float64, and follow the reference to 1e-10 of the scale; or are refused."""
    op = cases.OPS[op_name]
    if backend == "triton":
        with pytest.raises(RuntimeError, match="float64 is not among"):
            op.call(*cases.inputs_of(cases.CASES["5x7"], op.inputs, torch.float64, device))
        return
    for name in ("5x7", "33x17", "odd stack", "257x129", "transposed stack", "mean 1e4"):
        inputs = cases.inputs_of(cases.CASES[name], op.inputs, torch.float64, device)
        ours = cases.value_and_grad(op.call, inputs)
        with backends.use("reference"):
            truth = cases.value_and_grad(op.call, inputs)
        for x, y in zip(ours[0] + ours[1], truth[0] + truth[1], strict=True):
            assert x.dtype == torch.float64
            assert (x - y).abs().max() <= 1e-10 * y.abs().max(), name


@pytest.mark.parametrize("op_name", cases.OPS)
def test_an_empty_stack_gives_empty_outputs(op_name, backend, device):
    """(0, N, D) holds no slice: outputs and gradients have no elements."""
    op = cases.OPS[op_name]
    outputs, grads = cases.value_and_grad(op.call, [torch.empty(0, 5, 3, device=device) for _ in range(op.inputs)])
    assert all(out.shape[0] == 0 for out in outputs) and all(grad.shape == (0, 5, 3) for grad in grads)
