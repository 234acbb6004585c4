"""Products of fp32 matrices as six products of bf16 planes. That they are as exact on tensor cores is in
`test_tensor_core.py`."""

import pytest
import torch
from conftest import available

pytest.importorskip("triton", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton():
    available("triton")


@pytest.fixture
def by_six(monkeypatch):
    """Products of fp32 are those of bf16 planes, as large ones are on a GPU for data centres."""
    from sslkern.triton_kernels import gemm

    monkeypatch.setattr(gemm, "planes_win", lambda x, y: True)


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
    given = torch.Generator().manual_seed(m)

    def matrix(rows, columns):
        if layout == "rows":
            return torch.randn(rows, columns, generator=given)
        if layout == "columns":
            return torch.randn(columns, rows, generator=given).mT
        return torch.randn(rows, 2 * columns, generator=given)[:, ::2]

    x, y, out = matrix(m, k), matrix(k, n), torch.empty(1, m, n)
    gemm.multiply(x[None], y[None], out, k)
    torch.testing.assert_close(out[0].double(), x.double() @ y.double(), rtol=1e-5, atol=1e-6 * k**0.5)
    gemm.multiply(x[None], x.mT[None], square := torch.empty(1, m, m), k)  # whose planes are cut once
    torch.testing.assert_close(square[0].double(), x.double() @ x.double().mT, rtol=1e-5, atol=1e-6 * k**0.5)


def test_which_products_take_planes(monkeypatch):
    """Large ones, on GPUs for data centres; the fake ones of this test have sizes and a device alone."""
    from sslkern.triton_kernels import gemm

    class Fake:
        def __init__(self, *shape, device="cuda"):
            self.shape, self.is_cuda, self.device = shape, device == "cuda", device

    for capability, wins in (((9, 0), True), ((8, 0), True), ((10, 0), True), ((8, 9), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert gemm.planes_win(Fake(2048, 8192), Fake(8192, 2048)) == wins
        assert not gemm.planes_win(Fake(256, 8192), Fake(8192, 256))
        assert not gemm.planes_win(Fake(2048, 8192, device="cpu"), Fake(8192, 2048, device="cpu"))
