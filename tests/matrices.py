"""Matrices for tests of optimization over orthogonal and unitary ones, distances between them, and steps of them."""

import pytest
import torch

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
METHODS = ("sketch", "columns", "svd")


@pytest.fixture(autouse=True, params=("cpu", "cuda"))
def everywhere(request):
    """Tensors are made on a CPU, and on a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with torch.device(request.param):
        yield


def eps(dtype):
    return torch.finfo(dtype).eps


def wide(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def generator(seed=0):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def haar(*shape, dtype=torch.float64):
    """Orthonormal columns, to the last bit of dtype."""
    double = torch.complex128 if dtype.is_complex else torch.float64
    return torch.linalg.qr(torch.randn(shape, dtype=double)).Q.to(dtype)


def of_rank(rank, *shape, dtype=torch.float64):
    *stack, n, p = shape
    return torch.randn(*stack, n, rank, dtype=dtype) @ torch.randn(*stack, rank, p, dtype=dtype)


def error(left, right, g):
    """||left right^H - G||_F / ||G||_F, at most of a stack."""
    g = wide(g)
    rest = torch.linalg.matrix_norm(wide(left) @ wide(right).mH - g)
    return float((rest / torch.linalg.matrix_norm(g)).max())


def captured(left, right, g):
    """The share of the energy of G in its factors."""
    return 1 - error(left, right, g) ** 2


def steps(optimizer, params, grads):
    """One for each row of gradients, which has one, or None, for each parameter."""
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def dense_step(u, e, retraction, riemannian=True):
    """The retraction of U + E, in O(n^3)."""
    if retraction == "direct":
        inner = u.mH @ e
        e = e - u @ (inner + inner.mH) / 2 if riemannian else e
        s = torch.linalg.svd(u + e, full_matrices=False)
        return s.U @ s.Vh
    x = u.mH @ e
    return u @ torch.linalg.matrix_exp((x - x.mH) / 2)
