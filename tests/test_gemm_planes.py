"""Products of fp32 matrices as six products of bf16 planes. That they are as exact on tensor cores is in
`test_tensor_core.py`."""

import pytest
import torch
import tritons
from conftest import INTERPRETED, available

pytest.importorskip("triton", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def triton():
    available("triton")


@pytest.mark.gpu
def test_planes_sum_to_the_matrix():
    """Highest first; in the layout of the matrix."""
    from sslkern.triton_kernels import gemm

    for x in (torch.randn(33, 70, device=DEVICE), torch.randn(70, 33, device=DEVICE).mT):
        planes = gemm.three_planes(x)
        assert planes.shape == (3, 33, 70) and (planes[0].stride(0) == 1) == (x.stride(0) == 1)
        assert torch.equal(planes[0], x.bfloat16())
        error = (planes.double().sum(0) - x.double()).abs()
        assert (error <= 2.0**-24 * x.abs()).all()


@pytest.mark.parametrize("shape", ((5, 1100, 3), (17, 33, 130), (1, 1, 1), (64, 512, 64)))
@pytest.mark.parametrize("layout", ("rows", "columns", "strided"))
def test_six_products_of_any_layout(shape, layout, by_six):
    from sslkern.triton_kernels import gemm

    m, k, n = shape

    def matrix(rows, columns):
        if layout == "rows":
            return torch.randn(rows, columns, device=DEVICE)
        if layout == "columns":
            return torch.randn(columns, rows, device=DEVICE).mT
        return torch.randn(rows, 2 * columns, device=DEVICE)[:, ::2]

    x, y, out = matrix(m, k), matrix(k, n), torch.empty(1, m, n, device=DEVICE)
    gemm.multiply(x[None], y[None], out, k)
    torch.testing.assert_close(out[0].double(), x.double() @ y.double(), rtol=1e-5, atol=1e-6 * k**0.5)
    gemm.multiply(x[None], x.mT[None], square := torch.empty(1, m, m, device=DEVICE), k)  # whose planes are cut once
    torch.testing.assert_close(square[0].double(), x.double() @ x.double().mT, rtol=1e-5, atol=1e-6 * k**0.5)


def test_which_products_take_planes(monkeypatch):
    """Large ones, on GPUs for data centres; the fake ones of this test have sizes and a device alone."""
    from sslkern.triton_kernels import gemm

    class Fake:
        def __init__(self, *shape, device="cuda"):
            self.shape, self.is_cuda, self.device = shape, device == "cuda", device

    fast = {"NVIDIA H100 80GB HBM3": (9, 0), "NVIDIA A100-SXM4-40GB": (8, 0), "NVIDIA B200": (10, 0)}
    others = {"NVIDIA H20": (9, 0), "NVIDIA GeForce RTX 4090": (8, 9), "NVIDIA GeForce RTX 5090": (12, 0)}
    for name, capability in (fast | others).items():
        wins = name in fast
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, n=name: n)
        assert gemm.planes_win(Fake(2048, 8192), Fake(8192, 2048)) == wins
        assert not gemm.planes_win(Fake(256, 8192), Fake(8192, 256))
        assert not gemm.planes_win(Fake(2048, 8192, device="cpu"), Fake(8192, 2048, device="cpu"))


def test_planes_of_many_rows_fit_a_grid(monkeypatch):
    """A matrix of a million rows has more programs than the second side of a grid takes."""
    from sslkern.triton_kernels import gemm

    grids = []

    class Noted:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(gemm, "three_planes_kernel", Noted())
    z = torch.empty(1, device="meta").expand(1_000_000, 2000)
    gemm.three_planes(z.as_strided(z.shape, (2000, 1)))
    assert tritons.fits((*grids[0], 1, 1)[:3]) and grids[0][0] > 2**16
