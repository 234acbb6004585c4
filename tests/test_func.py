"""torch.func on the ops: a vmapped batch is a stack, grad and jacrev are autograd's, and what is refused says so."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import sslkern
from sslkern import losses, ops
from sslkern.nn import OrthogonalLinear, modReLU, modrelu

DOUBLE = torch.float64
SHAPES = {"primal": (9, 4), "dual": (5, 7)}


def covariance(estimator):
    def function(z, _):
        variance, offdiag = ops.covariance(z, estimator)
        return (variance * variance.cos()).sum() + 3 * offdiag

    return function


def cross_correlation(a, b):
    diagonal, offdiag = ops.cross_correlation(a, b)
    return (diagonal * diagonal.cos()).sum() + 3 * offdiag


FUNCTIONS = {
    "covariance": covariance("plugin"),
    "covariance, unbiased": covariance("unbiased"),
    "variance alone": lambda z, _: ops.covariance(z)[0].sum(),
    "offdiag alone": lambda z, _: ops.covariance(z)[1],
    "cross_correlation": cross_correlation,
    "diagonal alone": lambda a, b: ops.cross_correlation(a, b)[0].sum(),
    "vicreg": losses.vicreg_loss,
    "vicreg, unbiased": lambda a, b: losses.vicreg_loss(a, b, estimator="unbiased"),
    "vicreg of tensors": lambda a, b: losses.vicreg_loss(a, b, a.new_tensor(3.0), gamma=b.new_tensor(2.0)),
    "vicreg of positions": lambda a, b: losses.vicreg_loss(torch.stack([a, b], 1), torch.stack([b, a], 1)),
    "vcreg": lambda z, _: losses.vcreg_loss(z, gamma=2.0),
    "barlow": losses.barlow_twins_loss,
    "barlow, pooled": lambda a, b: losses.barlow_twins_loss(a[None], b[None], dim=1, positions="pooled"),
}


def stacks(shape, count=3):
    a = torch.randn(count, *shape, dtype=DOUBLE)
    return a, a + torch.randn_like(a)


def gradients(function, *inputs):
    """By autograd; None where an input has none."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, allow_unused=True)


def assert_same(found, expected, backend):
    """To the bit, since a slice of a stack has the bits of the slice alone; plain torch does not promise it."""
    tolerance = 0 if backend == "native" else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_are_loops(name, form, cpu_backend):
    """vmap along any dimension and of nested kinds, grad inside and outside of it, jacrev and vjp."""
    function = FUNCTIONS[name]
    a, b = stacks(SHAPES[form])
    loop = [function(x, y) for x, y in zip(a, b, strict=True)]
    slopes = [gradients(function, x, y)[0] for x, y in zip(a, b, strict=True)]
    values, of_a = torch.stack(loop), torch.stack(slopes)
    assert_same(vmap(function)(a, b), values, cpu_backend)
    assert_same(vmap(function, (1, 2))(a.movedim(0, 1), b.movedim(0, 2)), values, cpu_backend)
    assert_same(grad(function)(a[0], b[0]), slopes[0], cpu_backend)
    assert_same(jacrev(function)(a[1], b[1]), slopes[1], cpu_backend)
    assert_same(vjp(lambda x: function(x, b[2]), a[2])[1](torch.ones((), dtype=DOUBLE))[0], slopes[2], cpu_backend)
    assert_same(vmap(grad(function))(a, b), of_a, cpu_backend)
    assert_same(grad(lambda x: vmap(function)(x, b).sum())(a), of_a, cpu_backend)
    leaf = a.clone().requires_grad_()
    assert_same(torch.autograd.grad(vmap(function)(leaf, b).sum(), leaf)[0], of_a, cpu_backend)
    pairs = vmap(vmap(grad(function), (None, 0)), (0, None))(a, b)
    assert_same(pairs[1, 2], gradients(function, a[1], b[2])[0], cpu_backend)
    one = vmap(function, (None, 0))(a[0], b)
    assert_same(one[1], function(a[0], b[1]), cpu_backend)


@pytest.mark.parametrize("form", SHAPES)
def test_jacobians_of_vectors(form, cpu_backend):
    """jacrev maps the backward over gradients alone, where what was saved is not mapped; and both inside a vmap."""
    a, b = stacks(SHAPES[form])
    for function in (lambda x, _: ops.covariance(x)[0], lambda x, y: ops.cross_correlation(x, y)[0]):
        rows = [gradients(lambda x, y, k=k, f=function: f(x, y)[k], a[0], b[0])[0] for k in range(a.shape[-1])]
        jacobian = jacrev(function)(a[0], b[0])
        assert_same(jacobian, torch.stack(rows), cpu_backend)
        assert_same(vmap(jacrev(function))(a, b)[0], jacobian, cpu_backend)
        batched = torch.autograd.functional.jacobian(lambda x, f=function: f(x, b[0]), a[0], vectorize=True)
        assert_same(batched, jacobian, cpu_backend)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_refused_derivatives_say_so(name, cpu_backend):
    """Forward mode and second derivatives: one sentence in every way of asking, never zeros."""
    function = FUNCTIONS[name]
    a, b = (x[0] for x in stacks((6, 9)))

    def of_a(x):
        return function(x, b)

    for ask in (
        lambda: jvp(of_a, (a,), (b,)),
        lambda: jacfwd(of_a)(a),
        lambda: hessian(of_a)(a),
        lambda: jvp(vmap(of_a), (a[None],), (b[None],)),
        lambda: vmap(lambda t: jvp(of_a, (a,), (t,)))(b[None]),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            ask()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        of_a(forward_ad.make_dual(a, b))
    for ask in (
        lambda: grad(lambda x: grad(of_a)(x).sum())(a),
        lambda: jacrev(jacrev(of_a))(a),
        lambda: torch.autograd.functional.hessian(of_a, a),
        lambda: grad(lambda x: vmap(grad(of_a))(x).sum())(a[None]),
    ):
        with pytest.raises(RuntimeError, match="once, not twice"):
            ask()


@pytest.mark.parametrize("asking", ((True, False), (False, True), (True, True)))
@pytest.mark.parametrize("name", ("cross_correlation", "vicreg", "barlow", "vicreg of tensors"))
def test_mixed_losses_lose_no_part(name, asking, cpu_backend):
    """A gradient penalty beside the loss itself raises, whichever of the inputs need a gradient."""
    inputs = [x[0].requires_grad_(asked) for x, asked in zip(stacks((6, 9)), asking, strict=True)]
    wanted = [x for x in inputs if x.requires_grad]
    loss = FUNCTIONS[name](*inputs)
    slopes = torch.autograd.grad(loss, wanted, create_graph=True)
    assert all(g.requires_grad for g in slopes)
    with pytest.raises(RuntimeError, match="once, not twice"):
        (loss + sum(g.square().sum() for g in slopes) + sum(x.pow(3).sum() for x in wanted)).backward()


def test_a_dead_wrapper_is_torch_s_own_tensor(cpu_backend):
    """What a function under grad leaves outside is unwrapped, as by torch's ops."""
    (a, _), kept = stacks((6, 9)), []
    grad(lambda x: (kept.append(x), x.sum())[1])(a[0])
    assert torch.equal(losses.vcreg_loss(kept[0]), losses.vcreg_loss(a[0]))


def test_functional_call():
    """Per-sample gradients of a network under its loss: parameters and views from outside."""
    network = torch.nn.Sequential(torch.nn.Linear(5, 6), modReLU(6), OrthogonalLinear(6, 6)).double()
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    x, y = stacks((8, 5))

    def loss(parameters, x, y):
        return losses.vicreg_loss(
            functional_call(network, parameters, (x,)), functional_call(network, parameters, (y,))
        )

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    for k in range(len(x)):
        value = losses.vicreg_loss(network(x[k]), network(y[k]))
        expected = torch.autograd.grad(value, list(network.parameters()))
        for name, e in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][k], e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
def test_modrelu_is_twice_differentiable(dtype):
    z, bias = torch.randn(4, 3, dtype=dtype), torch.randn(3, dtype=DOUBLE)
    arguments = (z.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(modrelu, arguments) and torch.autograd.gradgradcheck(modrelu, arguments)
    assert torch.equal(vmap(modrelu, (0, None))(z, bias), modrelu(z, bias))
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        jvp(modrelu, (z.detach(), bias.detach()), (z.detach(), bias.detach()))


@pytest.mark.parametrize("sizes", ((6, 6), (9, 5), (5, 9)))
def test_factored_layers_lose_no_second_derivative(sizes):
    """A gradient penalty through a factored layer, and torch.func, have the gradients of torch's own product."""
    layers = [OrthogonalLinear(*sizes, factored=factored, dtype=DOUBLE) for factored in (False, True)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, results = torch.randn(4, sizes[0], dtype=DOUBLE), []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        value = layer(leaf).square().sum()
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        seconds = torch.autograd.grad(value + slope.square().sum(), [leaf, layer.weight_u])
        by_func = grad(lambda p, layer=layer: functional_call(layer, p, (x,)).square().sum())
        results.append([*seconds, by_func(dict(layer.named_parameters()))["weight_u"]])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("place", (0, 1, 2))
def test_rank_k_update_of_a_vmapped_stack(place, cpu_backend):
    """In place, wherever the mapped dimension lies; a gradient is refused at any level."""
    u = torch.linalg.qr(torch.randn(4, 7, 7, dtype=DOUBLE))[0]
    a, b = 0.1 * torch.randn(4, 7, 2, dtype=DOUBLE), torch.randn(7, 2, dtype=DOUBLE)
    expected = torch.stack([ops.rank_k_update_(v.clone(), c, b) for v, c in zip(u, a, strict=True)])
    moved = u.movedim(0, place).contiguous()

    def update(u, a):
        return ops.rank_k_update_(u, a, b).sum()

    vmap(update, (place, 0))(moved, a)
    assert_same(moved.movedim(place, 0), expected, cpu_backend)
    with pytest.raises(ValueError, match="u must be mapped"):
        vmap(update, (None, 0))(u[0], a)
    for ask in (lambda: grad(update)(u[0], a[0]), lambda: grad(lambda u: vmap(update)(u, a).sum())(u)):
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            ask()


def test_skinny_products(cpu_backend):
    """A stack under vmap, torch's own products where a gradient is asked for, of any order and mode."""
    x, right, left = (torch.randn(3, *shape, dtype=DOUBLE) for shape in ((6, 5), (5, 2), (6, 2)))
    for found, expected in zip(
        vmap(ops.skinny_products, (0, None, 0))(x, right[0], left),
        ops.skinny_products(x, right[:1].expand(3, 5, 2), left),
        strict=True,
    ):
        assert_same(found, expected, cpu_backend)
    leaves = [t[0].requires_grad_() for t in (x, right, left)]
    if cpu_backend != "reference":
        with pytest.raises(
            RuntimeError, match="asked for and cannot be used: skinny products with a gradient are plain"
        ):
            ops.skinny_products(*leaves)
        return
    assert torch.autograd.gradcheck(ops.skinny_products, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ops.skinny_products, leaves)


def test_top_level_names_too():
    a, b = stacks((6, 9))
    assert vmap(grad(sslkern.vicreg_loss))(a, b).shape == a.shape
