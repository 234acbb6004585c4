"""Functions over pairs of rows through torch.func, differentiated twice, and compiled with symbolic sizes."""

import pairs
import pytest
import torch
from pairs import CALLS, detached, floating, total, value_and_gradients
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

from sslkern import losses
from sslkern.ops import pairwise_reduce

on_each = pairs.on_each
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def slices_of(tensors, count=3):
    """Stacks of like tensors: slice k is a little larger than the last one; whole numbers stay."""
    return [torch.stack([t * (1 + 0.1 * k) if t.is_floating_point() else t for k in range(count)]) for t in tensors]


def by_loop(function, stacks):
    """The function of every slice, stacked."""
    each = [function(*(s[k] for s in stacks)) for k in range(len(stacks[0]))]
    return tuple(map(torch.stack, zip(*each, strict=True))) if isinstance(each[0], tuple) else torch.stack(each)


@pytest.mark.parametrize("name", CALLS)
def test_grad_is_that_of_backward(name):
    call = CALLS[name]
    tensors = detached(call.tensors(9))
    wanted = value_and_gradients(call.function, tensors)[1:]
    for ours, exact in zip(grad(total(call.function), floating(tensors))(*tensors), wanted, strict=True):
        torch.testing.assert_close(ours, exact, **CLOSE)


EACH = [("native", name) for name in CALLS] + [("reference", name) for name in list(CALLS)[::3]]


@pytest.mark.parametrize("on_each, name", EACH, indirect=["on_each"])
def test_vmap_is_the_loop(name):
    """Over all tensors, and over some at a dimension of its own; values, and gradients per sample."""
    call = CALLS[name]
    stacks = slices_of(detached(call.tensors(9)))
    torch.testing.assert_close(vmap(call.function)(*stacks), by_loop(call.function, stacks), **CLOSE)
    gradients = grad(total(call.function), floating(stacks))
    wanted = by_loop(gradients, stacks)
    torch.testing.assert_close(vmap(gradients)(*stacks), wanted, **CLOSE)
    for mapped in range(len(stacks)):
        some = [s if k == mapped else s[:1].expand_as(s) for k, s in enumerate(stacks)]
        given = [s.movedim(0, -1) if k == mapped else s[0] for k, s in enumerate(stacks)]
        dims = tuple(-1 if k == mapped else None for k in range(len(stacks)))
        torch.testing.assert_close(vmap(gradients, dims)(*given), by_loop(gradients, some), **CLOSE)


@pytest.mark.parametrize("name", ("logsumexp, cosine", "max", "matmul, rbf", "gram", "hsic", "nt_xent", "supervised"))
def test_jacobians(name):
    """Rows of the Jacobian are gradients: vmap of the backward alone."""
    call = CALLS[name]
    tensors = detached(call.tensors(5))

    def flat(*given):
        out = call.function(*given)
        return torch.cat([o.reshape(-1) for o in out]) if isinstance(out, tuple) else out.reshape(-1)

    places = floating(tensors)
    leaves = [t.clone().requires_grad_() if k in places else t for k, t in enumerate(tensors)]
    rows = [torch.autograd.grad(o, [leaves[k] for k in places], retain_graph=True) for o in flat(*leaves)]
    for ours, wanted in zip(jacrev(flat, places)(*tensors), zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(wanted), **CLOSE)


def test_vmap_of_vmap_and_of_labels():
    """Two mapped dimensions; labels that are mapped where the rows are not, and the other way around."""
    x, ids = torch.randn(2, 3, 6, 4), torch.randint(3, (2, 3, 6))

    def same(z, labels):
        return pairwise_reduce(z, mask="same offdiag", labels=labels)

    twice = vmap(vmap(same))(x, ids)
    assert torch.equal(twice, pairwise_reduce(x, mask="same offdiag", labels=ids))
    assert torch.equal(vmap(same, (None, 0))(x[0, 0], ids[0]), vmap(same)(x[0, :1].expand(3, 6, 4), ids[0]))
    assert torch.equal(vmap(same, (0, None))(x[0], ids[0, 0]), vmap(same)(x[0], ids[0, :1].expand(3, 6)))


def test_positives_out_of_range_are_seen_through_vmap():
    q, k = torch.randn(2, 4, 3), torch.randn(2, 5, 3)
    loss = vmap(lambda q, k, p: losses.info_nce_loss(q, k, positives=p))
    assert loss(q, k, torch.full((2, 4), 4)).shape == (2,)
    with pytest.raises(ValueError, match=r"positives must be in \[0, 5\)"):
        loss(q, k, torch.full((2, 4), 5))


def test_functional_call():
    """Modules with given parameters, of which the gradients come."""
    a, b = torch.randn(2, 6, 4)
    for module in (
        losses.NTXentLoss(nn.Parameter(torch.tensor(0.5))),
        losses.SpectralContrastiveLoss(nn.Parameter(torch.ones(1))),
    ):
        ((name, p),) = module.named_parameters()
        ours = grad(lambda p, module=module, name=name: functional_call(module, {name: p}, (a, b)))(p.detach() * 0.6)
        with torch.no_grad():
            p.mul_(0.6)
        torch.testing.assert_close(ours, torch.autograd.grad(module(a, b), p)[0])


def slope(function, leaf, step=1e-5):
    """The derivative of `function` as all elements of the leaf grow alike, by a difference."""
    values = []
    for shift in (step, -2 * step, step):
        values.append(function().detach())
        leaf.data += shift
    return (values[1] - values[2]) / (2 * step)


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_right_or_refused(name):
    """By the inputs and by the coefficients, alone and beside a term that has some; never silently 0."""
    call = CALLS[name]
    tensors = detached(call.tensors(5))
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    asked = [t for t in leaves if t.requires_grad]
    if not call.once:
        assert torch.autograd.gradgradcheck(total(call.function), leaves)
        return
    refused = []
    for beside in (False, True):
        for leaf in asked:

            def first_sum(leaf=leaf, beside=beside):
                value = total(call.function)(*leaves)
                if beside:
                    value = value + sum(t.pow(3).sum() for t in asked)
                return torch.autograd.grad(value, leaf, create_graph=True)[0].sum()

            try:
                (second,) = torch.autograd.grad(first_sum(), leaf)
            except RuntimeError as error:
                assert "differentiated once, not twice" in str(error)
                refused.append(leaf)
            else:  # no kernel is differentiated twice, as for the positives of a memory bank
                torch.testing.assert_close(second.sum(), slope(first_sum, leaf), rtol=1e-5, atol=1e-6)
    assert refused


def test_second_derivatives_through_torch_func():
    """One sentence: hessian goes by forward mode, and grad of grad by a second backward."""
    x = torch.randn(5, 3, dtype=torch.float64)
    loss = lambda z: pairwise_reduce(z, mask="offdiag").sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        grad(lambda z: grad(loss)(z).square().sum())(x)
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        hessian(loss)(x)


TRACED = (  # what docs/support.md does not have: stacks, labels, medians, tensors for settings, other forms of a loss
    "logsumexp, both sides", "logsumexp, n slices", "matmul, rbf", "hsic, medians", "pairwise_hsic",
    "entropy, pairwise-kl", "nt_xent, 3 views inside", "decoupled", "info_nce, positives", "supervised, lists inside",
    "sigmoid",
)  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("on_each", ("native",), indirect=True)
def test_one_graph_serves_every_size(name):
    """dynamic=True, fullgraph=True: values and gradients of other sizes, none of which may lead to another trace; of
    one loss the backward is traced too."""
    function = total(CALLS[name].function)
    torch._dynamo.reset()
    compiler = "aot_eager" if name == "supervised, lists inside" else "eager"
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for n in (31, 32, 40, 50):
        tensors = detached(CALLS[name].tensors(n))
        asked = [t.requires_grad_() for t in tensors if t.is_floating_point()]
        with torch._dynamo.config.patch(error_on_recompile=n > 31):
            found = compiled(*tensors)
        wanted = function(*tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
        gradients = (torch.autograd.grad(value, asked) for value in (found, wanted))
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
