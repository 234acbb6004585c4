"""Rank-k updates against dense polar factors, exponentials and Cayley transforms, and where those go wrong."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import available, running_on
from simulator import Unavailable
from simulator import rank_k_update as simulated
from torch.profiler import ProfilerActivity, profile

import sslkern
from sslkern.ops import rank_k_update_
from sslkern.optim import orthogonality_error, reorthogonalize_

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


def skip_simulator(backend, reason="too slow; its own tests are below"):
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


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_dense_formulas(dtype, retraction, backend):
    """1e-13 in double, 1e-7 in single precision, square and tall, batched, k from 1 to 3 p, odd sizes."""
    skip_simulator(backend)
    single = dtype in (torch.float32, torch.complex64)
    for shape in ((1, 1), (2, 2), (37, 37), (64, 64), (300, 300), (3, 20, 20), (2, 2, 5, 5), (40, 17), (5, 270, 1)):
        if retraction == "tangent" and shape[-1] != shape[-2]:
            continue
        u = orthonormal(*shape, dtype=dtype)
        before = error(u)
        for index, k in enumerate(k for k in (1, 2, 3, 4, 5, 16, 32, 64) if k <= 3 * shape[-1]):
            sizes = (1e-6, 1e-4, 0.05, 0.5)
            for size in sizes[index % 4 :: 4] if shape[-1] > 50 or index % 2 else sizes:  # most take one, in turn
                a, b = step_of(size, *shape, k=k, dtype=dtype)
                new = rank_k_update_(u.clone(), a, b, retraction)
                limit = 4e-7 if single else 1e-13
                off, drift = away(new, dense(u, a, b, retraction)), error(new) - before
                assert off < limit and drift < limit, (shape, k, size, off, drift)


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large_steps(dtype, retraction, backend):
    """Steps of 3 and 30: the polar factor as well as the condition of U + a b^H allows, which is up to 1e4 here."""
    skip_simulator(backend)
    for shape in ((40, 40), (130, 130)):
        u = orthonormal(*shape, dtype=dtype)
        for k in (1, 4, 16):
            for size in (3, 30):
                a, b = step_of(size, *shape, k=k, dtype=dtype)
                new = rank_k_update_(u.clone(), a, b, retraction)
                limit = 1e-14 * (float(torch.linalg.cond(u + a @ b.mH)) if retraction == "direct" else 30)
                assert away(new, dense(u, a, b, retraction)) < limit and error(new) < limit, (shape, k, size)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_orders(dtype, backend):
    """Direct and tangent differ by O(step^2), tangent and Cayley by O(step^3): 10 times shorter, 100 and 1000 less."""
    u = orthonormal(50, 50, dtype=dtype)
    a, b = step_of(0.02, 50, 50, k=3, dtype=dtype)
    apart = []
    for share in (1, 0.1):
        t, d, c = (rank_k_update_(u.clone(), share * a, b, retraction) for retraction in RETRACTIONS)
        apart.append((away(d, t), away(c, t)))
    (square, cube), (less_square, less_cube) = apart
    assert 80 < square / less_square < 120 and 800 < cube / less_cube < 1200


def test_a_normal_direction_moves_nothing(backend):
    """a = U b H, H Hermitian, has no part in the tangent space."""
    for dtype in DTYPES[:2]:
        u, b, h = orthonormal(30, 30, dtype=dtype), torch.randn(30, 4, dtype=dtype), torch.randn(4, 4, dtype=dtype)
        new = rank_k_update_(u.clone(), 0.01 * u @ b @ (h + h.mH), b, "tangent")
        assert away(new, u) < 1e-14


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_degenerate_steps(dtype, retraction, backend):
    """Zero, tiny, equal, nearly equal columns, alone and beside others in a batch: no NaN, as orthogonal as before."""
    u = orthonormal(5, 40, 40, dtype=dtype)
    a, b = step_of(0.1, 5, 40, 40, k=4, dtype=dtype)
    a[0] = 0
    a[1], b[1] = 1e-25 * a[1], 1e-5 * b[1]
    a[2], b[2] = a[2, :, :1].clone(), b[2, :, :1].clone()
    a[3] = u[3] @ b[3] + 1e-6 * a[3]  # normal but for a millionth
    a[3] *= 0.02
    a[4, :, 1], b[4, :, 2] = 0, 0
    for k in (4, 1):
        new = rank_k_update_(u.clone(), a[..., :k].contiguous(), b[..., :k].contiguous(), retraction)
        assert error(new) < error(u) + (1e-14 if exact(u).dtype == dtype else 5e-7)
        assert away(new[:2], u[:2]) < 1e-7
        assert away(new, dense(u, a[..., :k], b[..., :k], retraction)) < (1e-13 if exact(u).dtype == dtype else 5e-7)


def test_single_precision_keeps_its_digits(backend):
    """k = 1 in complex64 and complex128: 100 steps stay as orthogonal as rounding allows, not 1e-9 a step away."""
    skip_simulator(backend)
    for dtype, limit in ((torch.complex128, 1e-13), (torch.float64, 1e-13), (torch.complex64, 2e-6)):
        u = orthonormal(24, 24, dtype=dtype)
        for _ in range(100):
            rank_k_update_(u, *step_of(0.1, 24, 24, k=1, dtype=dtype), "tangent")
        assert error(u) < limit


def test_in_place_wherever_u_lies(backend):
    """Transposed, strided, expanded steps and a slice of a stack: the same tensor, the rest of its memory untouched."""
    a, b = step_of(0.2, 20, 20, k=3, dtype=torch.float64)
    u = orthonormal(20, 20)
    expected = rank_k_update_(u.clone(), a, b)
    for view in (u.t().contiguous().t(), torch.zeros(40, 60, dtype=u.dtype)[::2, ::3].copy_(u)):
        assert rank_k_update_(view, a, b) is view
        assert torch.equal(view, expected)
    stack = torch.stack([u, u, u])
    rank_k_update_(stack[1], a, b)
    assert torch.equal(stack[1], expected) and torch.equal(stack[0], u) and torch.equal(stack[2], u)
    column = a[:, :1].expand(20, 3)
    torch.testing.assert_close(rank_k_update_(u.clone(), column, b), dense(u, column, b, "tangent"))


def test_conjugate_views(backend):
    """A U whose conjugate has not been taken yet is updated in place, too."""
    u = orthonormal(9, 9, dtype=torch.complex128)
    a, b = step_of(0.1, 9, 9, k=2, dtype=torch.complex128)
    stored = u.conj().resolve_conj()
    view = stored.conj()
    assert view.is_conj() and rank_k_update_(view, a, b) is view
    torch.testing.assert_close(stored.conj().resolve_conj(), rank_k_update_(u, a, b), rtol=0, atol=1e-14)


def test_compiled_without_a_graph_break(backend):
    """fullgraph=True: in place and with the numbers of eager, wherever u lies and conjugated or not."""
    if backend == "simulator":
        pytest.skip("a compiler's fake tensors have no numbers to simulate with")
    for dtype in (torch.float64, torch.complex128):
        u = orthonormal(9, 9, dtype=dtype)
        a, b = step_of(0.1, 9, 9, k=2, dtype=dtype)
        for view in (torch.Tensor.clone, lambda z: z.t().clone().t(), lambda z: z.clone().conj().resolve_conj().conj()):
            torch._dynamo.reset()
            compiled = torch.compile(rank_k_update_, fullgraph=True, backend="aot_eager")
            found = view(u)
            compiled(found, a, b)
            torch.testing.assert_close(found.resolve_conj(), rank_k_update_(u.clone(), a, b), rtol=0, atol=1e-14)


def test_drift_of_a_long_run(native):
    """In fp32 at N = 64: 1e4 steps without correction err by 4.7e-6 at most, 1e5 with it by 3e-7."""
    start, random = orthonormal(64, 64, dtype=torch.float32), torch.Generator()
    for every, steps, limit in ((None, 10_000, 4.7e-6), (32, 100_000, 3e-7)):
        u = start.clone()
        random.manual_seed(1)
        for step in range(1, steps + 1):
            a, b = torch.randn(2, 64, 1, generator=random) * 0.04
            rank_k_update_(u, a, b)
            if every and step % every == 0:
                reorthogonalize_(u, every, random)
        assert orthogonality_error(u) < limit, (every, orthogonality_error(u))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("retraction", RETRACTIONS[1:])
def test_tall_ones_are_read_in_shares(retraction, dtype, native):
    for (n, p), k in (((5000, 40), 16), ((3001, 6), 2), ((2049, 130), 5)):
        u = orthonormal(n, p, dtype=dtype)
        a, b = torch.randn(n, k, dtype=dtype) / n, torch.randn(p, k, dtype=dtype)
        with sslkern.backend.use("reference"):
            expected = rank_k_update_(u.clone(), a, b, retraction)
        new = rank_k_update_(u.clone(), a, b, retraction)
        assert away(new, expected) < 1e-14 and error(new) < 1e-13, (n, p, k)


def test_a_stack_is_its_slices(native):
    """Bit for bit, also on one thread."""
    threads = torch.get_num_threads()
    for shape, k in (((7, 33, 33), 2), ((3, 48, 20), 16), ((2, 600, 600), 5)):
        u, retraction = orthonormal(*shape, dtype=torch.float32), "direct"
        a, b = step_of(0.2, *shape, k=k, dtype=torch.float32)
        whole = rank_k_update_(u.clone(), a, b, retraction)
        torch.set_num_threads(1)
        try:
            for each, x, y, z in zip(whole, u, a, b, strict=True):
                assert torch.equal(rank_k_update_(x.clone(), y, z, retraction), each)
        finally:
            torch.set_num_threads(threads)


def test_no_dense_temporary(native):
    """k = 8 at N = 1000 asks torch for no memory: U is read and written where it lies."""
    u = orthonormal(1000, 1000, dtype=torch.float32)
    a, b = step_of(0.1, 1000, 1000, k=8, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        rank_k_update_(u, a, b)
    assert sum(max(0, e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]") < 1e5


def test_nan_comes_out(backend):
    """And nothing hangs; a step that is zero or has no columns leaves U bit for bit, or as it was."""
    for bad in (float("nan"), float("inf")):
        for retraction in RETRACTIONS:
            u = orthonormal(12, 12)
            a, b = step_of(0.1, 12, 12, k=2, dtype=u.dtype)
            a[3, 1] = bad
            assert rank_k_update_(u, a, b, retraction).isnan().any()
    u = orthonormal(12, 12)
    assert torch.equal(rank_k_update_(u.clone(), u[:, :0], u[:, :0]), u)
    assert torch.equal(rank_k_update_(u.clone(), 0 * u[:, :2], u[:, :2]), u)
    assert rank_k_update_(torch.zeros(0, 4, 4), torch.zeros(0, 4, 1), torch.zeros(0, 4, 1)).shape == (0, 4, 4)


def test_bad_arguments():
    """One sentence each, before U has changed."""
    u, a = torch.eye(4), torch.zeros(4, 2)
    cases = [
        ((u, a, a, "qr"), ValueError, r"retraction must be one of 'tangent', 'direct', 'cayley', got 'qr'"),
        (([1], a, a), TypeError, r"u must be a torch.Tensor, got list"),
        ((u[0], a, a), ValueError, r"u must have at least two dimensions, got shape \(4,\)"),
        ((u.bfloat16(), a, a), TypeError, r"u must be float32, float64, complex64 or complex128, got bfloat16"),
        ((u[:3], a, a), ValueError, r"u must have at least as many rows as columns, got shape \(3, 4\)"),
        ((u[:, :3], a, a), ValueError, r"u must be square for 'tangent', got shape \(4, 3\)"),
        ((u, a[:3], a), ValueError, r"a must have shape \(4, k\) for u of \(4, 4\), got \(3, 2\)"),
        ((u, a, a[:, :1]), ValueError, r"b must have shape \(4, k\) for u of \(4, 4\), got \(4, 1\)"),
        ((u[None], a, a), ValueError, r"a must have shape \(1, 4, k\) for u of \(1, 4, 4\), got \(4, 2\)"),
        ((u, a.double(), a), TypeError, r"a must have the dtype of u, float32, got float64"),
        ((u, a, a.to("meta")), ValueError, r"b and u must be on the same device, got meta and cpu"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            rank_k_update_(*arguments)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated: call it under torch.no_grad\(\)"):
        rank_k_update_(u, a.requires_grad_(), a)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated: call it under torch.no_grad\(\)"):
        torch.vmap(rank_k_update_)(u[None], a[None], a[None])  # of which a vmapped tensor does not tell
    assert torch.equal(u, torch.eye(4))


def test_a_graph_notices():
    """A backward through a U that has moved since raises, as with torch's own in-place operations."""
    u = torch.eye(4, requires_grad=True)
    loss = (u @ u).sum()
    with torch.no_grad():
        rank_k_update_(u, torch.ones(4, 1), torch.ones(4, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("gemm", ("avx2", "mm"))
def test_other_processors(gemm):
    """With AVX2's tiles, and with those in plain C++."""
    available("native")
    script = (
        "import torch, test_rank_k_update as t, sslkern;"
        "torch.manual_seed(0); u = t.orthonormal(70, 70, dtype=torch.complex64);"
        "a, b = t.step_of(.3, 70, 70, k=9, dtype=u.dtype);"
        "assert t.away(t.rank_k_update_(u.clone(), a, b, 'direct'), t.dense(u, a, b, 'direct')) < 4e-7"
    )
    environment = os.environ | {"SSLKERN_CPU_GEMM": gemm}
    run = subprocess.run([sys.executable, "-c", script], cwd=os.path.dirname(__file__), env=environment, text=True,
                         capture_output=True)  # fmt: skip
    assert run.returncode == 0, run.stderr


def simulate(u, a, b, retraction, path=None, order="random", **given):
    """A new U, by the CUDA kernels on the CPU."""
    new = u.clone()
    pick = simulated.kernels(order, path=path, **given)
    pick("rank_k_update_", new)(new, a, b, RETRACTIONS.index(retraction))
    return new


def simulated_step(*shape, k, dtype, size=0.05):
    torch.manual_seed(sum(shape) + k)
    return orthonormal(*shape, dtype=dtype), *step_of(size, *shape, k=k, dtype=dtype)


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
