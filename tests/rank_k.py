"""Rank-k updates: what has the kernel, matrices and steps, the dense formulas, and the kernels on the simulator."""

import sys

import pytest
import torch
from conftest import running_on
from simulator import Unavailable
from simulator import rank_k_update as simulated

DTYPES = (torch.float64, torch.complex128, torch.float32, torch.complex64)
EXACT = {torch.float64: torch.float64, torch.float32: torch.float64}
RETRACTIONS = ("tangent", "direct", "cayley")
ORDERS = ("ascending", "descending", "random")
PATHS = ((True, 2), (False, 2))  # all steps in one kernel, or in several; two matrices of a stack at a time


@pytest.fixture(params=("reference", "native", "cuda", "simulator"))
def backend(request, monkeypatch):
    """What has the kernel: back-ends on the CPU, the CUDA kernels on a GPU, and these on the CPU's simulator."""
    if request.param == "simulator":
        request.getfixturevalue("simulator")
        picked = simulated.kernels("random")
        monkeypatch.setattr(sys.modules["sslkern.ops.rank_k_update"], "pick", picked)
        yield request.param
        return
    with running_on(request.param):
        yield request.param


@pytest.fixture
def simulator():
    """A compiler that makes the CUDA kernels run on the CPU."""
    try:
        return simulated.module()
    except Unavailable as reason:
        pytest.skip(str(reason))


def skip_simulator(backend, reason="too slow; test_rank_k_update_cuda.py has its own tests"):
    if backend == "simulator":
        pytest.skip(reason)


def exact(x):
    return x.to(EXACT.get(x.dtype, torch.complex128))


def orthonormal(*shape, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(shape, dtype=exact(torch.empty(0, dtype=dtype)).dtype))[0].to(dtype).contiguous()


def step_of(size, *shape, k, dtype):
    """a and b with a b^H of this spectral norm."""
    *batch, n, p = shape
    a, b = torch.randn(*batch, n, k, dtype=dtype), torch.randn(*batch, p, k, dtype=dtype)
    left, right = (torch.linalg.qr(exact(x), mode="r")[1] for x in (a, b))
    return a * (size / torch.linalg.matrix_norm(left @ right.mH, 2)[..., None, None]).to(a.real.dtype), b


def dense(u, a, b, retraction):
    """The same by O(N^3) textbook formulas in fp64."""
    if u.dim() > 2:  # one at a time: torch's batched LU errs after set_num_threads (its #142815)
        return torch.stack([dense(*matrices, retraction) for matrices in zip(u, a, b, strict=True)])
    u, e = exact(u), exact(a) @ exact(b).mH
    if retraction == "tangent":
        angles, vectors = torch.linalg.eigh(0.5j * (u.mH @ e - e.mH @ u))  # matrix_exp errs by 3e-11 at a norm of .03
        rotation = vectors * torch.exp(-1j * angles)[..., None, :] @ vectors.mH
        return u @ (rotation if u.is_complex() else rotation.real)
    if retraction == "direct":
        left, _, right = torch.linalg.svd(u + e, full_matrices=False)
        return left @ right
    one = torch.eye(u.shape[-2], dtype=u.dtype)
    project = one - u @ u.mH / 2
    skew = project @ e @ u.mH - u @ e.mH @ project
    return torch.linalg.solve(one - skew / 2, (one + skew / 2) @ u)


def away(x, y):
    """Largest distance of a batch, ||x - y||_F / sqrt(p)."""
    return float(torch.linalg.matrix_norm(exact(x) - exact(y)).max()) / x.shape[-1] ** 0.5


def error(u):
    return away(exact(u).mH @ exact(u), torch.eye(u.shape[-1], dtype=exact(u).dtype).expand(*u.shape[:-2], -1, -1))


def simulate(u, a, b, retraction, path=None, order="random", **given):
    """A new U, by the CUDA kernels on the CPU."""
    new = u.clone()
    pick = simulated.kernels(order, path=path, **given)
    pick("rank_k_update_", new)(new, a, b, RETRACTIONS.index(retraction))
    return new


def simulated_step(*shape, k, dtype, size=0.05):
    torch.manual_seed(sum(shape) + k)
    return orthonormal(*shape, dtype=dtype), *step_of(size, *shape, k=k, dtype=dtype)
