"""Many rows of few columns: lanes take rows side by side, and partial sums of many programs are merged."""

import cases
import pytest
import torch
from rules import complaints

ROWS, COLUMNS = 271, 19  # three programs, of 128 rows in 4 strands; the second slice of a stack starts anywhere


@pytest.fixture
def merging(backend, monkeypatch):
    """As for a hundred times as many rows, where more than 32 programs share a column."""
    if backend == "triton":
        walk = pytest.importorskip("sslkern.triton_kernels.column_walk")
        monkeypatch.setattr(walk, "CHUNKS", 2)
        assert walk.tiling(torch.empty(ROWS, COLUMNS)).chunks == 3
    return backend


@pytest.mark.parametrize("op_name", cases.OPS)
def test_values_and_gradients_follow_fp64(op_name, merging, device, monkeypatch):
    monkeypatch.setitem(cases.CASES, "tall, folded", cases.Case((ROWS, COLUMNS)))
    found = complaints(op_name, "tall, folded", torch.float32, device)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("op_name", cases.OPS)
def test_a_slice_in_any_layout_has_the_bits_of_the_stack(op_name, merging, device):
    if merging == "reference":
        pytest.skip("torch's reductions do not promise it")
    op = cases.OPS[op_name]
    stack = [torch.randn(2, ROWS, COLUMNS, device=device) for _ in range(op.inputs)]
    outputs, grads = cases.value_and_grad(op.call, stack)
    alone, alone_grads = cases.value_and_grad(op.call, [x[1].mT.contiguous().mT for x in stack])
    assert all(torch.equal(whole[1], part) for whole, part in zip(outputs, alone, strict=True))
    assert all(torch.equal(whole[1], part) for whole, part in zip(grads, alone_grads, strict=True))


def test_gram_by_chunks_of_rows():
    """As near to fp64 as one GEMM, with the bits of a slice alone."""
    gemm = pytest.importorskip("sslkern.triton_kernels.gemm")
    launch = pytest.importorskip("sslkern.triton_kernels.launch")
    for n, d in ((1024 * 5 + 3, 5), (1024 * 16, 16)):
        z = launch.pitched(torch.empty(0), 2, n, d).copy_(torch.randn(2, n, d))
        gram, truth = gemm.symmetric_product(z, n, d, False), z.double().mT @ z.double()
        error, plain = ((x - truth).abs().max() for x in (gram, z.mT @ z))
        assert error <= 4 * plain + 8 * 2.0**-23 * truth.abs().max()
        alone = launch.pitched(torch.empty(0), 1, n, d).copy_(z[1:])
        assert torch.equal(gemm.symmetric_product(alone, n, d, False)[0], gram[1])
