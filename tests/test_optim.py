"""ProjUNN against dense fp64 truths: its formulas, states, options and refusals."""

import copy
import io
import itertools

import pytest
import torch
from matrices import DTYPES, METHODS, eps, error, everywhere, generator, haar, wide  # noqa: F401
from torch import nn

from sslkern import optim
from sslkern.optim import ProjUNN, linear_factors, low_rank_factors, orthogonality_error, reorthogonalize_


def steps(optimizer, params, grads):
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


CASES = [
    *(("tangent", shape, dtype) for shape in ((16, 16), (3, 12, 12)) for dtype in (torch.float64, torch.complex64)),
    *((retraction, shape, dtype) for retraction in ("direct", "cayley") for shape in ((16, 16), (24, 10), (2, 14, 6))
      for dtype in (torch.float32, torch.complex128)),
]  # fmt: skip


def solve(shape, dtype, **options):
    """Procrustes' problem by 300 steps: the distance to the polar factor of B A^H, and the parameter."""
    p = shape[-1]
    start = haar(*shape, dtype=dtype)
    turn = torch.linalg.matrix_exp(0.5 * torch.randn(*shape[:-2], shape[-2], shape[-2], dtype=dtype).triu(1))
    turn = torch.linalg.svd(turn)
    target = (turn.U @ turn.Vh) @ start  # in the component of the start, where there are two
    a = haar(*shape[:-2], p, p, dtype=dtype) * (1 + torch.rand(p, dtype=dtype.to_real()))
    b = target @ a + 0.05 * torch.randn(shape, dtype=dtype)
    best = torch.linalg.svd(wide(b) @ wide(a).mH, full_matrices=False)
    u = nn.Parameter(start)
    optimizer = ProjUNN([u], 0.05, rank=4, momentum=0.5, **options)
    for _ in range(300):
        optimizer.zero_grad()
        (u @ a - b).abs().square().sum().backward()
        optimizer.step()
    return torch.linalg.matrix_norm(wide(u.detach()) - best.U @ best.Vh).max() / p**0.5, u


@pytest.mark.parametrize("retraction, shape, dtype", CASES, ids=str)
def test_procrustes(retraction, shape, dtype):
    """min ||U A - B||_F ends at the polar factor of B A^H, by steps of rank 4 with momentum."""
    distance, u = solve(shape, dtype, retraction=retraction)
    assert distance < (1e-6 if eps(dtype) > 1e-8 else 1e-12)
    assert orthogonality_error(u).max() < (3e-7 if eps(dtype) > 1e-8 else 1e-14)


def test_many_small_blocks():
    """As in orthogonal fine-tuning: 1,000 steps of 8 blocks end within 1e-6; Cayley maps by Neumann series, past .1."""
    skew = torch.randn(8, 32, 32) / 32**0.5
    target = torch.linalg.matrix_exp(skew - skew.mT)
    x = torch.randn(8, 32, 128)
    y = target @ x
    u = nn.Parameter(torch.eye(32).repeat(8, 1, 1))
    optimizer = ProjUNN([u], 0.02, rank=4, momentum=0.9, second_moment="scalar")
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 1000)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (u @ x - y).square().mean()
        loss.backward()
        optimizer.step()
        decay.step()
    assert loss < 1e-4 and orthogonality_error(u.detach()).max() < 1e-6

    def neumann(q):
        """(I + S) (I + S + ... + S^5), for (I + S) (I - S)^-1."""
        s = (q - q.mT) / 2
        series = term = torch.eye(32).expand_as(s)
        for _ in range(5):
            term = term @ s
            series = series + term
        return series + s @ series

    q = nn.Parameter(torch.zeros(8, 32, 32))
    adam = torch.optim.Adam([q], 0.01)
    for _ in range(500):
        adam.zero_grad()
        (neumann(q) @ x - y).square().mean().backward()
        adam.step()
    assert orthogonality_error(neumann(q).detach()).max() > 0.1


@pytest.mark.parametrize("options", ({}, {"method": "svd"}, {"warm_start": False}), ids=str)
def test_factors_of_the_whole_gradient_stop_short(options):
    """The part of the gradient that moves nothing takes the rank: every method is off by 1e-2 and more, for good."""
    torch.manual_seed(1)
    assert solve((16, 16), torch.float64, riemannian=False, **options)[0] > 1e-2
    torch.manual_seed(1)
    assert solve((16, 16), torch.float64, **options)[0] < 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_factors_of_the_tangent_part(method, dtype):
    """Of G - U (U^H G + G^H U) / 2: as of that matrix made dense, square, tall and stacked; exact at full rank."""
    for shape in ((9, 9), (14, 6), (3, 7, 7), (2, 8, 3)):
        u, g = haar(*shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        x, y = torch.randn(*shape[:-2], 5, shape[-1], dtype=dtype), torch.randn(*shape[:-1], 5, dtype=dtype)
        tangent = wide(g) - wide(u) @ (wide(u).mH @ wide(g) + wide(g).mH @ wide(u)) / 2
        left, right = low_rank_factors(g, 2, method, generator=generator(), u=u)
        dense = low_rank_factors(tangent.to(dtype), 2, method, generator=generator())
        products = [wide(a) @ wide(b).mH for a, b in ((left, right), dense)]
        assert (products[0] - products[1]).abs().max() < 1e3 * eps(dtype), shape
        if method == "sketch":
            assert error(*low_rank_factors(g, 99, u=u), tangent) < 50 * eps(dtype)
            ours = linear_factors(y.mT, x, 2, generator=generator(), u=u)
            dense = low_rank_factors(y @ x.conj(), 2, generator=generator(), u=u)
            products = [wide(a) @ wide(b).mH for a, b in (ours, dense)]
            assert (products[0] - products[1]).abs().max() < 1e3 * eps(dtype) * products[1].abs().max()


def dense_step(u, e, retraction, riemannian=True):
    """The retraction of U + E, in O(n^3)."""
    if retraction == "direct":
        inner = u.mH @ e
        e = e - u @ (inner + inner.mH) / 2 if riemannian else e
        s = torch.linalg.svd(u + e, full_matrices=False)
        return s.U @ s.Vh
    x = u.mH @ e
    return u @ torch.linalg.matrix_exp((x - x.mH) / 2)


def dense_run(u, grads, retraction, lr, momentum=0.0, nesterov=False, second_moment=None, beta2=0.9):
    """The optimizer's formulas with steps of full rank."""
    m, v = torch.zeros_like(u), 0.0
    for t, g in enumerate(grads, 1):
        m = momentum * m + g
        d = g + momentum * m if nesterov else m
        if second_moment:
            square = g.abs().square()
            v = beta2 * v + (1 - beta2) * (square.mean((-2, -1), True) if second_moment == "scalar" else square)
            average = (1 - momentum) / (1 - momentum ** (t + nesterov))
            d = average * d / (v / (1 - beta2**t)).sqrt()
        u = dense_step(u, -lr * d, retraction)
    return u


MODES = (
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"second_moment": "scalar"},
    {"second_moment": "elementwise"},
    {"second_moment": "scalar", "momentum": 0.8},
    {"second_moment": "elementwise", "momentum": 0.8, "nesterov": True},
)


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128), ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes_follow_their_formulas(mode, dtype):
    """At full rank, against dense matrix_exp and SVD: 1e-13 after four steps, stacks and tall ones included."""
    for retraction, shape in (("tangent", (2, 7, 7)), ("direct", (7, 7)), ("direct", (9, 4))):
        u = haar(*shape, dtype=dtype)
        grads = torch.randn(4, *shape, dtype=dtype) * torch.logspace(0, -2, 4, dtype=dtype)[:, None, None].reshape(
            4, *[1] * len(shape)
        )
        p = nn.Parameter(u.clone())
        steps(ProjUNN([p], 0.05, rank=99, retraction=retraction, beta2=0.9, eps=0.0, **mode), [p], [[g] for g in grads])
        expected = dense_run(u, grads, retraction, 0.05, **mode)
        assert (p.detach() - expected).abs().max() < 1e-13, (retraction, shape)


@pytest.mark.parametrize("nesterov", (False, True))
def test_directions_are_those_of_torch(nesterov):
    """A first-order step of 1e-6 is the tangent part of torch.optim's SGD's and Adam's."""
    theirs = {
        "SGD": lambda w: torch.optim.SGD([w], 1e-6, momentum=0.9, nesterov=nesterov),
        "Adam": lambda w: torch.optim.Adam([w], 1e-6, (0.9, 0.99), eps=1e-12),
    }
    for name, kind in (("SGD", None), *((("Adam", "elementwise"),) if not nesterov else ())):
        u, grads = haar(6, 6), torch.randn(5, 6, 6).double()
        p, w = nn.Parameter(u.clone()), nn.Parameter(u.clone())
        ours = ProjUNN([p], 1e-6, 6, momentum=0.9, nesterov=nesterov, second_moment=kind)
        steps(ours, [p], [[g] for g in grads])
        steps(theirs[name](w), [w], [[g] for g in grads])
        e = (w - u).detach()
        tangent = e - u @ (u.mT @ e + e.mT @ u) / 2
        assert ((p - u).detach() - tangent).abs().max() < 1e-9


def test_the_second_moment_of_complex_gradients_is_of_their_modulus():
    """g^2 was taken for |g|^2, so the phase of a gradient mattered; here it is real, and a phase passes through."""
    g = torch.randn(8, 8, dtype=torch.complex128)
    phase = torch.polar(torch.tensor(1.0).double(), torch.tensor(1.1).double())
    for kind in ("scalar", "elementwise"):
        ends = []
        for turn in (1, phase):
            p = nn.Parameter(torch.eye(8, dtype=torch.complex128) * turn)
            optimizer = ProjUNN([p], 0.01, 8, second_moment=kind, beta2=0.9)
            steps(optimizer, [p], [[turn * g], [0.5 * turn * g.conj()]])
            v = optimizer.state[p]["square_avg"]
            expected = (0.09 + 0.025) * g.abs().square()
            torch.testing.assert_close(v, expected.mean()[None, None] if kind == "scalar" else expected)
            ends.append(p.detach() / turn)
        assert not v.is_complex() and (ends[0] - ends[1]).abs().max() < 1e-13, kind


def test_a_scalar_second_moment_leaves_the_scale_out():
    """The same steps from gradients of 1, 8e-8 and 1e-9 of the size; 1e-25 and zero move to no NaN."""
    ends = []
    u, g = haar(10, 10, dtype=torch.float32), torch.randn(3, 10, 10)
    for scale in (1.0, 8e-8, 1e-9):
        p = nn.Parameter(u.clone())
        steps(ProjUNN([p], 0.01, 2, second_moment="scalar", momentum=0.5), [p], [[scale * x] for x in g])
        ends.append(p.detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-4 * (ends[0] - u).abs().max()
    assert (ends[0] - ends[2]).abs().max() < 1e-2 * (ends[0] - u).abs().max()
    for scale, kind in itertools.product((1e-25, 0.0), (None, "scalar", "elementwise")):
        p = nn.Parameter(u.clone())
        steps(ProjUNN([p], 0.01, 2, second_moment=kind), [p], [[scale * x] for x in g])
        assert orthogonality_error(p) < 1e-6, (scale, kind)
        assert scale or torch.equal(p, u)


@pytest.mark.parametrize("retraction", ("tangent", "direct", "cayley"))
def test_rank_one_in_double_precision(retraction):
    """k = 1 went through complex64, at 1e-9 per step: here 300 steps keep 1e-14 sqrt(300)."""
    for dtype in (torch.float64, torch.complex128):
        p = nn.Parameter(haar(24, 24, dtype=dtype))
        optimizer = ProjUNN([p], 0.02, retraction=retraction, reorthogonalize_every=None)
        for _ in range(300):
            steps(optimizer, [p], [[torch.randn(24, 24, dtype=dtype)]])
        assert p.dtype == dtype and orthogonality_error(p) < 3e-14


@pytest.mark.parametrize("retraction", ("tangent", "direct", "cayley"))
def test_degenerate_spectra_stay_on_the_manifold(retraction):
    """Nearly equal eigenvalues threw a rank-4 direct step .22 off: gradients U + tiny, zero columns, equal values."""
    for dtype in (torch.float32, torch.complex64):
        u = haar(4, 32, 32, dtype=dtype)
        left, right = haar(32, 4, dtype=dtype), haar(32, 4, dtype=dtype)
        g = torch.stack([left @ right.mH, u[1] @ right @ right.mH, -u[2] @ left @ left.mH, u[3]])
        p = nn.Parameter(u.clone())
        nearly = [[g * (1 + 1e-7 * torch.randn(1)) + 1e-7 * torch.randn_like(g)] for _ in range(5)]
        steps(ProjUNN([p], 0.3, 4, retraction=retraction, reorthogonalize_every=None), [p], nearly)
        assert orthogonality_error(p).max() < 5e-7


RESUMED = (
    {},
    {"momentum": 0.9, "nesterov": True, "second_moment": "scalar", "rank": 3, "reorthogonalize_every": 2},
    {"momentum": 0.9, "second_moment": "elementwise", "retraction": "cayley"},
    {"method": "columns", "rank": 2, "retraction": "direct"},
    {"warm_start": False, "seed": 7},
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex128, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", RESUMED, ids=str)
def test_a_resumed_run_has_the_same_bits(options, dtype):
    """Through torch.save; also with another use of the global random numbers in between."""
    full = torch.float32 if dtype == torch.bfloat16 else dtype
    start = [haar(6, 6, dtype=full).to(dtype), haar(2, 6, 6, dtype=full).to(dtype)]
    grads = [[torch.randn_like(u) for u in start] for _ in range(7)]

    def fresh(values):
        params = [nn.Parameter(u.clone()) for u in values]
        return params, ProjUNN(params, 0.05, **options)

    straight, optimizer = fresh(start)
    steps(optimizer, straight, grads)
    params, optimizer = fresh(start)
    steps(optimizer, params, grads[:4])
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.rand(3)
    resumed, optimizer = fresh(saved["params"])
    optimizer.load_state_dict(saved["optimizer"])
    kept = copy.deepcopy(saved["optimizer"])
    steps(optimizer, resumed, grads[4:])
    assert all(map(torch.equal, straight, resumed))
    for state, same in zip(saved["optimizer"]["state"].values(), kept["state"].values(), strict=True):
        assert all(torch.equal(state[k], same[k]) for k in state if not isinstance(state[k], int))  # loading copies


@pytest.mark.parametrize("options", RESUMED, ids=str)
def test_stacked_is_as_one_by_one(options):
    """Parameters of three shapes and two dtypes, with different leading dimensions and missing gradients."""
    shapes = ((6, 6), (2, 6, 6), (9, 9), (6, 6), (1, 2, 6, 6))
    dtypes = (torch.float64, torch.float64, torch.float64, torch.complex128, torch.float64)
    start = [haar(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    grads = [[torch.randn_like(u) for u in start] for _ in range(5)]
    grads[2][1] = None
    ends = []
    for foreach in (None, True, False):
        params = [nn.Parameter(u.clone()) for u in start]
        steps(ProjUNN(params, 0.05, foreach=foreach, **options), params, grads)
        ends.append(params)
    for stacked, default, alone in zip(*ends, strict=True):
        assert (stacked - alone).abs().max() < 1e-12 and (default - alone).abs().max() < 1e-12


@pytest.mark.parametrize("foreach", (True, False))
def test_sketches_are_warm(foreach):
    """Steps of no length along one gradient are a power iteration: the largest right singular vector, in the state."""
    params = [nn.Parameter(haar(9, 9)) for _ in range(2)]
    grads = [torch.diag(2.0 ** -torch.arange(9, dtype=torch.float64)) + 0.1 * torch.randn(9, 9) for _ in params]
    optimizer = ProjUNN(params, 0.0, riemannian=False, foreach=foreach)
    steps(optimizer, params, [grads] * 30)
    for p, g in zip(params, grads, strict=True):
        right = optimizer.state[p]["right"]
        assert (torch.linalg.svd(g).Vh[:1] @ right).abs() / right.norm() > 1 - 1e-5


def test_groups_have_their_own_options():
    """Rank, retraction and lr of a group; parameters without a gradient stay; options may change between steps."""
    a, b, c = (nn.Parameter(haar(*shape)) for shape in ((8, 8), (9, 5), (8, 8)))
    before = [x.detach().clone() for x in (a, b, c)]
    tall = {"params": [b], "rank": 99, "retraction": "direct", "lr": 0.2}
    optimizer = ProjUNN([{"params": [a, c]}, tall], 0.1, rank=99)
    g, h = torch.randn(8, 8).double(), torch.randn(9, 5).double()
    steps(optimizer, [a, b, c], [[g, h, None]])
    assert (a.detach() - dense_step(before[0], -0.1 * g, "tangent")).abs().max() < 1e-13
    assert (b.detach() - dense_step(before[1], -0.2 * h, "direct")).abs().max() < 1e-13
    assert torch.equal(c, before[2]) and c not in optimizer.state
    optimizer.param_groups[0].update(rank=2, momentum=0.5, second_moment="elementwise")
    optimizer.param_groups[1].update(rank=2, method="svd")
    steps(optimizer, [a, b, c], [[g, h, g], [g, h, g]])
    assert optimizer.state[a]["right"].shape == (8, 2) and orthogonality_error(b) < 1e-13


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bit_parameters_have_a_master(dtype):
    """It is orthogonal to 3e-7 where its rounded copy is not to 1e-4, and it moves by less than the copy resolves."""
    p = nn.Parameter(haar(3, 32, 32).to(dtype))
    before = p.detach().clone()
    optimizer = ProjUNN([p], 1e-4, rank=2, momentum=0.9)
    g = torch.randn(3, 32, 32).to(dtype)
    steps(optimizer, [p], [[g]])
    master = optimizer.state[p]["master"]
    assert master.dtype == torch.float32 and torch.equal(p, master.to(dtype))
    moved = (master - before.float()).abs().max()
    assert 0 < moved < 0.02 and orthogonality_error(master).max() < 3e-7
    steps(optimizer, [p], [[g]] * 200)
    assert not torch.equal(p, before) and torch.equal(p, master.to(dtype))
    assert orthogonality_error(master).max() < 3e-7 < 1e-4 < orthogonality_error(p).max()
    state = copy.deepcopy(optimizer.state_dict())
    other = ProjUNN([nn.Parameter(p.detach().clone())], 1e-4)
    other.load_state_dict(state)
    loaded = other.state[other.param_groups[0]["params"][0]]
    assert loaded["master"].dtype == loaded["right"].dtype == torch.float32 and torch.equal(loaded["master"], master)


def test_grad_scaler():
    """Scaled and unscaled it steps as without; an infinite gradient leaves parameters and state as they were."""
    device = torch.get_default_device().type
    start, x = haar(8, 8, dtype=torch.float32), torch.randn(5, 8)
    ends = []
    for scaler in (None, torch.amp.GradScaler(device, init_scale=2.0**10)):
        p = nn.Parameter(start.clone())
        optimizer = ProjUNN([p], 0.1, 2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = (x @ p.mT).sin().sum()
            if scaler:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
        ends.append(p.detach().clone())
    assert (ends[0] - ends[1]).abs().max() < 1e-6
    optimizer.zero_grad()
    scaler.scale((x @ p.mT).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, ends[1]) and optimizer.state[p]["step"] == 3 and scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("option", ({"second_moment": "scalar"}, {"momentum": 0.5, "second_moment": "scalar"}))
def test_options_that_change_start_afresh(option):
    """The first step with a moment is that of a new optimizer: its bias is that of its own age."""
    g = torch.randn(12, 12)
    moved = []
    for late in (False, True):
        p = nn.Parameter(torch.eye(12))
        optimizer = ProjUNN([p], 0.0 if late else 0.01, rank=12, **({} if late else option))
        for _ in range(30 if late else 0):
            p.grad = g.clone()
            optimizer.step()
        optimizer.param_groups[0].update(option, lr=0.01)
        p.grad = g.clone()
        optimizer.step()
        moved.append(p.detach().clone())
    torch.testing.assert_close(*moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ("scalar", "elementwise"))
def test_a_zero_gradient_moves_nothing(kind):
    p = nn.Parameter(haar(6, 6, dtype=torch.float32))
    start, p.grad = p.detach().clone(), torch.zeros_like(p)
    ProjUNN([p], 0.1, second_moment=kind, momentum=0.9, eps=0.0).step()
    assert torch.equal(p, start)


def test_precision_may_change():
    """Up, down to 16 bits and back: the state follows."""
    p = nn.Parameter(haar(8, 8, dtype=torch.float32))
    optimizer = ProjUNN([p], 0.01, momentum=0.9, second_moment="elementwise")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float64):
        p.data = p.data.to(dtype)
        p.grad = torch.randn(8, 8).to(dtype)
        optimizer.step()
        assert p.dtype == dtype and ("master" in optimizer.state[p]) == (dtype == torch.bfloat16)
        if dtype != torch.bfloat16:
            assert orthogonality_error(p.detach()) < 1e-6


def test_rounded_columns_are_mended():
    p = nn.Parameter(haar(64, 64, dtype=torch.float32).bfloat16().float())
    assert orthogonality_error(p.detach()) > 1e-3
    p.grad = torch.zeros_like(p)
    ProjUNN([p], 0.1).step()
    assert orthogonality_error(p.detach()) < 1e-6


def test_nothing_moves_where_one_is_refused():
    p, q = nn.Parameter(haar(6, 6)), nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
    optimizer, start = ProjUNN([{"params": [p]}, {"params": [q]}], 0.1), p.detach().clone()
    p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
    with pytest.raises(ValueError, match=r"must have orthonormal columns"):
        optimizer.step()
    assert torch.equal(p, start)


def test_schedulers_and_tensor_rates():
    """StepLR halves the steps; a tensor lr does as the number it holds."""
    u, g = haar(7, 7), torch.randn(7, 7).double()
    ends = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        p = nn.Parameter(u.clone())
        optimizer = ProjUNN([p], lr, 7)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        expected = u
        for rate in (0.1, 0.05, 0.025):
            steps(optimizer, [p], [[g]])
            expected = dense_step(expected, -rate * g, "tangent")
            schedule.step()
        ends.append(p.detach())
        assert (p.detach() - expected).abs().max() < 1e-13
    assert (ends[0] - ends[1]).abs().max() < 1e-14


def test_autocast_and_closures():
    """A step under autocast has the bits of one outside; closures are called with gradients enabled."""
    u, x = haar(8, 8, dtype=torch.float32), torch.randn(5, 8)
    ends = []
    for enabled in (False, True):
        p = nn.Parameter(u.clone())
        optimizer = ProjUNN([p], 0.1, 2, momentum=0.9, second_moment="scalar", reorthogonalize_every=1)

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, enabled=False):
                loss = (x @ p.mT).sin().sum()
                loss.backward()
            return loss

        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            losses = [optimizer.step(closure).item() for _ in range(3)]
        assert losses[2] < losses[0]
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_a_step_uses_no_global_random_numbers():
    """Nor moves them: the same seed gives the same steps."""
    u, g = haar(9, 9), torch.randn(9, 9).double()
    ends = []
    for seed in (0, 0, 1):
        p = nn.Parameter(u.clone())
        torch.manual_seed(len(ends))
        before = torch.get_rng_state()
        steps(ProjUNN([p], 0.1, seed=seed), [p], [[g]])
        assert torch.equal(before, torch.get_rng_state())
        ends.append(p.detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_projections_by_name():
    u, a, b = haar(9, 9), 0.1 * torch.randn(9, 2).double(), torch.randn(9, 2).double()
    for project, retraction in ((optim.project_direct_, "direct"), (optim.project_tangent_, "tangent")):
        moved = u.clone()
        assert project(moved, a, b) is moved
        assert (moved - dense_step(u, a @ b.mT, retraction, riemannian=False)).abs().max() < 1e-13


def square(dtype=torch.float32):
    return nn.Parameter(haar(4, 4).to(dtype))


@pytest.mark.parametrize(
    "options, exception, text",
    (
        ({"weight_decay": 1e-4}, ValueError, r"takes no weight_decay: it would add rank n to a low-rank step"),
        ({"lr": -0.1}, ValueError, r"lr must be a number >= 0, got -0\.1"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be a number or a tensor of one, got shape \(2,\)"),
        ({"rank": 0}, ValueError, r"rank must be an integer >= 1, got 0"),
        ({"rank": 1.5}, ValueError, r"rank must be an integer >= 1, got 1\.5"),
        ({"momentum": 1.0}, ValueError, r"momentum must be a number in \[0, 1\), got 1\.0"),
        ({"beta2": -0.1}, ValueError, r"beta2 must be a number in \[0, 1\), got -0\.1"),
        ({"eps": -1.0}, ValueError, r"eps must be a number >= 0, got -1\.0"),
        ({"nesterov": True}, ValueError, r"nesterov=True needs a momentum above zero"),
        ({"second_moment": "adam"}, ValueError, r"second_moment must be None, 'scalar' or 'elementwise', got 'adam'"),
        ({"retraction": "qr"}, ValueError, r"retraction must be one of .*, got 'qr'"),
        ({"method": "lsi"}, ValueError, r"method must be one of 'sketch', 'columns', 'svd', got 'lsi'"),
        ({"reorthogonalize_every": 0}, ValueError, r"reorthogonalize_every must be an integer >= 1, got 0"),
        ({"seed": "a"}, TypeError, r"seed must be an integer, got str"),
    ),
    ids=str,
)
def test_bad_options(options, exception, text):
    """One sentence, from the constructor and from a group, which is not added."""
    with pytest.raises(exception, match=text):
        ProjUNN([square()], **{"lr": 0.1, **options})
    optimizer = ProjUNN([square()], 0.1)
    with pytest.raises(exception, match=text):
        optimizer.add_param_group({"params": [square()], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "p, exception, text",
    (
        (torch.zeros(4), ValueError, r"must have shape \(\.\.\., n, p\), got \(4,\)"),
        (torch.eye(5)[:3], ValueError, r"as many rows as columns, got shape \(3, 5\): hold its transpose"),
        (torch.eye(5)[:, :3], ValueError, r"must be square for 'tangent', got shape \(5, 3\): 'direct' and 'cayley'"),
        (torch.eye(4).to(torch.float8_e5m2), TypeError, r"complex128, bfloat16 or float16, got float8_e5m2"),
        (torch.eye(4).to_sparse(), TypeError, r"must be a dense \(strided\) tensor, got layout torch\.sparse_coo"),
    ),
    ids=("vector", "wide", "tall", "float8", "sparse"),
)
def test_bad_parameters(p, exception, text):
    with pytest.raises(exception, match=text):
        ProjUNN([p.requires_grad_()], 0.1)


def test_what_a_step_refuses():
    """Sparse gradients before anything has moved, and columns that are not orthonormal."""
    a, b = square(), square()
    a.grad, b.grad, before = torch.randn(4, 4), torch.eye(4).to_sparse(), a.detach().clone()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients, got layout torch\.sparse_coo"):
        ProjUNN([a, b], 0.1).step()
    assert torch.equal(a, before)
    for wrong in (torch.randn(2, 6, 6) / 6, 1.1 * haar(6, 6), torch.full((3, 3), float("nan"))):
        p = nn.Parameter(wrong)
        p.grad = torch.zeros_like(p)
        with pytest.raises(
            ValueError, match=r"must have orthonormal columns, .*: start from the Q of torch\.linalg\.qr"
        ):
            ProjUNN([p], 0.1).step()


def test_bad_arguments_of_functions():
    g = torch.randn(4, 3)
    for call, exception, text in (
        (
            lambda: low_rank_factors([1.0], 1),
            TypeError,
            r"g must be a torch\.Tensor of shape \(\.\.\., n, p\), got list",
        ),
        (lambda: low_rank_factors(g.long(), 1), TypeError, r"g must be float32, .* or float16, got int64"),
        (lambda: low_rank_factors(g[0], 1), ValueError, r"g must have shape \(\.\.\., n, p\), got \(3,\)"),
        (lambda: low_rank_factors(g, 0), ValueError, r"rank must be an integer >= 1, got 0"),
        (lambda: low_rank_factors(g, 1, "qr"), ValueError, r"method must be one of"),
        (lambda: low_rank_factors(g, 1, "svd", g[:3, :1]), ValueError, r"warm_start must be None for method 'svd'"),
        (lambda: low_rank_factors(g, 1, u=g.mT), ValueError, r"u must have at least as many rows as columns"),
        (
            lambda: low_rank_factors(g, 1, u=g.double()),
            ValueError,
            r"u must have .* shape \(4, 3\) and dtype float32, got",
        ),
        (lambda: low_rank_factors(g, 1, samples=3), ValueError, r"samples must be None for method 'sketch'"),
        (lambda: low_rank_factors(g, 1, "columns", samples=0), ValueError, r"samples must be an integer >= 1, got 0"),
        (lambda: low_rank_factors(g, 2, warm_start=g), ValueError, r"warm_start must have shape \(3, 2\) and dtype"),
        (lambda: linear_factors(g, g[:2], 1), ValueError, r"dy and x must have shapes .*, got \(4, 3\) and \(2, 3\)"),
        (lambda: linear_factors(g, g.double(), 1), TypeError, r"same dtype, got float32 and float64"),
        (lambda: orthogonality_error(g.mT), ValueError, r"u must have at least as many rows as columns"),
        (lambda: reorthogonalize_(g.half()), TypeError, r"u must be float32, float64, .*, got float16"),
        (lambda: reorthogonalize_(g, 0), ValueError, r"q must be an integer >= 1, got 0"),
        (lambda: optim.project_tangent_(g, g, g), ValueError, r"u must be square for 'tangent'"),
    ):
        with pytest.raises(exception, match=text):
            call()


def test_empty_matrices():
    """No rows, no columns, no matrices: nothing happens."""
    for shape in ((0, 0), (5, 0), (0, 4, 4)):
        p = nn.Parameter(torch.zeros(shape))
        steps(ProjUNN([p], 0.1, 2, "direct", momentum=0.5, second_moment="scalar"), [p], [[torch.zeros(shape)]] * 2)
        assert reorthogonalize_(p.detach(), 1).shape == orthogonality_error(p).new_zeros(shape).shape
    for method in METHODS:
        left, right = low_rank_factors(torch.zeros(0, 4, 3), 2, method)
        assert left.shape == (0, 4, 2) and right.shape == (0, 3, 2)
