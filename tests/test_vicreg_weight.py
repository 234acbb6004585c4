"""VICReg with the last linear layer inside of the loss, against the loss of the layer's outputs."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from memory import allocated
from ranks import Collectives, close, divisions, mean_over_ranks, mine, normal, run

import sslkern
from sslkern.distributed import over
from sslkern.losses import VICRegLoss
from sslkern.ops import projected_vicreg

SETTINGS = {"sim_coeff": 3.0, "std_coeff": 20.0, "cov_coeff": 0.7, "gamma": 1.3, "eps": 1e-3}
NARROW = ((9, 4, 9), (40, 3, 20), (7, 1, 3), (3, 1, 5), (300, 140, 290))  # N, p, D
WIDE = ((2, 1, 4), (5, 3, 1), (6, 3, 6), (2, 6, 8), (20, 12, 16))


def problem(n, p, d, dtype=torch.float64, spread=0.3):
    a = normal(n, p, dtype=dtype)
    return a, (a + spread * normal(n, p, seed=1)).to(dtype), normal(d, p, seed=2, dtype=dtype) / p**0.5


def plain(a, b, weight, **settings):
    dtype = torch.promote_types(torch.promote_types(a.dtype, weight.dtype), torch.float32)
    return sslkern.vicreg_loss(*(x.to(dtype) @ weight.to(dtype).mT for x in (a, b)), **settings)


def ours(a, b, weight, **settings):
    return sslkern.vicreg_loss(a, b, weight=weight, **settings)


def results(loss, inputs, **settings):
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves, **settings)
    return value.detach(), *torch.autograd.grad(value, leaves)


def compare(inputs, tolerance=1e-12, **settings):
    names = ("value", "a", "b", "weight")
    expected = results(plain, [x.double() for x in inputs], **settings)
    for name, found, e, x in zip(names, results(ours, inputs, **settings), expected, (None, *inputs), strict=True):
        assert x is None or (found.dtype == x.dtype and found.shape == x.shape)
        close(found, e, tolerance, name)


def errors(found, truth):
    return [float((f.double() - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)]


@pytest.mark.parametrize("shape", (*NARROW, *WIDE), ids=str)
def test_equal_to_the_loss_of_the_outputs(shape, monkeypatch):
    n, p, d = shape
    assert projected_vicreg.takes_narrow(n, p, d) == (shape in NARROW)
    compare(problem(*shape))
    compare(problem(*shape), **SETTINGS)
    monkeypatch.setattr(projected_vicreg, "_PANEL", 3)  # parts of the products, which do not divide the sizes
    monkeypatch.setattr(projected_vicreg, "_ROWS", 4)
    compare(problem(*shape), **SETTINGS)


def test_any_strides():
    a, b, weight = problem(30, 4, 12)
    wide = torch.stack([a, -a], -1)[..., 0]
    compare((a.mT.contiguous().mT, wide, weight.mT.contiguous().mT))
    compare((a[:1].expand(30, 4), b, weight.repeat(2, 1)[::2]))
    compare((a, b.flip(1), weight[:1].expand(12, 4)))


def test_other_layouts_and_the_unbiased_estimator_use_the_outputs():
    a, b, weight = problem(30, 4, 12)
    compare((a, b, weight), estimator="unbiased")
    for settings in ({}, {"positions": "pooled"}):
        compare((a.view(10, 3, 4), b.view(10, 3, 4), weight), **settings)
    found = ours(a.T, b.T, weight, dim=0, batch_dim=1)
    torch.testing.assert_close(found, plain(a, b, weight))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(dtype):
    """Half precision is only that of the inputs and of the gradients, under autocast too; dtypes may be mixed."""
    a, b, weight = problem(60, 8, 30, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for w in (weight, weight.float()):
        with torch.autocast("cpu", torch.bfloat16):
            value = ours(a, b, w)
        assert value.dtype == torch.float32
        compare((a, b, w), tolerance)
    assert ours(a, b, weight.double()).dtype == torch.float64
    compare((a, b, weight.double()), max(tolerance, 1e-7))


def test_settings_and_terms():
    inputs = problem(20, 3, 9)
    values = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in SETTINGS.items()}
    found, expected = (torch.autograd.grad(loss(*inputs, **values), list(values.values())) for loss in (ours, plain))
    torch.testing.assert_close(found, expected)
    loss, terms = ours(*inputs, return_terms=True, **SETTINGS)
    torch.testing.assert_close(terms, plain(*inputs, return_terms=True, **SETTINGS)[1])
    module = VICRegLoss(**SETTINGS)
    assert torch.equal(module(*inputs[:2], weight=inputs[2]), loss)


def test_a_bias_cancels():
    a, b, weight = problem(20, 3, 9)
    bias = normal(9, seed=5)
    outputs = [torch.nn.functional.linear(x, weight, bias) for x in (a, b)]
    torch.testing.assert_close(ours(a, b, weight), sslkern.vicreg_loss(*outputs))


def spectrum(n, p, d, least, whitens):
    """Views of a spectrum from 1 to `least`, and a random weight, or one that whitens them."""
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64)).Q
    scale = torch.logspace(0, torch.tensor(least).log10(), p, dtype=torch.float64)
    shared, *noise = torch.randn(3, n, p, generator=generator, dtype=torch.float64)
    views = [(shared + 0.3 * z) * scale @ turned.T + 0.5 for z in noise]
    weight = torch.randn(d, p, generator=generator, dtype=torch.float64) / p**0.5
    return [x.float() for x in (*views, weight / scale @ turned.T if whitens else weight)]


@pytest.mark.parametrize("least", (1.0, 1e-3))
def test_float32_is_as_accurate_as_the_outputs(least):
    inputs = spectrum(500, 40, 300, least, whitens=False)
    truth = results(plain, [x.double() for x in inputs])
    for found, limit in zip(*(errors(results(loss, inputs), truth) for loss in (ours, plain)), strict=True):
        assert found <= 2 * limit + 2**-23


def test_a_weight_that_whitens():
    """The variances of outputs of weights as large as 1e3 along a deviation of 1e-3: p x p matrices in float32 keep no
    digit of them."""
    inputs = spectrum(500, 40, 300, 1e-3, whitens=True)
    truth = results(plain, [x.double() for x in inputs])
    found, limits = (errors(results(loss, inputs), truth) for loss in (ours, plain))
    assert all(f <= 2 * limit + 2**-23 for f, limit in zip(found[:3], limits, strict=False))
    assert found[3] <= 1e-4  # that of the outputs is 3e-6: the rounding of N rows averages out
    a, weight = inputs[0], inputs[2]
    centred = a - a.mean(0)
    quadratic = (weight @ (centred.T @ centred / 499) * weight).sum(1)
    exact = (a.double() @ weight.double().T).var(0)
    assert float(((quadratic - exact) / exact).abs().max()) > 1e-3


def test_means_and_differences_keep_their_digits():
    """A mean of 1e4 deviations, and views that differ by 1e-5 of them."""
    a, b, weight = problem(60, 8, 30)
    compare(((a + 1e4).float(), (b + 1e4).float(), weight.float()), 1e-5)
    near = (a.float(), (a + 1e-5 * b).float(), weight.float())
    compare(near, 1e-5, sim_coeff=1e10, std_coeff=0.0, cov_coeff=0.0)


def test_singular_covariances():
    """Columns without variance, equal columns, constant views and a weight of zeros: no NaN, and no negative
    variance."""
    a, b, weight = problem(60, 8, 30)
    for x in (a, b):
        x[:, 0], x[:, 2], x[:, 5] = 0, x[:, 1], 1e-6 * x[:, 5]
    compare((a, b, weight))
    compare((torch.ones_like(a), torch.zeros_like(a), weight), 1e-9)
    compare((a, b, torch.zeros_like(weight)))
    for dtype in (torch.float32, torch.float64):
        views = [torch.ones(60, 8, dtype=dtype) * 0.1, torch.zeros(60, 8, dtype=dtype), weight.to(dtype)]
        assert all(x.isfinite().all() for x in results(ours, views, eps=1e-4))


def test_nan_reaches_the_loss_and_its_gradients():
    for k in range(3):
        inputs = problem(60, 8, 30)
        inputs[k][3, 2] = torch.nan
        value, of_a, of_b, of_weight = results(ours, inputs)
        assert value.isnan() and of_weight.isnan().any() and (of_a if k < 2 else of_b).isnan().any()


def test_gradients():
    inputs = [x.requires_grad_() for x in problem(9, 2, 6)]
    assert torch.autograd.gradcheck(partial(ours, **SETTINGS), inputs)
    whole = torch.autograd.grad(ours(*inputs), inputs)
    for k in range(3):
        some = [x.detach().requires_grad_(i == k) for i, x in enumerate(inputs)]
        assert torch.equal(torch.autograd.grad(ours(*some), some[k])[0], whole[k])
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), plain(*inputs))
    (grad,) = torch.autograd.grad(ours(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        grad.sum().backward()
    detached = [x.detach() for x in inputs]
    torch.testing.assert_close(torch.func.grad(ours, (0, 1, 2))(*detached), whole)
    many = torch.func.vmap(ours, (0, None, None))(torch.stack([detached[0], detached[1]]), *detached[1:])
    torch.testing.assert_close(many[0], ours(*detached))
    both = lambda w: torch.func.vmap(ours, (0, 0, None))(*[x.expand(2, -1, -1) for x in detached[:2]], w).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(both)(detached[2]), 2 * whole[2])


def test_nothing_of_the_size_of_the_outputs_is_formed():
    n, p, d = 2048, 64, 1024
    inputs = [x.float().requires_grad_() for x in problem(n, p, d)]
    grads = (2 * n + d) * p * 4
    peak, _ = allocated(lambda: ours(*inputs).backward())
    assert peak < grads + n * d * 4 / 4 and peak < d * d * 4
    assert allocated(lambda: plain(*inputs).backward())[0] > 3 * n * d * 4


def test_one_graph():
    inputs = [x.requires_grad_() for x in problem(20, 3, 9)]
    whole = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(whole, inputs), results(ours, inputs), strict=True):
        close(found, expected, 1e-12, "compiled")


@pytest.mark.parametrize(
    ("weight", "error", "said"),
    (
        ([[1.0]], TypeError, "weight must be a torch.Tensor of shape"),
        (torch.ones(6, 3).long(), TypeError, "weight must be float32"),
        (torch.ones(3), ValueError, r"weight must have shape \(N, D\), got \(3,\)"),
        (torch.ones(3, 6), ValueError, r"weight must have shape \(D, 3\), .* got \(3, 6\)"),
        (torch.ones(0, 3), ValueError, "weight must have at least 1 rows"),
        (torch.ones(6, 3).to("meta"), ValueError, "weight and a must be on the same device"),
    ),
)
def test_bad_arguments(weight, error, said):
    with pytest.raises(error, match=said):
        sslkern.vicreg_loss(torch.ones(8, 3), torch.ones(8, 3), weight=weight)


def joint():
    """Values, the gradients of each rank's rows, and the mean over ranks of the weight's, with no rows on one rank."""
    size = dist.get_world_size()
    for shape in ((24, 4, 12), (24, 12, 16)):
        *views, weight = problem(*shape)
        expected, *gradients = results(ours, (*views, weight))
        for counts in (*divisions(24), [24] + [0] * (size - 1)):
            own = [mine(x, counts) for x in views]
            value, *found = results(partial(ours, group="world"), (*own, weight))
            close(mean_over_ranks(value), expected, 1e-12, (shape, counts))
            for f, e in zip(found[:2], gradients[:2], strict=True):
                close(f / size, mine(e, counts), 1e-12, (shape, counts), scale=float(e.abs().max()))
            close(mean_over_ranks(found[2]), gradients[2], 1e-12, (shape, counts, "weight"))


def traffic():
    """Sums over ranks of two means and of the p x p matrices, and of their gradients."""
    *views, weight = (x.requires_grad_() for x in problem(12, 4, 12))
    with Collectives() as called:
        value = ours(*views, weight, group=over(even=True))
        assert called.names == ["all_reduce"] * 3
        value.backward()
    assert called.names == ["all_reduce"] * 4


def refused():
    x, first = normal(12, 3), dist.get_rank() == 0
    with pytest.raises(ValueError if first else RuntimeError, match="weight must have" if first else "on rank 0"):
        ours(x, x, normal(9, 2 if first else 3), group="world")


def test_ranks_are_one(tmp_path):
    run(2, (joint, traffic, refused), tmp_path)
