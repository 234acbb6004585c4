"""The CUDA kernels of skinny products, on the CPU's simulator, and on a GPU in a graph."""

import pytest
import torch
from simulator import Unavailable
from simulator import skinny_products as simulated
from simulator.skinny_products import skinny_products as simulate

import sslkern
from sslkern.ops import skinny_products
from sslkern.reference import skinny_products as reference

DTYPES = (torch.float64, torch.complex128, torch.float32, torch.complex64)
ORDERS = ("ascending", "descending", "random")
# (..., n, p), m, k: one block or several along rows, columns and the columns of right and left; tiles that are not full
CASES = (
    ((1, 1), 1, 1),
    ((3, 5), 2, 3),
    ((64, 64), 16, 16),
    ((2, 3, 20, 33), 17, 0),
    ((37, 300), 5, 3),
    ((140, 290), 5, 4),
    ((130, 520), 0, 33),
    ((150, 12), 70, 70),
    ((3, 300, 40), 7, 20),
    ((5, 2100), 4, 1),
    ((1, 7, 3), 1, 65),
    ((4500, 9), 2, 16),
)


@pytest.fixture(autouse=True)
def simulator(request):
    """A compiler that makes the CUDA kernels run on the CPU."""
    if request.node.get_closest_marker("gpu"):
        return
    try:
        simulated.module()
    except Unavailable as reason:
        pytest.skip(str(reason))


def given(shape, m, k, dtype):
    *stack, n, p = shape
    return [torch.randn(*stack, *size, dtype=dtype) for size in ((n, p), (p, m), (n, k))]


def exact(x, right, left):
    """Both products in numpy's long double, which has 11 more bits than fp64 on most machines."""
    x, right, left = (t.numpy().astype("clongdouble" if t.is_complex() else "longdouble") for t in (x, right, left))
    return x @ right, x.swapaxes(-1, -2).conj() @ left


def same(found, expected):
    """Whether both products have the same bits."""
    return all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simulated_kernels(dtype):
    """At most 4 times the error of plain torch, plus 8 eps of the largest product."""
    for index, (shape, m, k) in enumerate(CASES):
        arguments = given(shape, m, k, dtype)
        found = simulate(*arguments, ORDERS[index % 3])
        for y, plain, z in zip(found, reference.skinny_products(*arguments), exact(*arguments), strict=True):
            assert y.shape == plain.shape and y.dtype == dtype
            if y.numel():
                error, of_plain = (abs(t.numpy() - z).max() for t in (y, plain))
                assert error <= 4 * of_plain + 8 * torch.finfo(dtype).eps * abs(z).max(), (shape, m, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_of_threads_gives_the_same_bits(dtype):
    """Ascending, descending and random; the blocks' order as well."""
    for shape, m, k in (((140, 290), 5, 4), ((2, 260, 24), 20, 18)):
        arguments = given(shape, m, k, dtype)
        plan = simulated.plan(*arguments)
        assert plan["splits"] > 1 and (plan["strips"] if len(shape) == 2 else plan["groups"]) > 1
        first, *others = (simulate(*arguments, order) for order in ORDERS)
        assert not any(y.isnan().any() for y in first) and all(same(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_does_not_matter(dtype):
    """The same bits from an address that no vector fits, from a slice of a stack, and in several launches."""
    for shape, m, k in (((3, 150, 300), 3, 2), ((3, 40, 64), 20, 9)):
        x, right, left = given(shape, m, k, dtype)
        expected = simulate(x, right, left)
        crooked = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(shape).copy_(x)
        assert simulated.plan(x, right, left)["vectors"]
        if dtype != torch.complex128:  # each of its elements is a vector
            assert not simulated.plan(crooked, right, left)["vectors"]
        assert same(simulate(crooked, right, left), expected)
        assert same(simulate(x[1], right[1], left[1]), [y[1] for y in expected])
        assert same(simulate(x, right, left, limit=1), expected)
    assert simulated.plan(*given((3, 150, 300), 3, 2, dtype), limit=1)["together"] == 1


def test_simulated_nan():
    """Only in the row, column or matrix that it belongs to, also beside elements that are not there."""
    for dtype in (torch.float32, torch.complex64):
        for place in range(3):
            arguments = given((2, 70, 300), 5, 3, dtype)
            arguments[place][1, 33, 2] = float("nan")
            x_right, x_left = (y.isnan() for y in simulate(*arguments))
            expected = [torch.zeros_like(y) for y in (x_right, x_left)]
            if place == 0:
                expected[0][1, 33], expected[1][1, 2] = True, True
            else:
                expected[place - 1][1, :, 2] = True
            assert same((x_right, x_left), expected), (dtype, place)


def test_no_columns():
    """On neither side."""
    arguments = given((2, 40, 30), 0, 0, torch.float32)
    assert [tuple(y.shape) for y in simulate(*arguments)] == [(2, 40, 0), (2, 30, 0)]


def test_plans():
    """A large matrix takes 256 blocks, a small one a block, a tall one warps below each other; no block takes more
    shared memory than any GPU since sm_80 has, and two fit where there are 228 KB."""

    def plan(*shape, m=16, k=16, dtype=torch.float32):
        *stack, n, p = shape
        return simulated.plan(*(torch.empty(*stack, *size, dtype=dtype) for size in ((n, p), (p, m), (n, k))))

    large = plan(4096, 4096)
    assert (large["across"], large["strips"], large["splits"], large["passes"]) == (8, 16, 16, 1) and not large["wide"]
    assert large["partial"] == 2 * 16 * 4096 * 16 * 4
    small = plan(512, 64, 64)
    assert (small["across"], small["groups"], small["strips"], small["splits"]) == (2, 2, 1, 1)
    assert small["together"] == 512 and small["partial"] == 0
    tall = plan(1 << 20, 16)
    assert (tall["across"], tall["groups"], tall["strips"]) == (1, 8, 1) and tall["splits"] == 256
    assert plan(1 << 20, 256)["per_split"] == 2048, "the longest sum"
    assert plan(70_000, 1, 1)["together"] == 65535, "blocks that a grid may have"
    assert plan(64, 64)["vectors"] and not plan(64, 63)["vectors"] and plan(64, 63, dtype=torch.complex128)["vectors"]
    for k in (1, 16, 64):
        for dtype in DTYPES:
            for shape in ((4096, 4096), (64, 64), (9, 2000, 3)):
                assert plan(*shape, k=k, dtype=dtype)["shared"] <= 99 << 10, (k, dtype, shape)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Neither a synchronisation nor an allocation that a graph does not own: a replay has the bits of a call."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with sslkern.backend.use("native"):
        for shape, m, k in (((300, 64, 64), 4, 4), ((700, 900), 16, 16), ((2000, 300), 0, 40)):
            arguments = [t.cuda() for t in given(shape, m, k, torch.float32)]
            expected = skinny_products(*arguments)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                new = skinny_products(*arguments)
            for y in new:
                y.fill_(float("nan"))
            graph.replay()
            assert same(new, expected)
