"""SIGReg over all directions: its formula in float64, the limit of many slices, blocks, corners, messages."""

import math
import pickle
from unittest.mock import patch

import numpy as np
import pytest
import torch
from memory import allocated

from sslkern.core.autograd import differentiated
from sslkern.core.kept import Kept
from sslkern.losses import LeJEPALoss, SIGRegLoss, lejepa_loss, sigreg_loss
from sslkern.ops import _direction_blocks as blocks
from sslkern.ops import _radial_tables as tables
from sslkern.ops.direction_means import mean_cosines_of_pairs


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unsliced(z, **settings):
    return sigreg_loss(z, num_slices=None, **settings)


class MeanCosine(torch.autograd.Function):
    """E_a cos(r a_1) in d dimensions, by the rule of Gauss and Legendre for its integral over the angle."""

    @staticmethod
    def forward(ctx, r, d):
        nodes, weights = np.polynomial.legendre.leggauss(1200)
        angles = (torch.tensor(nodes) + 1) * math.pi / 2
        weights = torch.tensor(weights) * angles.sin() ** (d - 2)
        some = weights > 1e-25
        cosines, weights = angles[some].cos(), weights[some] / weights.sum()
        ctx.save_for_backward((r[..., None] * cosines).sin() @ (-weights * cosines))
        return (r[..., None] * cosines).cos() @ weights

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def formula(z, knots=17, t_max=3.0, symmetric=False):
    """N int [mean_ij L(t |x_i - x_j|) - 2 phi mean_i L(t |x_i|) + phi^2] phi dt for the function L = `MeanCosine`."""
    n, d = z.shape[-2:]
    t = torch.linspace(-t_max, t_max, knots if symmetric else 2 * knots - 1, dtype=z.dtype)
    phi = (-t.square() / 2).exp()
    i, j = torch.triu_indices(n, n, 1)
    apart = (z[..., i, :] - z[..., j, :]).norm(dim=-1)[..., None]
    pairs = (n + 2 * MeanCosine.apply(apart * t, d).sum(-2)) / n**2
    rows = MeanCosine.apply(z.norm(dim=-1)[..., None] * t, d).mean(-2)
    return n * torch.trapezoid((pairs - 2 * phi * rows + phi.square()) * phi, t).mean()


def both(loss, z):
    """The value and the gradient, in float64."""
    z = z.detach().requires_grad_()
    value = loss(z)
    return value.detach().double(), torch.autograd.grad(value, z)[0].double()


SHAPES = (
    (9, 16),
    (8, 17),
    (2, 7, 33),
    (9, 64),
    (6, 289),
    (6, 320),
    (8, 512),
    (4, 8192),
    (4, 8193),
    (1, 20),
    (3, 1, 16),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_formula(shape):
    for dtype, rtol, of_gradient in ((torch.float64, 1e-12, 1e-10), (torch.float32, 1e-6, 2e-6)):
        z = (1.2 * normal(*shape) + 0.1).to(dtype)
        (value, gradient), (expected, truth) = both(unsliced, z), both(formula, z.double())
        assert unsliced(z).dtype == dtype
        torch.testing.assert_close(value, expected, rtol=rtol, atol=0)
        torch.testing.assert_close(gradient, truth, rtol=0, atol=of_gradient * truth.abs().max().item())


@pytest.mark.parametrize("std", (0, 1e-4, 0.05, 3, 12, 40))
@pytest.mark.parametrize("d", (16, 48))
def test_short_and_long_rows(std, d):
    """Two of them are equal: their squared distance is as precise as the squares of their lengths. The gradient of long
    rows is small; its error is that of short rows at most."""
    for dtype, rtol, of_gradient in ((torch.float64, 1e-12, 1e-13), (torch.float32, 1e-6 + 1e-8 * std**2, 1e-7)):
        z = std * normal(7, d)
        z[2] = z[3]
        z = z.to(dtype)
        (value, gradient), (expected, truth) = both(unsliced, z), both(formula, z.double())
        torch.testing.assert_close(value, expected, rtol=rtol, atol=0)
        torch.testing.assert_close(gradient, truth, rtol=20 * rtol, atol=of_gradient)


@pytest.mark.parametrize(
    ("knots", "symmetric"), ((17, False), (2, False), (10, True), (9, True), (2, True), (40, False))
)
@pytest.mark.parametrize("t_max", (0.02, 2.5, 6.0))
def test_knots(knots, symmetric, t_max):
    settings = {"knots": knots, "t_max": t_max, "symmetric": symmetric}
    z = 1.2 * normal(6, 24)
    (value, gradient), (expected, truth) = (both(lambda z, f=f: f(z, **settings), z) for f in (unsliced, formula))
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-9 * truth.abs().max().item() + 1e-14)


def test_it_is_the_mean_over_random_directions():
    """By the standard error of 40 losses with 500 directions each, and of their gradients."""
    z = 1.1 * normal(60, 16)
    samples = [both(lambda z, s=s: sigreg_loss(z, num_slices=500, generator=s), z) for s in range(40)]
    for found, each in zip(both(unsliced, z), zip(*samples, strict=True), strict=True):
        mean, error = torch.stack(each).mean(0), torch.stack(each).std(0) / math.sqrt(len(samples))
        assert ((mean - found).abs() < 5 * error).all() and (error < 0.05 * found.abs().max()).all()
    state = torch.get_rng_state()
    unsliced(z)
    assert torch.equal(state, torch.get_rng_state())


def test_gradcheck():
    assert torch.autograd.gradcheck(unsliced, normal(2, 4, 17).requires_grad_())
    z = normal(5, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated once"):
        (gradient,) = torch.autograd.grad(unsliced(z), z, create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize("rows", (1, 5, 128))
def test_blocks(rows):
    """Blocks of any number of rows, and of slices; and pairs of rows of two matrices."""
    z, more = normal(3, 23, 20), normal(3, 31, 20, seed=1)
    knots, weights = [0.0, 0.7, 2.0], [0.3, 0.5, 0.1]
    pairs = lambda z: mean_cosines_of_pairs(z[:, :23], z, knots, weights).sum()  # noqa: E731
    with patch.multiple(blocks, _LEAST_ROWS=rows, _SQUARE_ROWS=1, _NUMBERS={"cuda": 1}):
        one = both(unsliced, z), both(pairs, torch.cat((z, more), 1))
    for found, expected in zip(one[0], both(unsliced, z), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)

    def direct(x):
        r = torch.cdist(x[:, :23], x, compute_mode="donot_use_mm_for_euclid_dist")
        return sum(w * MeanCosine.apply(t * r, 20).sum() for t, w in zip(knots, weights, strict=True))

    for found, expected in zip(one[1], both(direct, torch.cat((z, more), 1)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_a_slice_of_a_stack_has_the_bits_of_the_slice():
    z = normal(3, 40, 32, dtype=torch.float32)
    gradient = both(unsliced, z)[1]
    for k in range(3):
        assert torch.equal(gradient[k], both(lambda z: unsliced(z) / 3, z[k])[1])


def test_float32_of_many_rows():
    """The loss is the difference of numbers N times as large, and a common mean is subtracted before the products."""
    z = 0.9 * normal(1500, 32, dtype=torch.float32)
    (value, gradient), (expected, truth) = both(unsliced, z), both(unsliced, z.double())
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient, truth, rtol=0, atol=2e-5 * truth.abs().max().item())
    far = (z + 1000).double()
    torch.testing.assert_close(unsliced(far.float()).double(), unsliced(far.float().double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    z = normal(2, 9, 20).to(dtype)
    (value, gradient), (expected, truth) = both(unsliced, z), both(unsliced, z.double())
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, truth, rtol=0, atol=0.01 * truth.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unsliced(z.float()), unsliced(z)) and unsliced(z).dtype == torch.float32


@pytest.mark.parametrize("entry", (math.nan, math.inf, -math.inf, 1e25))
def test_a_row_that_is_not_finite(entry):
    """Its slice alone is NaN; of a square that overflows, the value."""
    z = normal(2, 6, 18, dtype=torch.float32)
    z[0, 3, 2] = entry
    value, gradient = both(unsliced, z)
    assert value.isnan() and gradient[1].isfinite().all()
    assert gradient[0].isnan().all() or entry == 1e25


def test_without_gradients():
    z = normal(200, 16, dtype=torch.float32)
    assert not differentiated(z) and torch.equal(unsliced(z), unsliced(z.clone().requires_grad_()).detach())
    kept, _ = allocated(lambda: unsliced(normal(3000, 16, dtype=torch.float32).requires_grad_()).backward())
    assert kept < 3000 * 3000 * 4


def test_layouts():
    z = normal(12, 40)
    for view in (z.mT.contiguous().mT, z[::2, ::2].contiguous(), torch.cat((z, z), 1)[:, :40], z[:1].expand(5, 40)):
        torch.testing.assert_close(unsliced(view), unsliced(view.contiguous()), rtol=1e-13, atol=0)
    assert unsliced(z[None, None]).shape == ()


def test_it_compiles_and_vmaps():
    torch._dynamo.reset()
    call = torch.compile(unsliced, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((6, 20), (7, 33)):
        for found, expected in zip(both(call, normal(*shape)), both(unsliced, normal(*shape)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    z = normal(3, 5, 20)
    torch.testing.assert_close(torch.func.vmap(unsliced)(z), torch.stack([unsliced(x) for x in z]))
    gradients = torch.func.vmap(torch.func.grad(unsliced))(z)
    torch.testing.assert_close(gradients, torch.stack([both(unsliced, x)[1] for x in z]))


def test_tables_are_kept():
    """A few, also those that are first used where no tensor may need a gradient."""
    z = normal(4, 19)
    with patch.object(tables, "_tables", Kept(3)) as kept:
        with torch.inference_mode():
            expected = unsliced(z)
        assert len(kept._found) == 2
        torch.testing.assert_close(both(unsliced, z)[0], expected)
        assert len(kept._found) == 2
        unsliced(normal(4, 21))
        assert len(kept._found) == 3


def test_lejepa():
    g, z = normal(2, 9, 16).requires_grad_(), normal(4, 9, 16, seed=1).requires_grad_()
    views = torch.cat((g, z))
    loss = lejepa_loss(g, z, 0.2, num_slices=None)
    expected = 0.2 * unsliced(views) + 0.8 * (views - g.mean(0)).square().mean()
    torch.testing.assert_close(loss, expected)
    for x, y in zip(torch.autograd.grad(loss, (g, z)), torch.autograd.grad(expected, (g, z)), strict=True):
        torch.testing.assert_close(x, y)
    module = LeJEPALoss(0.2, num_slices=None)
    assert torch.equal(module(g, z), loss) and "num_slices=None" in repr(pickle.loads(pickle.dumps(module)))
    assert torch.equal(SIGRegLoss(num_slices=None, knots=9)(g), unsliced(g, knots=9))


NARROW, WIDE = torch.ones(4, 15), torch.ones(2, 4, 16)
REFUSED = {
    "columns": (lambda: unsliced(NARROW), r"num_slices=None needs D >= 16, got z of shape \(4, 15\)"),
    "view": (lambda: lejepa_loss(NARROW[None], num_slices=None), r"num_slices=None needs D >= 16, got global_views"),
    "directions": (
        lambda: unsliced(WIDE, directions=torch.ones(16, 2)),
        "directions must be None with num_slices=None",
    ),
    "generator": (lambda: unsliced(WIDE, generator=3), "generator must be None with num_slices=None"),
    "module": (lambda: SIGRegLoss(num_slices=None, generator=3), "generator must be None with num_slices=None"),
    "call": (lambda: SIGRegLoss(num_slices=None)(WIDE, directions=torch.ones(16, 2)), "directions must be None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        call()
