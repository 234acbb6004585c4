"""Batch moments and batch norm against torch's own: values, gradients, running statistics, modules, and a model."""

import copy
import itertools
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import running_on
from simulator import Unavailable
from simulator import batch_norm as simulated
from test_compile import check
from torch import nn

from sslkern import ops
from sslkern.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormReLU, SyncBatchNorm, convert_batchnorm

SHAPES = (
    (2, 1),
    (2, 3),
    (7, 5),
    (300, 700),
    (1030, 17),
    (5, 3, 7),
    (4, 6, 100),
    (2, 1, 5000),
    (3, 5, 9, 11),
    (130, 2, 3, 3),
    (2, 70, 8, 8),
    (4, 3, 6, 6, 6),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


ORDERS = ("ascending", "descending", "random")


@pytest.fixture(params=("reference", "native", "cuda", *(f"simulator, {order}" for order in ORDERS)))
def backend(request, monkeypatch):
    """What has these kernels: back-ends on the CPU, the CUDA kernels on a GPU, and these on the CPU's simulator."""
    if request.param.startswith("simulator"):
        try:
            simulated.module()
        except Unavailable as reason:
            pytest.skip(str(reason))
        picked = simulated.kernels(request.param.split()[-1])
        monkeypatch.setattr(sys.modules["sslkern.ops.batch_norm"], "pick", picked)
        yield request.param
        return
    with running_on(request.param):
        yield request.param


def skip_simulator(backend, reason):
    if backend.startswith("simulator"):
        pytest.skip(reason)


def layouts(shape):
    """The tensor as it is, channels-last, and with strides that no kernel takes."""
    yield "contiguous", lambda x: x
    if len(shape) > 2:
        yield "channels last", lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)
    yield "transposed", lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "every second sample", lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2]


def data(shape, dtype):
    """x away from zero, affine parameters, running statistics and an upstream gradient, on a fixed seed."""
    rng = torch.Generator("cpu").manual_seed(sum(shape))

    def normal(*size):
        numbers = torch.randn(size, generator=rng, dtype=torch.float64, device="cpu")
        return numbers.to(torch.get_default_device())

    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    channel = [t.to(parameters) for t in (normal(shape[1]), normal(shape[1]), normal(shape[1]), normal(shape[1]).exp())]
    return (2 * normal(*shape) + 3).to(dtype), channel, normal(*shape).to(dtype)


def call(function, x, channel, dy):
    """Output, gradients of x, weight and bias, and the running statistics after it."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, *channel[:2]))
    mean, variance = (t.clone() for t in channel[2:])
    y = function(x, weight, bias, mean, variance)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy), mean, variance]


def torchs(training, activation):
    def run(x, weight, bias, mean, variance):
        y = F.batch_norm(x, mean, variance, weight, bias, training, 0.2, 1e-3)
        return y.relu() if activation else y

    return run


def ours(training, activation):
    return lambda x, weight, bias, mean, variance: ops.batch_norm(
        x, weight, bias, mean, variance, training, 0.2, 1e-3, activation
    )


def shapes_of(backend, dtype):
    """All; of the simulator's orders each takes every third, and another third for each dtype."""
    if not backend.startswith("simulator"):
        return SHAPES
    turn = ORDERS.index(backend.split()[-1]) + DTYPES.index(dtype)
    return SHAPES[turn % len(ORDERS) :: len(ORDERS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", (True, False))
def test_agrees_with_torch(training, dtype, backend):
    """fp64 to 1e-12 of the size of the sums; below, the error against fp64 is at most 4 times torch's, plus 8 eps."""
    found = []
    for shape, activation in itertools.product(shapes_of(backend, dtype), (None, "relu")):
        x, channel, dy = data(shape, dtype)
        exact = call(torchs(training, activation), x.double(), [t.double() for t in channel], dy.double())
        # what the gradients' sums add up, without their cancellation
        size = call(torchs(False, activation), x.double(), [t.double() for t in channel], dy.double().abs())
        plain = call(torchs(training, activation), x, channel, dy)
        for layout, view in layouts(shape):
            result = call(ours(training, activation), view(x), channel, view(dy))
            if layout == "channels last" and len(shape) > 3:
                assert result[0].stride() == view(x).stride(), (shape, layout)
            for k, (r, e, p, s) in enumerate(zip(result, exact, plain, size, strict=True)):
                scale = max(float(e.abs().max()), float(s.abs().max()))
                error, torchs_error = (float((t.double() - e).abs().max()) for t in (r, p))
                limit = (
                    1e-12 * scale if dtype == torch.float64 else 4 * torchs_error + 8 * torch.finfo(r.dtype).eps * scale
                )
                if not error <= limit:
                    found.append(f"{shape} {layout} {activation} output {k}: error {error:.1e}, limit {limit:.1e}")
    assert not found, "\n".join(found)


def test_moments_at_large_means(backend):
    """At |mu|/sigma = 1e4 the relative error of the fp32 variance stays below 1e-6, in every layout and length."""
    for shape in ((4096, 24), (64, 6, 700), (512, 3, 4, 5), (200_000, 2)):
        x = 1e4 * (1 + torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))) + torch.randn(shape)
        dims = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x.double(), dims, correction=0)
        for name, view in layouts(shape):
            m, v = ops.batch_moments(view(x))
            assert ((v - variance) / variance).abs().max() < 1e-6, (shape, name)
            assert ((m - mean) / mean).abs().max() < 1e-7, (shape, name)


@pytest.mark.parametrize("activation", (None, "relu"))
def test_gradcheck(activation, backend):
    """fp64 finite differences of both ops, training and eval."""
    for shape in ((5, 3), (3, 2, 4)):
        x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, shape[1], shape[1]))
        assert torch.autograd.gradcheck(ops.batch_moments, x)
        for running in ((None, None), (torch.zeros(shape[1]).double(), torch.ones(shape[1]).double())):
            assert torch.autograd.gradcheck(
                lambda x, w, b, r=running: ops.batch_norm(x, w, b, *r, activation=activation), (x, weight, bias)
            )


def test_bits_do_not_depend_on_threads_or_addresses(backend):
    """Values and gradients, on 1 and on 2 threads and on a copy."""
    if backend == "reference":
        pytest.skip("torch's reductions do not promise it")
    threads = torch.get_num_threads()
    shapes = ((3000, 700), (64, 8, 30, 40), (300, 40, 3, 3))
    for shape in ((700, 36), (8, 8, 30, 40), (30, 40, 3, 3)) if backend.startswith("simulator") else shapes:
        x, channel, dy = data(shape, torch.float32)
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            try:
                results.append(call(ours(True, "relu"), x.clone(), channel, dy))
            finally:
                torch.set_num_threads(threads)
        assert all(map(torch.equal, *results)), shape


KINDS = {
    "fp64": lambda t: t.double(),
    "bf16": lambda t: t.bfloat16(),
    "strided": lambda t: torch.stack([t, t], 1)[:, 0],
    "none": lambda t: None,
}


@pytest.mark.parametrize("momentum", (0.2, torch.tensor(0.2)), ids=("number", "tensor"))
@pytest.mark.parametrize("mean, var", [*((kind, kind) for kind in KINDS), ("fp64", "none"), ("none", "strided")])
def test_running_statistics_of_any_kind(mean, var, momentum, backend):
    """What no kernel takes is tracked as well, either of them, by a share that is a number or a tensor."""
    x, channel, _ = data((6, 5, 3), torch.float32)
    before = [KINDS[kind](t) for kind, t in zip((mean, var), channel[2:], strict=True)]
    after = [None if t is None else t.clone() for t in before]
    share = momentum.to(x.device) if isinstance(momentum, torch.Tensor) else momentum
    ops.batch_norm(x, None, None, *after, True, share)
    batch = x.double().mean((0, 2)), x.double().var((0, 2), correction=1)
    for now, then, exact in zip(after, before, batch, strict=True):
        if now is not None:
            torch.testing.assert_close(now, (0.8 * then.double() + 0.2 * exact).to(now.dtype))


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


@pytest.mark.parametrize("activation", (None, "relu"))
@pytest.mark.parametrize("shape", ((6, 3, 4), (40, 3), (5, 3, 65)), ids=str)
def test_nan_in_eval_has_a_gradient(shape, activation, backend):
    """By constant statistics the map is affine: the gradient of x is torch's, whatever x is."""
    x, dy = torch.randn(shape), torch.randn(shape)
    x[0, 1], x[3, 0], x[4, 0], x[4, 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    mean, variance, weight = torch.randn(3), torch.rand(3) + 0.5, torch.randn(3)

    def torchs(x, **statistics):
        y = F.batch_norm(x, **statistics)
        return y if activation is None else y.relu()

    found = []
    for function in (partial(ops.batch_norm, activation=activation), torchs):
        leaf = x.clone().requires_grad_()
        found += torch.autograd.grad(function(leaf, running_mean=mean, running_var=variance, weight=weight), leaf, dy)
    torch.testing.assert_close(*found)


def test_nan_stays_in_its_channel(backend):
    """And passes the relu, forward and backward, as in torch."""
    x = torch.randn(6, 3, 70)
    x[2, 1, 5] = float("nan")
    result = call(
        ours(True, "relu"), x, [torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3)], torch.ones_like(x)
    )
    for values in (result[0].movedim(1, 0), result[1].movedim(1, 0), *result[2:]):
        assert values.isnan().flatten(1).all(1).tolist() == [False, True, False] if values.dim() > 1 else True
        assert not values[0].isnan().any() and not values[2].isnan().any()


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
    check(lambda a, b: sum(x.sum() for x in (*ops.batch_moments(a), *ops.batch_moments(b))), views, "aot_eager")
    check(lambda a, b: ops.batch_norm(a, training=True, activation="relu").mul(b).sum(), given, "aot_eager")
    for settings, batches in (({}, given), ({"activation": "relu", "momentum": None}, views)):
        torch._dynamo.reset()
        eager = BatchNorm2d(5, **settings)
        compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
        for x in batches:
            assert torch.equal(compiled(x), eager(x))
        assert all(map(torch.equal, compiled.buffers(), eager.buffers()))


def test_geometry(backend):
    """The batch mean is the least-squares centre, and backward is orthogonal to 1 and to x_hat: to 1e-12."""
    x = torch.randn(50, 6, dtype=torch.float64) * 3 + 5
    mean, variance = ops.batch_moments(x)

    def distance(centre):
        """Mean squared distance of the numbers of a channel to its hyperplane x = centre."""
        return (x - centre).square().mean(0)

    torch.testing.assert_close(distance(mean), variance, rtol=1e-12, atol=0)
    for step in (1e-3, -1e-3):
        assert (distance(mean + step) > distance(mean)).all()
    x.requires_grad_()
    y = ops.batch_norm(x, training=True, eps=0.0)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.sum(0).abs().max() < 1e-12
    assert (dx * y.detach()).sum(0).abs().max() < 1e-12


def simulated_outputs(without=None):
    """Of all kernels, over columns and planes in several splits, in every order: a list per order, or the error."""
    found = []
    for order in ORDERS:
        outputs = []
        for shape in ((700, 36), (700, 3, 8)):
            x, (weight, bias, *_), dy = data(shape, torch.float32)
            pick = simulated.kernels(order, 1, without)
            try:
                y, centre, variance = pick("batch_norm_fwd", x)(x, weight, bias, None, None, 0.0, 1e-5, True)
                outputs += [y, centre, variance]
                outputs += pick("batch_norm_bwd", x)(dy, x, weight, bias, centre, variance, 1e-5, True)
            except RuntimeError as error:
                outputs.append(error)
        found.append(outputs)
    return found


def same(one, other):
    return len(one) == len(other) and all(
        isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


def test_every_order_of_threads_gives_the_same_bits():
    """Ascending, descending and random; the blocks' order as well."""
    try:
        first, *others = simulated_outputs()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not any(t.isnan().any() for t in first) and all(same(first, other) for other in others)


def test_a_missing_barrier_is_seen():
    """Without the kernels' one barrier some order gives other numbers or an error."""
    try:
        right = simulated_outputs()[0]
        wrong = simulated_outputs(without=0)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not all(same(right, other) for other in wrong)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_16_bit_number(dtype, backend):
    """Read exactly and rounded to the nearest even one, subnormal numbers, overflow, infinity and NaN included."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64)
    zero, one = torch.zeros(64), torch.ones(64)
    for scale in (1.0, 1 / 3, 2**-12 / 3, 2**-20, 1.7, 1e4):
        y = ops.batch_norm(x, scale * one, zero, zero, one, eps=0.0)
        assert torch.equal(y.nan_to_num(7), (x.float() * scale).to(dtype).nan_to_num(7)), scale
