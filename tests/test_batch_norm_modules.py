"""Batch norms as modules: they do as torch's, convert, train a model to the same curve, and compile."""

import copy

import batch_norms
import pytest
import torch
import torch.nn.functional as F
from batch_norms import skip_simulator
from cases import check_compiled
from torch import nn

from sslkern import ops
from sslkern.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormReLU, SyncBatchNorm, convert_batchnorm

backend = batch_norms.backend
MODULES = ((BatchNorm1d, nn.BatchNorm1d, (6, 4)), (BatchNorm1d, nn.BatchNorm1d, (6, 4, 5)),
           (BatchNorm2d, nn.BatchNorm2d, (6, 4, 3, 5)), (BatchNorm3d, nn.BatchNorm3d, (3, 4, 2, 3, 5)),
           (SyncBatchNorm, nn.SyncBatchNorm, (6, 4)), (SyncBatchNorm, nn.SyncBatchNorm, (6, 4, 3, 5)))  # fmt: skip
SETTINGS = (
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-2},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ours, theirs, shape", MODULES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_modules_do_as_torchs(ours, theirs, shape, settings, backend):
    """Three steps of training and one of eval: outputs, gradients, buffers; state_dicts load both ways."""
    a, b = ours(4, dtype=torch.float64, **settings), theirs(4, dtype=torch.float64, **settings)
    assert repr(a) == repr(b)
    # DistributedDataParallel refuses torch's SyncBatchNorm on a CPU, and what derives from it
    assert isinstance(a, nn.modules.batchnorm._BatchNorm if theirs is nn.SyncBatchNorm else theirs)
    for step in range(4):
        if step == 3:
            a.eval(), b.eval()
        x = torch.randn(shape, dtype=torch.float64) + step
        for one, other in zip(*(call_module(layer, x) for layer in (a, b)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        for (name, one), (same, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
            assert name == same
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    theirs(4, dtype=torch.float64, **settings).load_state_dict(a.state_dict())
    ours(4, dtype=torch.float64, **settings).load_state_dict(b.state_dict())


def call_module(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("ours, theirs, shape", MODULES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_errors_are_torchs(ours, theirs, shape, backend):
    """A wrong number of dimensions or of channels, and one number per channel: the same type, one sentence."""
    for x in (torch.randn(4), torch.randn(*shape[:1], 3, *shape[2:]), torch.randn(1, 4, *[1] * (len(shape) - 2))):
        with pytest.raises(Exception) as expected:
            theirs(4)(x)
        with pytest.raises((ValueError, TypeError)) as found:
            ours(4)(x)
        assert isinstance(expected.value, (ValueError, RuntimeError))
        assert "\n" not in str(found.value) and len(str(found.value)) > 20


def test_bad_arguments(backend):
    """One sentence, before any work."""
    x = torch.randn(4, 3)
    for arguments, error, text in (
        (([1.0],), TypeError, "x must be a torch.Tensor"),
        ((torch.ones(3, dtype=torch.int64),), TypeError, "got int64"),
        ((torch.randn(4),), ValueError, r"shape \(N, C, ...\)"),
        ((x, torch.ones(4)), ValueError, r"weight must have shape \(3,\)"),
        ((x, None, [0.0]), TypeError, "bias must be a floating"),
    ):
        with pytest.raises(error, match=text):
            ops.batch_norm(*arguments, training=True)
    with pytest.raises(ValueError, match="activation must be"):
        ops.batch_norm(x, activation="gelu")
    with pytest.raises(ValueError, match="activation must be"):
        BatchNorm2d(3, activation="gelu")
    with pytest.raises(ValueError, match="eps must be"):
        ops.batch_norm(x, eps=-1.0)
    for convert in (convert_batchnorm, SyncBatchNorm.convert_sync_batchnorm):
        with pytest.raises(TypeError, match="module must be"):
            convert(3)
    with pytest.raises(TypeError, match=r"group must be None, 'world', a torch.* got 'word'"):
        ops.batch_norm(x, training=True, group="word")


class Residual(nn.Module):
    """A small ResNet: two blocks on 8 x 8 images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)) for _ in range(2)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(512, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x)


def test_a_converted_model_trains_to_the_same_curve(backend):
    """In place, with the same parameters; 20 steps in fp64, 4 simulated, agree to 1e-9; back it is torch's."""
    torch.manual_seed(0)
    model = Residual().double()
    converted = copy.deepcopy(model)
    parameters = list(converted.parameters())
    assert convert_batchnorm(converted) is converted
    assert all(p is q for p, q in zip(parameters, converted.parameters(), strict=True))
    assert sum(type(m) in (BatchNorm1d, BatchNorm2d) for m in converted.modules()) == 4
    x, y = torch.randn(48, 1, 8, 8, dtype=torch.float64), torch.randint(10, (48,))
    curves = []
    for net in (model, converted):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        curve = []
        for _ in range(4 if backend.startswith("simulator") else 20):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(*curves, rtol=0, atol=1e-9)
    convert_batchnorm(converted, back=True)
    assert [type(m) for m in converted.modules()] == [type(m) for m in model.modules()]


def test_sync_batch_norm_converts(backend):
    """To and from torch's, with its process group; from every other batch norm, with parameters, buffers and hooks."""
    group = object()
    layer = nn.SyncBatchNorm(4, 1e-3, 0.2, True, True, group)
    assert type(convert_batchnorm(layer)) is SyncBatchNorm and layer.process_group is group
    assert type(convert_batchnorm(layer, back=True)) is nn.SyncBatchNorm and layer.process_group is group
    assert vars(layer).keys() == vars(nn.SyncBatchNorm(4)).keys()
    ours = SyncBatchNorm(4, 1e-3, 0.2, True, True, group, "cpu", torch.float64)
    assert ours.process_group is group and ours.weight.dtype == torch.float64 and ours.eps == 1e-3
    others = (nn.BatchNorm1d(4), BatchNorm2d(4), nn.BatchNorm3d(4, affine=False))
    found = nn.ModuleList(
        [*others, layer, ours, BatchNorm1d(4, track_running_stats=False), nn.InstanceNorm1d(4)]
    ).eval()
    before = [*found.parameters(), *found.buffers()]
    found[0].register_forward_hook(lambda module, inputs, output: output + 1)
    assert SyncBatchNorm.convert_sync_batchnorm(found, group) is found
    assert [type(m) for m in found] == [SyncBatchNorm] * 6 + [nn.InstanceNorm1d]
    assert [m.process_group for m in found[:6]] == [group] * 6
    assert all(a is b for a, b in zip(before, [*found.parameters(), *found.buffers()], strict=True))
    assert not any(m.training for m in found)
    x = torch.randn(5, 4)
    torch.testing.assert_close(found[0](x), F.batch_norm(x, torch.zeros(4), torch.ones(4)) + 1)
    alone = SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(4))
    assert type(alone) is SyncBatchNorm and alone.process_group is None
    relu = SyncBatchNorm.convert_sync_batchnorm(BatchNorm1d(4, activation="relu"), group)
    assert [type(m) for m in relu.modules()] == [BatchNormReLU, SyncBatchNorm, nn.ReLU]


def test_compiled_without_a_graph_break(backend):
    """fullgraph=True: values and gradients have the bits of eager, in both layouts."""
    skip_simulator(backend, "a compiler's fake tensors have no numbers to simulate with")
    given = [torch.randn(6, 5, 3, 4) for _ in range(2)]
    views = [x.contiguous(memory_format=torch.channels_last) for x in given]
    check_compiled(
        lambda a, b: sum(x.sum() for x in (*ops.batch_moments(a), *ops.batch_moments(b))), views, "aot_eager"
    )
    check_compiled(lambda a, b: ops.batch_norm(a, training=True, activation="relu").mul(b).sum(), given, "aot_eager")
    for settings, batches in (({}, given), ({"activation": "relu", "momentum": None}, views)):
        torch._dynamo.reset()
        eager = BatchNorm2d(5, **settings)
        compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
        for x in batches:
            assert torch.equal(compiled(x), eager(x))
        assert all(map(torch.equal, compiled.buffers(), eager.buffers()))
