"""How far columns are from orthonormal, the way back, and drift."""

import itertools

import matrices
import pytest
import torch
from matrices import DTYPES, eps, haar, wide
from torch import nn

from sslkern.optim import ProjUNN, orthogonality_error, reorthogonalize_

everywhere = matrices.everywhere


def test_orthogonality_error_is_that_of_the_singular_values():
    """sqrt(mean (sigma^2 - 1)^2), in fp64 of any dtype; 1e-9 is seen in fp32's own numbers."""
    for dtype, shape in itertools.product(DTYPES, ((7, 7), (2, 3, 9, 4))):
        u = torch.randn(shape, dtype=dtype)
        sigma = torch.linalg.svdvals(wide(u))
        exact = (sigma.square() - 1).square().mean(-1).sqrt()
        found = orthogonality_error(u)
        assert found.dtype == torch.float64 and found.shape == shape[:-2]
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)
    assert orthogonality_error(torch.eye(64)) == 0
    assert orthogonality_error(haar(64, 64).bfloat16()) < 0.01
    for dtype in (torch.float32, torch.complex64):
        rounded = haar(512, 512, dtype=dtype)
        assert 2e-8 < orthogonality_error(rounded) < 8e-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ("highest", "medium"))
def test_reorthogonalize(precision, dtype):
    """All directions at once: e -> about e^2; q at a time, all in the end; square, tall, stacked, strided."""
    floor = 6e-8 if eps(dtype) > 1e-8 else 3e-15
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for shape in ((32, 32), (40, 24), (2, 3, 20, 20)):
            u = haar(*shape, dtype=dtype)
            u += 2e-3 * torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5
            strided = u.mT.contiguous().mT
            e = orthogonality_error(u).max()
            for target, q in ((u.clone(), None), (u.clone(), 1000), (strided, None)):
                assert reorthogonalize_(target, q) is target
                assert orthogonality_error(target).max() < 3 * e**2 + floor
                assert (target - u).abs().max() < 5e-3
                reorthogonalize_(reorthogonalize_(target, q), q)
                assert orthogonality_error(target).max() < 2 * floor
            few = u.clone()
            for _ in range(10 * shape[-1]):
                reorthogonalize_(few, 4)
            assert orthogonality_error(few).max() < 5 * floor
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128), ids=str)
def test_reorthogonalize_takes_the_error_in_the_span_of_q(dtype):
    """One direction of 16 takes 1 - (1 - 1/16)^2 of the squared error, in the mean over directions."""
    u = haar(16, 16, dtype=dtype) + 1e-5 * torch.randn(16, 16, dtype=dtype)
    shares = [(orthogonality_error(reorthogonalize_(u.clone(), 1)) / orthogonality_error(u)) ** 2 for _ in range(200)]
    assert abs(torch.stack(shares).mean() - (15 / 16) ** 2) < 0.02


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64), ids=str)
def test_drift(dtype):
    """1000 steps in fp32: a random walk of 4e-8 per step without correction, 4e-8 sqrt(N / 2) with it."""
    found = {}
    for every in (None, 32):
        p = nn.Parameter(haar(2, 48, 48, dtype=dtype))
        p.grad = torch.zeros_like(p)
        optimizer = ProjUNN([p], 0.1, reorthogonalize_every=every)
        for _ in range(1000):
            p.grad.copy_(torch.randn_like(p) / 48)
            optimizer.step()
        found[every] = float(orthogonality_error(p).max())
    assert found[None] < 1.5 * 4e-8 * 1000**0.5 and found[32] < 1.5 * 4e-8 * 24**0.5, found
    assert found[32] < found[None] / 4, found  # whose rounding depends on the machine
