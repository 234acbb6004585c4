"""ProjUNN's state, alone and stacked, saved and loaded; and its options: of a group, of a precision, on the way."""

import copy
import io

import matrices
import pytest
import torch
from matrices import dense_step, haar, steps
from torch import nn

from sslkern.optim import ProjUNN, orthogonality_error

everywhere = matrices.everywhere
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
