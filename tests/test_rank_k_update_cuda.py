"""The CUDA kernels of rank-k updates, on the CPU's simulator, and on a GPU in a graph."""

import pytest
import rank_k
import torch
from rank_k import DTYPES, ORDERS, PATHS, RETRACTIONS, away, dense, exact, simulate, simulated_step
from simulator import rank_k_update as simulated

import sslkern
from sslkern.ops import rank_k_update_

simulator = rank_k.simulator


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simulated_kernels(dtype, retraction, simulator):
    """Both paths agree with dense formulas to the limits of the other back-ends, and with each other bit for bit."""
    cases = [
        ((1, 1), 1, 0.5),
        ((2, 2), 3, 0.05),
        ((37, 37), 5, 1e-4),
        ((70, 70), 16, 0.05),
        ((70, 70), 1, 3),
        ((40, 17), 3, 0.5),
        ((2, 2, 20, 20), 2, 0.05),
        ((1100, 3), 2, 0.05),
        ((41, 36), 33, 1e-3),
        ((66, 66), 64, 1e-3),
        ((48, 48), 5, 3),
    ]
    limit = 4e-7 if dtype in (torch.float32, torch.complex64) else 1e-13
    for index, (shape, k, size) in enumerate(cases):
        if retraction == "tangent" and shape[-1] != shape[-2]:
            continue
        u, a, b = simulated_step(*shape, k=k, dtype=dtype, size=size)
        news = [simulate(u, a, b, retraction, path, ORDERS[index % 3]) for path in PATHS]
        condition = float(torch.linalg.cond(exact(u) + exact(a) @ exact(b).mH).max()) if size > 1 else 1
        assert torch.equal(*news), (shape, k, size)
        assert away(news[0], dense(u, a, b, retraction)) < limit * max(1, condition / 10), (shape, k, size)


@pytest.mark.parametrize("path", PATHS, ids=("small", "large"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_of_threads_gives_the_same_bits(dtype, path, simulator):
    """Ascending, descending and random; the blocks' order as well."""
    for retraction, shape, k in zip(RETRACTIONS, ((140, 140), (67, 40), (2, 38, 38)), (6, 2, 10), strict=True):
        arguments = simulated_step(*shape, k=k, dtype=dtype, size=0.4)
        first, *others = (simulate(*arguments, retraction, path, order) for order in ORDERS)
        assert not first.isnan().any() and all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_memory_does_not_matter(retraction, simulator):
    """The same bits from addresses that no vector fits, with little shared memory, and from a slice of a stack."""
    for shape, k, dtype in (
        ((3, 40, 40), 7, torch.complex64),
        ((2, 64, 64), 4, torch.float64),
        ((2, 36, 36), 3, torch.float32),
    ):
        u, a, b = simulated_step(*shape, k=k, dtype=dtype)
        crooked = torch.empty(u.numel() + 1, dtype=dtype)[1:].view(shape).copy_(u)
        assert simulated.plan(u, a, b)["vectors"] and not simulated.plan(crooked, a, b)["vectors"]
        assert simulated.plan(u, a, b)["in_shared"] and not simulated.plan(u, a, b, 1 << 10)["in_shared"]
        for path in PATHS:
            expected = simulate(u, a, b, retraction, path)
            pick = simulated.kernels("random", path=path)
            pick("rank_k_update_", u)(crooked, a, b, RETRACTIONS.index(retraction))
            assert torch.equal(crooked, expected)
            crooked.copy_(u)
            assert torch.equal(simulate(u, a, b, retraction, path, shared=1 << 10), expected)
            assert torch.equal(simulate(u[1], a[1], b[1], retraction, path), expected[1])


@pytest.mark.parametrize(("dtype", "k"), ((torch.float32, 2), (torch.complex64, 6), (torch.float64, 1)), ids=str)
def test_tall_panels(dtype, k, simulator):
    """Of 32 rows, where there are many of them: the bits of 16."""
    u, a, b = simulated_step(64, 36, 36, k=k, dtype=dtype)
    together = [simulate(u, a, b, "direct", (False, count)) for count in (64, 3)]
    assert torch.equal(*together)


def test_many_columns(simulator):
    """More than K is summed up over at once."""
    u, a, b = simulated_step(1070, 1070, k=2, dtype=torch.float64)
    expected = u.clone()
    with sslkern.backend.use("reference"):
        rank_k_update_(expected, a, b, "cayley")
    assert away(simulate(u, a, b, "cayley"), expected) < 1e-14


def test_simulated_nan(simulator):
    """Comes out of every retraction and path, in its matrix alone; a zero step leaves every bit of U."""
    for retraction in RETRACTIONS:
        for path in PATHS:
            u, a, b = simulated_step(3, 20, 20, k=3, dtype=torch.float64)
            a[0, 3, 1], a[1] = float("nan"), 0
            new = simulate(u, a, b, retraction, path)
            assert new[0].isnan().any() and torch.equal(new[1], u[1])
            assert away(new[2], dense(u[2], a[2], b[2], retraction)) < 1e-13


def test_plans(simulator):
    """Many small matrices take a block each, large ones many blocks; rows of 4 numbers take vectors."""

    def plan(*shape, k=16, dtype=torch.float32, **given):
        empty = [torch.empty(size, dtype=dtype) for size in (shape, (*shape[:-1], k), (*shape[:-2], shape[-1], k))]
        return simulated.plan(*empty, **given)

    assert plan(512, 64, 64)["small"] and plan(300, 256, 256)["small"] and plan(128, 128)["small"]
    assert not plan(256, 256)["small"] and not plan(1000, 1000)["small"]
    assert (
        plan(128, 128)["vectors"]
        and not plan(127, 127)["vectors"]
        and plan(127, 127, dtype=torch.complex128)["vectors"]
    )
    large = plan(4096, 4096)
    assert large["tall"] and large["in_shared"] and large["splits"] == 8 and large["gathers"] == 32
    assert not plan(1024, 1024)["tall"] and plan(64, 512, 512)["tall"]
    assert plan(5000, 64, 64, k=1)["together"] == 1024 and plan(70, 300, 300, k=1)["together"] == 64
    for k in (1, 16, 64):  # what a block of an A100 may have is enough
        for dtype in DTYPES:
            for shape in ((300, 128, 128), (1024, 1024)):
                assert plan(*shape, k=k, dtype=dtype, shared=163 << 10)["shared"] <= 163 << 10, (k, dtype, shape)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Neither a synchronisation nor an allocation that a graph does not own: a replay has the bits of a call."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with sslkern.backend.use("native"):
        for shape, k in (((300, 64, 64), 4), ((700, 700), 16)):
            u, a, b = (t.cuda() for t in simulated_step(*shape, k=k, dtype=torch.float32))
            expected, new = rank_k_update_(u.clone(), a, b), u.clone()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                rank_k_update_(new, a, b)
            new.copy_(u)
            graph.replay()
            assert torch.equal(new, expected)
