"""ProjUNN against dense fp64 truths: where it ends, its formulas, and directions that are easy to get wrong."""

import itertools

import matrices
import pytest
import torch
from matrices import DTYPES, METHODS, dense_step, eps, error, generator, haar, steps, wide
from torch import nn

from sslkern import optim
from sslkern.optim import ProjUNN, linear_factors, low_rank_factors, orthogonality_error

everywhere = matrices.everywhere
CASES = [
    *(("tangent", shape, dtype) for shape in ((16, 16), (3, 12, 12)) for dtype in (torch.float64, torch.complex64)),
    *((retraction, shape, dtype) for retraction in ("direct", "cayley") for shape in ((16, 16), (24, 10), (2, 14, 6))
      for dtype in (torch.float32, torch.complex128)),
]  # fmt: skip


def solve(shape, dtype, **options):
    """Procrustes' problem by 300 steps: the distance to the polar factor of B A^H, and the parameter."""
    p = shape[-1]
    start = haar(*shape, dtype=dtype)
    turn = torch.linalg.matrix_exp(0.5 * torch.randn(*shape[:-2], shape[-2], shape[-2], dtype=dtype).triu(1))
    turn = torch.linalg.svd(turn)
    target = (turn.U @ turn.Vh) @ start  # in the component of the start, where there are two
    a = haar(*shape[:-2], p, p, dtype=dtype) * (1 + torch.rand(p, dtype=dtype.to_real()))
    b = target @ a + 0.05 * torch.randn(shape, dtype=dtype)
    best = torch.linalg.svd(wide(b) @ wide(a).mH, full_matrices=False)
    u = nn.Parameter(start)
    optimizer = ProjUNN([u], 0.05, rank=4, momentum=0.5, **options)
    for _ in range(300):
        optimizer.zero_grad()
        (u @ a - b).abs().square().sum().backward()
        optimizer.step()
    return torch.linalg.matrix_norm(wide(u.detach()) - best.U @ best.Vh).max() / p**0.5, u


@pytest.mark.parametrize("retraction, shape, dtype", CASES, ids=str)
def test_procrustes(retraction, shape, dtype):
    """min ||U A - B||_F ends at the polar factor of B A^H, by steps of rank 4 with momentum."""
    distance, u = solve(shape, dtype, retraction=retraction)
    assert distance < (1e-6 if eps(dtype) > 1e-8 else 1e-12)
    assert orthogonality_error(u).max() < (3e-7 if eps(dtype) > 1e-8 else 1e-14)


def test_many_small_blocks():
    """As in orthogonal fine-tuning: 1,000 steps of 8 blocks end within 1e-6; Cayley maps by Neumann series, past .1."""
    skew = torch.randn(8, 32, 32) / 32**0.5
    target = torch.linalg.matrix_exp(skew - skew.mT)
    x = torch.randn(8, 32, 128)
    y = target @ x
    u = nn.Parameter(torch.eye(32).repeat(8, 1, 1))
    optimizer = ProjUNN([u], 0.02, rank=4, momentum=0.9, second_moment="scalar")
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 1000)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (u @ x - y).square().mean()
        loss.backward()
        optimizer.step()
        decay.step()
    assert loss < 1e-4 and orthogonality_error(u.detach()).max() < 1e-6

    def neumann(q):
        """(I + S) (I + S + ... + S^5), for (I + S) (I - S)^-1."""
        s = (q - q.mT) / 2
        series = term = torch.eye(32).expand_as(s)
        for _ in range(5):
            term = term @ s
            series = series + term
        return series + s @ series

    q = nn.Parameter(torch.zeros(8, 32, 32))
    adam = torch.optim.Adam([q], 0.01)
    for _ in range(500):
        adam.zero_grad()
        (neumann(q) @ x - y).square().mean().backward()
        adam.step()
    assert orthogonality_error(neumann(q).detach()).max() > 0.1


@pytest.mark.parametrize("options", ({}, {"method": "svd"}, {"warm_start": False}), ids=str)
def test_factors_of_the_whole_gradient_stop_short(options):
    """The part of the gradient that moves nothing takes the rank: every method is off by 1e-2 and more, for good."""
    torch.manual_seed(1)
    assert solve((16, 16), torch.float64, riemannian=False, **options)[0] > 1e-2
    torch.manual_seed(1)
    assert solve((16, 16), torch.float64, **options)[0] < 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_factors_of_the_tangent_part(method, dtype):
    """Of G - U (U^H G + G^H U) / 2: as of that matrix made dense, square, tall and stacked; exact at full rank."""
    for shape in ((9, 9), (14, 6), (3, 7, 7), (2, 8, 3)):
        u, g = haar(*shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        x, y = torch.randn(*shape[:-2], 5, shape[-1], dtype=dtype), torch.randn(*shape[:-1], 5, dtype=dtype)
        tangent = wide(g) - wide(u) @ (wide(u).mH @ wide(g) + wide(g).mH @ wide(u)) / 2
        left, right = low_rank_factors(g, 2, method, generator=generator(), u=u)
        dense = low_rank_factors(tangent.to(dtype), 2, method, generator=generator())
        products = [wide(a) @ wide(b).mH for a, b in ((left, right), dense)]
        assert (products[0] - products[1]).abs().max() < 1e3 * eps(dtype), shape
        if method == "sketch":
            assert error(*low_rank_factors(g, 99, u=u), tangent) < 50 * eps(dtype)
            ours = linear_factors(y.mT, x, 2, generator=generator(), u=u)
            dense = low_rank_factors(y @ x.conj(), 2, generator=generator(), u=u)
            products = [wide(a) @ wide(b).mH for a, b in (ours, dense)]
            assert (products[0] - products[1]).abs().max() < 1e3 * eps(dtype) * products[1].abs().max()


def dense_run(u, grads, retraction, lr, momentum=0.0, nesterov=False, second_moment=None, beta2=0.9):
    """The optimizer's formulas with steps of full rank."""
    m, v = torch.zeros_like(u), 0.0
    for t, g in enumerate(grads, 1):
        m = momentum * m + g
        d = g + momentum * m if nesterov else m
        if second_moment:
            square = g.abs().square()
            v = beta2 * v + (1 - beta2) * (square.mean((-2, -1), True) if second_moment == "scalar" else square)
            average = (1 - momentum) / (1 - momentum ** (t + nesterov))
            d = average * d / (v / (1 - beta2**t)).sqrt()
        u = dense_step(u, -lr * d, retraction)
    return u


MODES = (
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"second_moment": "scalar"},
    {"second_moment": "elementwise"},
    {"second_moment": "scalar", "momentum": 0.8},
    {"second_moment": "elementwise", "momentum": 0.8, "nesterov": True},
)


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128), ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes_follow_their_formulas(mode, dtype):
    """At full rank, against dense matrix_exp and SVD: 1e-13 after four steps, stacks and tall ones included."""
    for retraction, shape in (("tangent", (2, 7, 7)), ("direct", (7, 7)), ("direct", (9, 4))):
        u = haar(*shape, dtype=dtype)
        grads = torch.randn(4, *shape, dtype=dtype) * torch.logspace(0, -2, 4, dtype=dtype)[:, None, None].reshape(
            4, *[1] * len(shape)
        )
        p = nn.Parameter(u.clone())
        steps(ProjUNN([p], 0.05, rank=99, retraction=retraction, beta2=0.9, eps=0.0, **mode), [p], [[g] for g in grads])
        expected = dense_run(u, grads, retraction, 0.05, **mode)
        assert (p.detach() - expected).abs().max() < 1e-13, (retraction, shape)


@pytest.mark.parametrize("nesterov", (False, True))
def test_directions_are_those_of_torch(nesterov):
    """A first-order step of 1e-6 is the tangent part of torch.optim's SGD's and Adam's."""
    theirs = {
        "SGD": lambda w: torch.optim.SGD([w], 1e-6, momentum=0.9, nesterov=nesterov),
        "Adam": lambda w: torch.optim.Adam([w], 1e-6, (0.9, 0.99), eps=1e-12),
    }
    for name, kind in (("SGD", None), *((("Adam", "elementwise"),) if not nesterov else ())):
        u, grads = haar(6, 6), torch.randn(5, 6, 6).double()
        p, w = nn.Parameter(u.clone()), nn.Parameter(u.clone())
        ours = ProjUNN([p], 1e-6, 6, momentum=0.9, nesterov=nesterov, second_moment=kind)
        steps(ours, [p], [[g] for g in grads])
        steps(theirs[name](w), [w], [[g] for g in grads])
        e = (w - u).detach()
        tangent = e - u @ (u.mT @ e + e.mT @ u) / 2
        assert ((p - u).detach() - tangent).abs().max() < 1e-9


def test_the_second_moment_of_complex_gradients_is_of_their_modulus():
    """g^2 was taken for |g|^2, so the phase of a gradient mattered; here it is real, and a phase passes through."""
    g = torch.randn(8, 8, dtype=torch.complex128)
    phase = torch.polar(torch.tensor(1.0).double(), torch.tensor(1.1).double())
    for kind in ("scalar", "elementwise"):
        ends = []
        for turn in (1, phase):
            p = nn.Parameter(torch.eye(8, dtype=torch.complex128) * turn)
            optimizer = ProjUNN([p], 0.01, 8, second_moment=kind, beta2=0.9)
            steps(optimizer, [p], [[turn * g], [0.5 * turn * g.conj()]])
            v = optimizer.state[p]["square_avg"]
            expected = (0.09 + 0.025) * g.abs().square()
            torch.testing.assert_close(v, expected.mean()[None, None] if kind == "scalar" else expected)
            ends.append(p.detach() / turn)
        assert not v.is_complex() and (ends[0] - ends[1]).abs().max() < 1e-13, kind


def test_a_scalar_second_moment_leaves_the_scale_out():
    """The same steps from gradients of 1, 8e-8 and 1e-9 of the size; 1e-25 and zero move to no NaN."""
    ends = []
    u, g = haar(10, 10, dtype=torch.float32), torch.randn(3, 10, 10)
    for scale in (1.0, 8e-8, 1e-9):
        p = nn.Parameter(u.clone())
        steps(ProjUNN([p], 0.01, 2, second_moment="scalar", momentum=0.5), [p], [[scale * x] for x in g])
        ends.append(p.detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-4 * (ends[0] - u).abs().max()
    assert (ends[0] - ends[2]).abs().max() < 1e-2 * (ends[0] - u).abs().max()
    for scale, kind in itertools.product((1e-25, 0.0), (None, "scalar", "elementwise")):
        p = nn.Parameter(u.clone())
        steps(ProjUNN([p], 0.01, 2, second_moment=kind), [p], [[scale * x] for x in g])
        assert orthogonality_error(p) < 1e-6, (scale, kind)
        assert scale or torch.equal(p, u)


@pytest.mark.parametrize("retraction", ("tangent", "direct", "cayley"))
def test_rank_one_in_double_precision(retraction):
    """k = 1 went through complex64, at 1e-9 per step: here 300 steps keep 1e-14 sqrt(300)."""
    for dtype in (torch.float64, torch.complex128):
        p = nn.Parameter(haar(24, 24, dtype=dtype))
        optimizer = ProjUNN([p], 0.02, retraction=retraction, reorthogonalize_every=None)
        for _ in range(300):
            steps(optimizer, [p], [[torch.randn(24, 24, dtype=dtype)]])
        assert p.dtype == dtype and orthogonality_error(p) < 3e-14


@pytest.mark.parametrize("retraction", ("tangent", "direct", "cayley"))
def test_degenerate_spectra_stay_on_the_manifold(retraction):
    """Nearly equal eigenvalues threw a rank-4 direct step .22 off: gradients U + tiny, zero columns, equal values."""
    for dtype in (torch.float32, torch.complex64):
        u = haar(4, 32, 32, dtype=dtype)
        left, right = haar(32, 4, dtype=dtype), haar(32, 4, dtype=dtype)
        g = torch.stack([left @ right.mH, u[1] @ right @ right.mH, -u[2] @ left @ left.mH, u[3]])
        p = nn.Parameter(u.clone())
        nearly = [[g * (1 + 1e-7 * torch.randn(1)) + 1e-7 * torch.randn_like(g)] for _ in range(5)]
        steps(ProjUNN([p], 0.3, 4, retraction=retraction, reorthogonalize_every=None), [p], nearly)
        assert orthogonality_error(p).max() < 5e-7


@pytest.mark.parametrize("kind", ("scalar", "elementwise"))
def test_a_zero_gradient_moves_nothing(kind):
    p = nn.Parameter(haar(6, 6, dtype=torch.float32))
    start, p.grad = p.detach().clone(), torch.zeros_like(p)
    ProjUNN([p], 0.1, second_moment=kind, momentum=0.9, eps=0.0).step()
    assert torch.equal(p, start)


def test_projections_by_name():
    u, a, b = haar(9, 9), 0.1 * torch.randn(9, 2).double(), torch.randn(9, 2).double()
    for project, retraction in ((optim.project_direct_, "direct"), (optim.project_tangent_, "tangent")):
        moved = u.clone()
        assert project(moved, a, b) is moved
        assert (moved - dense_step(u, a @ b.mT, retraction, riemannian=False)).abs().max() < 1e-13
