"""Two processes against one on the joint batch: SyncBatchNorm against torch's own batch norm in fp64."""

import copy
import itertools

import pytest
import ranks
import torch
import torch.distributed as dist
from conftest import available
from ranks import Collectives, mine, normal
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslkern import backend, ops
from sslkern.nn import BatchNorm1d, BatchNormReLU, SyncBatchNorm

SIZES = ((4, 4), (5, 3), (8, 0), (0, 8))  # samples of the two ranks
LAYOUTS = (
    ((8, 3), torch.contiguous_format),
    ((8, 3, 5), torch.contiguous_format),
    ((8, 3, 4, 2), torch.contiguous_format),
    ((8, 3, 4, 2), torch.channels_last),
)
SETTINGS = (
    {},
    {"activation": "relu"},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-2, "affine": False},
    {"track_running_stats": False, "activation": "relu"},
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def summed(values):
    """Over both ranks."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def close(found, expected, tolerance, case, scale=1):
    """To the tolerance, in units of the largest number expected or of the scale."""
    ranks.close(found, expected, tolerance, case, scale)


def pair(dims, settings, channels=3):
    """Ours, and torch's batch norm with the relu behind it; fp64, with the same parameters."""
    ours = SyncBatchNorm(channels, dtype=torch.float64, **settings)
    for seed, parameter in enumerate(ours.parameters()):
        parameter.data = normal(channels, seed=seed)
    settings = dict(settings)
    relu = nn.ReLU() if settings.pop("activation", None) else nn.Identity()
    theirs = (nn.BatchNorm2d if dims == 4 else nn.BatchNorm1d)(channels, dtype=torch.float64, **settings)
    theirs.load_state_dict((ours[0] if isinstance(ours, BatchNormReLU) else ours).state_dict())
    return ours, nn.Sequential(theirs, relu)


def step(layer, x, dy):
    """Output, and gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def values():
    """Three steps of training and one of eval: output, gradients, buffers, of every layout with all settings and
    dtypes; the divisions of the batch in turn, so that each meets every layout, all settings and every dtype."""
    cases = itertools.product(enumerate(LAYOUTS), enumerate(SETTINGS), enumerate(TOLERANCE))
    for (i, (shape, layout)), (j, settings), (k, dtype) in cases:
        sizes = SIZES[(i + j + k) % len(SIZES)]
        ours, theirs = pair(len(shape), settings)
        ours = ours.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for turn in range(4):
            if turn == 3:
                ours.eval(), theirs.eval()
                if not list(ours.buffers()):
                    continue  # then eval is by the batch of one process
            case = (sizes, shape, layout, settings, dtype, turn)
            x, dy = (normal(*shape, seed=seed).mul(turn + 1).to(dtype) for seed in (turn, 7 + turn))
            expected = step(theirs, x.double(), dy.double())
            added = float(dy.double().abs().sum() / 3)  # the gradients of the parameters, without their cancellation
            x, dy = (mine(t, sizes).contiguous(memory_format=layout) for t in (x, dy))
            y, dx, *parameters = step(ours, x, dy)
            assert y.dtype == dx.dtype == dtype and (y.stride() == x.stride() or y.numel() == 0), case
            close(y, mine(expected[0], sizes), TOLERANCE[dtype], case)
            close(dx, mine(expected[1], sizes), TOLERANCE[dtype], case)
            limit = min(TOLERANCE[dtype], TOLERANCE[torch.float32])
            for found, gradient in zip(parameters, expected[2:], strict=True):
                close(summed(found), gradient, limit, case, scale=added)
            for found, buffer in zip(ours.buffers(), theirs.buffers(), strict=True):
                assert torch.equal(summed(found), 2 * found), (case, "differs between ranks")
                close(found, buffer.double(), limit, case)


def large_means():
    """|mu|/sigma = 1e4 and more, in fp32: the variance keeps six digits, and the output five."""
    for sizes, shape in itertools.product(((400, 112), (512, 0)), ((512, 6), (512, 6, 5, 3))):
        x = (normal(*shape) + 1e4 * (1 + torch.arange(6.0).view(-1, *[1] * (len(shape) - 2)))).float()
        variance, mean = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != 1], keepdim=True)
        running = torch.zeros(6), torch.zeros(6)
        y = ops.batch_norm(mine(x, sizes), None, None, *running, True, 1.0, eps=0.0, group=dist.group.WORLD)
        assert ((running[1] - variance.flatten()) / variance.flatten()).abs().max() < 1e-6, shape
        assert ((running[0] - mean.flatten()) / mean.flatten()).abs().max() < 1e-7, shape
        count = x.numel() / 6
        close(y, mine((x - mean) / (variance * ((count - 1) / count)).sqrt(), sizes), 1e-6, shape)


def collectives():
    """One in each direction; none in eval, alone, in a group of one or of others; no all-reduce for a frozen input."""
    ours, _ = pair(2, {})
    alone = [dist.new_group([rank]) for rank in range(2)]
    both = dist.new_group([0, 1])
    for sizes in SIZES:
        x = mine(normal(8, 3), sizes)
        for group in (None, both):
            ours.process_group = group
            with Collectives() as called:
                y = ours(x.requires_grad_())
                assert called.names == ["all_gather_into_tensor"]
                y.sum().backward()
                assert called.names == ["all_gather_into_tensor", "all_reduce"]
                ours(x.detach()).sum().backward()
                assert called.names[2:] == ["all_gather_into_tensor"]
    x = mine(normal(8, 3), (5, 3)).requires_grad_()
    local = BatchNorm1d(3, dtype=torch.float64)
    local.load_state_dict(ours.state_dict())
    with Collectives() as called:
        for group in alone:
            ours.process_group = group
            y = ours(x)
            y.sum().backward()
            assert torch.equal(y, local(x))
        assert all(map(torch.equal, ours.buffers(), local.buffers()))
        ours.process_group = None
        ours.eval()(x).sum().backward()
        SyncBatchNorm(3, track_running_stats=False, dtype=torch.float64).eval()(x).sum().backward()
        assert not called.names


def edges():
    """One sample on each rank, and one in all, pass; second derivatives and wrong shapes raise; NaN stays put."""
    ours, theirs = pair(2, {})
    x, dy = normal(2, 3), normal(2, 3, seed=1)
    for found, expected in zip(step(ours, mine(x, (1, 1)), mine(dy, (1, 1)))[:2], step(theirs, x, dy)[:2], strict=True):
        close(found, mine(expected, (1, 1)), 1e-12, "one sample each")
    lonely, _ = pair(2, {})
    y = lonely(mine(normal(1, 3), (1, 0)))
    assert all(torch.equal(row, lonely.bias) for row in y) and lonely.running_var.isnan().all()
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ours(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()
    with Collectives() as called:
        with pytest.raises(ValueError, match=r"weight must have shape \(4,\)"):
            ours(torch.randn(2, 4, dtype=torch.float64))
        assert not called.names
    x[0, 1] = float("nan")
    y, dx = step(ours, mine(x, (1, 1)), mine(dy, (1, 1)))[:2]
    for t in (y, dx):
        assert t.isnan().tolist() == [[False, True, False]]


def nothing():
    """Without a sample on any rank: empty outputs and gradients, zero gradients of parameters, the same statistics."""
    for settings, shape in itertools.product(SETTINGS, ((0, 3), (0, 3, 4, 2))):
        ours, theirs = pair(len(shape), settings)
        x, dy = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for found, expected in zip(step(ours, x, dy), step(theirs, x, dy), strict=True):
            assert found.shape == expected.shape and torch.equal(found, expected), (settings, shape)
        assert all(map(torch.equal, ours.buffers(), theirs.buffers())), (settings, shape)
    mean, var = torch.tensor([float("nan"), 1.0]), torch.tensor([[float("inf"), 0], [2.0, 0]])[:, 0]
    for share in (0.3, torch.tensor(0.3)):
        ops.batch_norm(torch.randn(0, 2), None, None, mean, var, True, share, group=dist.group.WORLD)
        assert mean.isnan().tolist() == [True, False] and mean[1] == 1 and var.tolist() == [float("inf"), 2]


def compiled():
    """Whole, without a graph break: values, gradients and buffers are eager's, and as many collectives in its order;
    of uneven ranks, and where one of them has no samples."""
    native = (("aot_eager", (5, 3)), ("inductor", (8, 0)))
    for compiler, sizes in native if backend.forced() == "native" else (("aot_eager", (8, 0)),):
        torch._dynamo.reset()
        eager, _ = pair(4, {"activation": "relu"})
        whole = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=compiler)
        for turn in range(2):
            x, dy = (mine(normal(8, 3, 4, 2, seed=seed + turn), sizes) for seed in (0, 5))
            results = []
            for layer in (whole, eager):
                results.append(step(layer, x, dy))
                with torch.no_grad():
                    results[-1] += [layer(x), *layer.buffers()]
            for found, expected in zip(*results, strict=True):
                close(found, expected, 0 if compiler == "aot_eager" else 1e-12, (compiler, sizes))


def trained():
    """Under DistributedDataParallel, a converted model trains as one process does on the joint batch."""
    for sizes in SIZES:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5), nn.BatchNorm1d(5)
        ).double()
        joint = copy.deepcopy(model)
        ours = DistributedDataParallel(SyncBatchNorm.convert_sync_batchnorm(model))
        x, weight = normal(8, 1, 6, 6), normal(8, 5)
        for net, x_, weight_, scale in ((joint, x, weight, 1), (ours, mine(x, sizes), mine(weight, sizes), 2)):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                (net(x_).sin() * weight_).sum().mul(scale / 8).backward()  # DDP averages over the two ranks
                optimizer.step()
        for (name, found), expected in zip(model.state_dict().items(), joint.state_dict().values(), strict=True):
            close(found, expected.double(), 1e-11, (sizes, name))


CHECKS = (values, large_means, collectives, edges, nothing, trained, compiled)


@pytest.mark.parametrize("name", ("reference", "native"))
def test_two_processes_are_one(name, tmp_path):
    """All of CHECKS, in two processes over gloo, on the back-ends that have the kernels."""
    ranks.run(2, CHECKS, tmp_path, available(name))
