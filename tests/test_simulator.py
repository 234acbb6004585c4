"""The simulator that runs CUDA kernels on a CPU: right kernels are right in every order, wrong ones are found out."""

from pathlib import Path

import numpy as np
import pytest
import simulator

ORDERS = (("ascending", 0), ("descending", 0), *(("random", seed) for seed in range(4)))
MISTAKES = {
    "returned": r"__syncthreads \(probe.cu:\d+\) for thread \(40, 0, 0\), which has returned",
    "other barrier": r"__syncthreads \(probe.cu:\d+\) for thread \(40, 0, 0\), which waits at __syncthreads",
    "at a shuffle": r"__syncthreads \(probe.cu:\d+\) for thread \(40, 0, 0\), which waits at __shfl_sync",
    "inactive lane": r"__shfl_sync \(probe.cu:\d+\) reads lane 8, which takes no part",
    "returned lane": r"thread \(30, 0, 0\): __shfl_down_sync \(probe.cu:\d+\) reads lane 31, which takes no part",
    "no caller": r"thread \(7, 0, 0\): __shfl_sync \(probe.cu:\d+\) has a mask without the thread that calls it",
    "other mask": r"waits at __syncwarp \(probe.cu:\d+\) for thread .* with another mask",
    "width": r"__shfl_sync \(probe.cu:\d+\) has a width that is no power of two",
    "stack": r"thread \(40, 0, 0\): more than 65536 bytes on its stack",
    "past shared": "wrote past the 16 bytes of its shared memory",
}


@pytest.fixture(scope="module")
def module():
    try:
        return simulator.build("probe", Path(simulator.__file__).parent / "probe.cu")
    except simulator.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1]}")
def probe(module, request):
    """The kernels, with threads and blocks in one of the orders."""
    module.set_order(*request.param)
    yield module
    module.set_order("ascending")


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def whole(*shape):
    """Numbers that every order of a sum adds up to the same bits."""
    return np.random.default_rng(0).integers(-99, 99, shape).astype(np.float32)


def block_sums(module, x, blocks=2, without=0):
    out = np.zeros_like(x)
    module.block_sums(blocks, x, out, without)
    return out


def row_sums(x):
    return np.broadcast_to(x.sum(1, keepdims=True), x.shape)


@pytest.mark.parametrize("threads", (1, 32, 64, 1024))
def test_reduction_in_shared_memory(probe, threads):
    x = whole(5, threads)
    np.testing.assert_array_equal(block_sums(probe, x), row_sums(x))


def test_launches_repeat(probe):
    x = normal(5, 128)
    np.testing.assert_array_equal(block_sums(probe, x), block_sums(probe, x))


@pytest.mark.parametrize("without", (1, 2, 3))
def test_missing_barrier_is_found(module, without):
    x, found = whole(5, 64), []
    for order in ORDERS:
        module.set_order(*order)
        found.append(not np.array_equal(block_sums(module, x, without=without), row_sums(x)))
    module.set_order("ascending")
    assert any(found)


@pytest.mark.parametrize("blocks", (1, 2, 37))
def test_last_block_sums_up(module, blocks):
    x, sums = normal(3000), []
    for order in ORDERS:
        module.set_order(*order)
        partial, out = np.zeros(blocks, np.float32), np.zeros(1, np.float32)
        module.grid_sum(blocks, x, partial, out)
        sums.append(out[0])
    module.set_order("ascending")
    assert sums[0] == pytest.approx(x.sum(dtype=np.float64), abs=1e-3)
    assert len(set(sums)) == 1


@pytest.mark.parametrize("dtype", ("float32", "float64", "int32", "uint32", "int64"))
@pytest.mark.parametrize(("by", "width"), ((1, 32), (5, 32), (3, 8), (9, 8)))
def test_shuffles(probe, dtype, by, width):
    x = whole(2, 32).astype(dtype)
    out = np.zeros((5, 2, 32), dtype)
    getattr(probe, f"shuffles_{dtype}")(by, width, x, out)
    lane = np.arange(32)
    begin = lane // width * width
    reads = (
        begin + by % width,
        np.where(lane - by < begin, lane, lane - by),
        np.where(lane + by < begin + width, lane + by, lane),
        np.where(lane ^ by < begin + width, lane ^ by, lane),
    )
    for read, got in zip(reads, out[:4], strict=True):
        np.testing.assert_array_equal(got, x[:, read])
    sums = x.reshape(2, -1, width).sum(-1, dtype=dtype)
    np.testing.assert_array_equal(out[4], np.repeat(sums, width, -1))


@pytest.mark.parametrize("x", (whole(32), np.ones(32), -np.ones(32), np.arange(32) % 2), ids=str)
def test_votes_of_two_groups_of_lanes(probe, x):
    out = np.zeros((3, 32), np.uint32)
    probe.votes(x.astype(np.float32), out)
    for first in (0, 1):
        ballot = sum(1 << int(lane) for lane in range(first, 32, 2) if x[lane] > 0)
        votes = (ballot, ballot != 0, ballot == (0xAAAAAAAA if first else 0x55555555))
        np.testing.assert_array_equal(out[:, first::2], np.broadcast_to(np.array(votes)[:, None], (3, 16)))


def test_atomics(probe):
    x = np.random.default_rng(0).integers(0, 10, (6, 50), np.int32)
    counts = np.zeros(10, np.int32)
    assert probe.atomics(x, counts) == (x.sum(), x.max(), 2 * x.size)
    np.testing.assert_array_equal(counts, np.bincount(x.ravel(), minlength=10))


def test_orders(module):
    def ranks(*order):
        out = np.zeros((20, 33), np.uint32)
        module.set_order(*order)
        module.ranks(out)
        return out.ravel().tolist()

    everyone = list(range(660))
    assert ranks("ascending") == everyone
    assert ranks("descending") == everyone[::-1]
    assert ranks("random", 1) == ranks("random", 1) != ranks("random", 2)
    assert sorted(ranks("random")) == everyone
    assert ranks("ascending") == everyone
    with pytest.raises(ValueError, match="sideways"):
        module.set_order("sideways")


def test_uninitialised_shared_memory_is_nan(probe):
    block_sums(probe, whole(5, 64))
    out = np.zeros(64, np.float32)
    probe.uninitialised(out)
    assert np.isnan(out).all()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported(probe, name):
    with pytest.raises(RuntimeError, match=r"block \(0, [01], 0\).*" + MISTAKES[name]):
        probe.mistake(name)
    assert probe.alive() == 0  # the fibers were unwound
    x = whole(5, 64)
    np.testing.assert_array_equal(block_sums(probe, x), row_sums(x))


def test_exception_in_a_kernel_reaches_the_launch(probe):
    with pytest.raises(IndexError, match="thrown in a kernel"):
        probe.mistake("thrown")
    assert probe.alive() == 0
    probe.mistake("none")


@pytest.mark.parametrize(
    ("grid", "block", "shared", "allowed", "valid"),
    (
        ((1, 1, 1), (1024, 1, 1), 0, 48 << 10, True),
        ((1, 1, 1), (32, 33, 1), 0, 48 << 10, False),
        ((1, 1, 1), (1, 1, 65), 0, 48 << 10, False),
        ((1, 1, 1), (0, 1, 1), 0, 48 << 10, False),
        ((0, 1, 1), (1, 1, 1), 0, 48 << 10, False),
        ((1, 65535, 1), (1, 1, 1), 0, 48 << 10, True),
        ((1, 65536, 1), (1, 1, 1), 0, 48 << 10, False),
        ((1, 1, 65536), (1, 1, 1), 0, 48 << 10, False),
        ((1 << 31, 1, 1), (1, 1, 1), 0, 48 << 10, False),
        ((1, 1, 1), (1, 1, 1), 48 << 10, 48 << 10, True),
        ((1, 1, 1), (1, 1, 1), (48 << 10) + 1, 48 << 10, False),
        ((1, 1, 1), (1, 1, 1), 227 << 10, 227 << 10, True),
    ),
)
def test_launch_limits(module, grid, block, shared, allowed, valid):
    error = "no error" if valid else "invalid configuration argument"
    assert module.limits(grid, block, shared, allowed) == ("no error", error, error, "no error")


def test_shared_memory_of_no_gpu(module):
    module.limits((1, 1, 1), (1, 1, 1), 0, 48 << 10)
    error = "invalid configuration argument"
    assert module.limits((1, 1, 1), (1, 1, 1), 228 << 10, 228 << 10) == ("invalid argument", error, error, "no error")


@pytest.mark.parametrize(
    ("array", "match"),
    (
        (np.zeros((2, 64)), "float32, got float64"),
        (np.zeros((2, 128), np.float32)[:, ::2], "contiguous"),
        (np.zeros((3, 64), np.float32), r"shape \[2, 64\], got \(3, 64\)"),
        (np.zeros(128, np.float32), r"shape \[2, 64\], got \(128,\)"),
        (np.broadcast_to(np.float32(0), (2, 64)), "contiguous"),
        (np.frombuffer(bytes(512), np.float32).reshape(2, 64), "written"),
    ),
    ids=("dtype", "strides", "shape", "rank", "broadcast", "read-only"),
)
def test_arrays_are_checked(module, array, match):
    with pytest.raises(ValueError, match=match):
        module.block_sums(1, whole(2, 64), array)


def test_static_shared_memory_does_not_compile(module):
    with pytest.raises(RuntimeError, match="cannot poison static shared memory"):
        simulator.build("bad", "#include <cuda_runtime.h>\n__global__ void bad() {\n  __shared__ float x[32];\n}\n")
