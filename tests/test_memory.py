"""What a call allocates, counted by torch's profiler, and what it leaves behind."""

import sys

import cases
import pytest
import torch
from memory import allocated, resident

SMALL = 64 << 10  # bytes, per view and slice, beside 4 numbers per row and column


def allowed(op_name, shape, dtype):
    """(workspace, gradients) in bytes: an N x D fp32 workspace and min(N, D)^2 numbers per view and slice."""
    op, (*stack, n, d) = cases.OPS[op_name], shape
    slices = op.inputs * torch.Size(stack).numel()
    grams = slices // 2 if op_name == "cross_correlation" and n >= op.threshold * d else slices
    workspace = 4 * (slices * n * d + grams * min(n, d) ** 2) + slices * (SMALL + 16 * (n + d))
    return workspace, slices * n * d * dtype.itemsize


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((256, 4096), (3000, 300), (4, 200, 600), (600, 600)), ids=str)
@pytest.mark.parametrize("op_name", cases.OPS)
def test_extra_memory(op_name, shape, dtype, native):
    """Beside inputs and gradients no more than `allowed`, at any moment of forward, backward and forward alone."""
    op = cases.OPS[op_name]
    workspace, gradients = allowed(op_name, shape, dtype)
    views = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(op.inputs)]
    weights = [torch.ones_like(out) for out in op.call(*views)]

    def training():
        return torch.autograd.grad(op.call(*views), views, weights)

    def inference():
        with torch.no_grad():
            return op.call(*views)

    peak, left = allocated(training)
    assert gradients <= peak <= workspace + gradients
    assert left <= gradients + SMALL
    peak, left = allocated(inference)
    assert peak <= workspace
    assert left <= sum(out.numel() * out.element_size() for out in inference()) + SMALL


def test_the_count_sees_workspaces():
    """A temporary and a result count as such."""
    peak, left = allocated(lambda: torch.empty(1000, 1000).add(1))
    assert 8_000_000 <= peak < 8_100_000 and 4_000_000 <= left < 4_100_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("op_name", cases.OPS)
def test_no_leak(op_name, native):
    """1,000 calls, with and without a backward, do not grow the process: one N x D kept per call would be 24 MB."""
    op = cases.OPS[op_name]
    views = [torch.randn(64, 96).requires_grad_() for _ in range(op.inputs)]

    def calls(count):
        for index in range(count):
            outputs = op.call(*views)
            if index % 2:
                torch.autograd.grad([out.sum() for out in outputs], views)

    calls(100)
    before = resident()
    calls(1000)
    assert resident() - before < 4 << 20
