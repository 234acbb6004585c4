"""Rank-k updates against dense polar factors, exponentials and Cayley transforms, and where those go wrong."""

import os
import subprocess
import sys

import pytest
import rank_k
import torch
from conftest import available
from rank_k import DTYPES, RETRACTIONS, away, dense, error, exact, orthonormal, skip_simulator, step_of

import sslkern
from sslkern.ops import rank_k_update_
from sslkern.optim import orthogonality_error, reorthogonalize_

backend = rank_k.backend
simulator = rank_k.simulator


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_dense_formulas(dtype, retraction, backend):
    """1e-13 in double, 1e-7 in single precision, square and tall, batched, k from 1 to 3 p, odd sizes."""
    skip_simulator(backend)
    single = dtype in (torch.float32, torch.complex64)
    for shape in ((1, 1), (2, 2), (37, 37), (64, 64), (300, 300), (3, 20, 20), (2, 2, 5, 5), (40, 17), (5, 270, 1)):
        if retraction == "tangent" and shape[-1] != shape[-2]:
            continue
        u = orthonormal(*shape, dtype=dtype)
        before = error(u)
        for index, k in enumerate(k for k in (1, 2, 3, 4, 5, 16, 32, 64) if k <= 3 * shape[-1]):
            sizes = (1e-6, 1e-4, 0.05, 0.5)
            for size in sizes[index % 4 :: 4] if shape[-1] > 50 or index % 2 else sizes:  # most take one, in turn
                a, b = step_of(size, *shape, k=k, dtype=dtype)
                new = rank_k_update_(u.clone(), a, b, retraction)
                limit = 4e-7 if single else 1e-13
                off, drift = away(new, dense(u, a, b, retraction)), error(new) - before
                assert off < limit and drift < limit, (shape, k, size, off, drift)


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large_steps(dtype, retraction, backend):
    """Steps of 3 and 30: the polar factor as well as the condition of U + a b^H allows, which is up to 1e4 here."""
    skip_simulator(backend)
    for shape in ((40, 40), (130, 130)):
        u = orthonormal(*shape, dtype=dtype)
        for k in (1, 4, 16):
            for size in (3, 30):
                a, b = step_of(size, *shape, k=k, dtype=dtype)
                new = rank_k_update_(u.clone(), a, b, retraction)
                limit = 1e-14 * (float(torch.linalg.cond(u + a @ b.mH)) if retraction == "direct" else 30)
                assert away(new, dense(u, a, b, retraction)) < limit and error(new) < limit, (shape, k, size)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_orders(dtype, backend):
    """Direct and tangent differ by O(step^2), tangent and Cayley by O(step^3): 10 times shorter, 100 and 1000 less."""
    u = orthonormal(50, 50, dtype=dtype)
    a, b = step_of(0.02, 50, 50, k=3, dtype=dtype)
    apart = []
    for share in (1, 0.1):
        t, d, c = (rank_k_update_(u.clone(), share * a, b, retraction) for retraction in RETRACTIONS)
        apart.append((away(d, t), away(c, t)))
    (square, cube), (less_square, less_cube) = apart
    assert 80 < square / less_square < 120 and 800 < cube / less_cube < 1200


def test_a_normal_direction_moves_nothing(backend):
    """a = U b H, H Hermitian, has no part in the tangent space."""
    for dtype in DTYPES[:2]:
        u, b, h = orthonormal(30, 30, dtype=dtype), torch.randn(30, 4, dtype=dtype), torch.randn(4, 4, dtype=dtype)
        new = rank_k_update_(u.clone(), 0.01 * u @ b @ (h + h.mH), b, "tangent")
        assert away(new, u) < 1e-14


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_degenerate_steps(dtype, retraction, backend):
    """Zero, tiny, equal, nearly equal columns, alone and beside others in a batch: no NaN, as orthogonal as before."""
    u = orthonormal(5, 40, 40, dtype=dtype)
    a, b = step_of(0.1, 5, 40, 40, k=4, dtype=dtype)
    a[0] = 0
    a[1], b[1] = 1e-25 * a[1], 1e-5 * b[1]
    a[2], b[2] = a[2, :, :1].clone(), b[2, :, :1].clone()
    a[3] = u[3] @ b[3] + 1e-6 * a[3]  # normal but for a millionth
    a[3] *= 0.02
    a[4, :, 1], b[4, :, 2] = 0, 0
    for k in (4, 1):
        new = rank_k_update_(u.clone(), a[..., :k].contiguous(), b[..., :k].contiguous(), retraction)
        assert error(new) < error(u) + (1e-14 if exact(u).dtype == dtype else 5e-7)
        assert away(new[:2], u[:2]) < 1e-7
        assert away(new, dense(u, a[..., :k], b[..., :k], retraction)) < (1e-13 if exact(u).dtype == dtype else 5e-7)


def test_single_precision_keeps_its_digits(backend):
    """k = 1 in complex64 and complex128: 100 steps stay as orthogonal as rounding allows, not 1e-9 a step away."""
    skip_simulator(backend)
    for dtype, limit in ((torch.complex128, 1e-13), (torch.float64, 1e-13), (torch.complex64, 2e-6)):
        u = orthonormal(24, 24, dtype=dtype)
        for _ in range(100):
            rank_k_update_(u, *step_of(0.1, 24, 24, k=1, dtype=dtype), "tangent")
        assert error(u) < limit


def test_drift_of_a_long_run(native):
    """In fp32 at N = 64: 1e4 steps without correction err by 4.7e-6 at most, 1e5 with it by 3e-7."""
    start, random = orthonormal(64, 64, dtype=torch.float32), torch.Generator()
    for every, steps, limit in ((None, 10_000, 4.7e-6), (32, 100_000, 3e-7)):
        u = start.clone()
        random.manual_seed(1)
        for step in range(1, steps + 1):
            a, b = torch.randn(2, 64, 1, generator=random) * 0.04
            rank_k_update_(u, a, b)
            if every and step % every == 0:
                reorthogonalize_(u, every, random)
        assert orthogonality_error(u) < limit, (every, orthogonality_error(u))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("retraction", RETRACTIONS[1:])
def test_tall_ones_are_read_in_shares(retraction, dtype, native):
    for (n, p), k in (((5000, 40), 16), ((3001, 6), 2), ((2049, 130), 5)):
        u = orthonormal(n, p, dtype=dtype)
        a, b = torch.randn(n, k, dtype=dtype) / n, torch.randn(p, k, dtype=dtype)
        with sslkern.backend.use("reference"):
            expected = rank_k_update_(u.clone(), a, b, retraction)
        new = rank_k_update_(u.clone(), a, b, retraction)
        assert away(new, expected) < 1e-14 and error(new) < 1e-13, (n, p, k)


def test_a_stack_is_its_slices(native):
    """Bit for bit, also on one thread."""
    threads = torch.get_num_threads()
    for shape, k in (((7, 33, 33), 2), ((3, 48, 20), 16), ((2, 600, 600), 5)):
        u, retraction = orthonormal(*shape, dtype=torch.float32), "direct"
        a, b = step_of(0.2, *shape, k=k, dtype=torch.float32)
        whole = rank_k_update_(u.clone(), a, b, retraction)
        torch.set_num_threads(1)
        try:
            for each, x, y, z in zip(whole, u, a, b, strict=True):
                assert torch.equal(rank_k_update_(x.clone(), y, z, retraction), each)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("gemm", ("avx2", "mm"))
def test_other_processors(gemm):
    """With AVX2's tiles, and with those in plain C++."""
    available("native")
    script = (
        "import torch, rank_k as t; from sslkern.ops import rank_k_update_;"
        "torch.manual_seed(0); u = t.orthonormal(70, 70, dtype=torch.complex64);"
        "a, b = t.step_of(.3, 70, 70, k=9, dtype=u.dtype);"
        "assert t.away(rank_k_update_(u.clone(), a, b, 'direct'), t.dense(u, a, b, 'direct')) < 4e-7"
    )
    environment = os.environ | {"SSLKERN_CPU_GEMM": gemm}
    run = subprocess.run([sys.executable, "-c", script], cwd=os.path.dirname(__file__), env=environment, text=True,
                         capture_output=True)  # fmt: skip
    assert run.returncode == 0, run.stderr
