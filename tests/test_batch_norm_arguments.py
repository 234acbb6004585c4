"""Batch norm for every kind of argument: strides, empty batches, settings, dtypes, frozen tensors."""

import itertools

import batch_norms
import pytest
import torch
import torch.nn.functional as F
from batch_norms import call, data, ours, skip_simulator, torchs
from torch import nn

from sslkern import ops
from sslkern.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

backend = batch_norms.backend


def repeated(t):
    return t[:1].expand_as(t)


VIEWS = {
    "strided": lambda t: torch.stack([t, t + 9], -1)[..., 0],
    "offset": lambda t: torch.cat([t[:1] + 9, t])[1:],
    "cut out": lambda t: F.pad(t, (2, 3), value=9.0)[..., 2:-3],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "real part": lambda t: torch.complex(t, t + 9).real,
    "negated": lambda t: torch._neg_view(-t),
    "conjugate": lambda t: torch.complex(t + 9, -t).conj().imag,
    "expanded": repeated,
    "one number": lambda t: t.flatten()[:1].view([1] * t.dim()).expand_as(t),
}
ARGUMENTS = ("x", "weight", "bias", "running_mean", "running_var", "dy")


def results(given, training, activation):
    """Output, gradients, and the running statistics, which are updated where they are."""
    x, weight, bias, mean, var, dy = given.values()
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = ops.batch_norm(x, weight, bias, mean, var, training, 0.2, 1e-3, activation)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy), mean, var]


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
def test_every_argument_in_every_view(training, kind, backend):
    """The bits of a contiguous copy, forward and backward, and running statistics that change nothing beside them."""
    if kind in ("negated", "conjugate"):
        skip_simulator(backend, "no dispatcher that resolves the negative bit")
    for shape, name, activation in itertools.product(((6, 5), (4, 5, 7), (3, 5, 2, 3)), ARGUMENTS, (None, "relu")):
        x, channel, dy = data(shape, torch.float32)
        given = dict(zip(ARGUMENTS, (x, *channel, dy), strict=True))
        view = VIEWS[kind](given[name].abs() if name == "running_var" else given[name])
        plain = {key: t.clone(memory_format=torch.contiguous_format) for key, t in (given | {name: view}).items()}
        if training and name.startswith("running") and kind in ("expanded", "one number"):
            before = view.clone()
            with pytest.raises(ValueError, match=f"{name} must have memory for each channel"):
                results(given | {name: view}, training, activation)
            assert torch.equal(view, before)
            continue
        base = view if view._base is None else view._base
        around = base.clone()
        expected = results(plain, training, activation)
        found = results({key: t.clone() for key, t in given.items()} | {name: view}, training, activation)
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            if k < 4:
                assert torch.equal(a, b), (shape, name, activation, k)
            else:
                torch.testing.assert_close(a, b)
        if name.startswith("running") and training:
            changed = torch.view_as_real(torch.resolve_conj(base)) if base.is_complex() else base
            before = torch.view_as_real(torch.resolve_conj(around)) if base.is_complex() else around
            assert int((changed != before).sum()) == view.numel(), (shape, name)
        else:
            assert torch.equal(base, around)


def test_moments_of_every_view(backend):
    """Values and gradients have the bits of a contiguous copy."""
    x = data((4, 5, 7), torch.float32)[0]
    for kind, view in VIEWS.items():
        if kind in ("negated", "conjugate") and backend.startswith("simulator"):
            continue
        a, b = (t.detach().requires_grad_() for t in (view(x), view(x).clone(memory_format=torch.contiguous_format)))
        for one, other in zip(ops.batch_moments(a), ops.batch_moments(b), strict=True):
            assert torch.equal(one, other), kind
        of_a, of_b = (torch.autograd.grad(sum(t.sin().sum() for t in ops.batch_moments(t)), t)[0] for t in (a, b))
        assert torch.equal(of_a, of_b), kind


EMPTY = (
    (BatchNorm1d, nn.BatchNorm1d, ((0, 4), (0, 4, 5), (3, 4, 0))),
    (BatchNorm2d, nn.BatchNorm2d, ((0, 4, 3, 5), (3, 4, 0, 5))),
    (BatchNorm3d, nn.BatchNorm3d, ((0, 4, 2, 3, 5), (3, 4, 2, 0, 5))),
    (SyncBatchNorm, nn.SyncBatchNorm, ((0, 4), (0, 4, 3))),
)
SETTINGS = ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False})


@pytest.mark.parametrize("activation", (None, "relu"))
@pytest.mark.parametrize("ours, theirs, shapes", EMPTY, ids=lambda v: getattr(v, "__name__", ""))
def test_an_empty_batch(ours, theirs, shapes, activation, backend):
    """As torch: an empty output, zero gradients, running statistics left alone, the batch counted in training."""
    for shape, settings, training in itertools.product(shapes, SETTINGS, (True, False)):
        states = []
        for layer in (ours(4, activation=activation, **settings), theirs(4, **settings)):
            x = torch.randn(shape, requires_grad=True)
            y = layer.train(training)(x)
            dx, *parameters = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
            assert y.shape == dx.shape == shape and y.dtype == x.dtype
            assert not any(p.any() for p in parameters)
            states.append(list(layer.buffers()))
        assert all(map(torch.equal, *states)), (shape, settings, training)


def test_an_empty_batch_by_the_op(backend):
    """With NaN in the running statistics, without channels, in every dtype; moments of nothing are refused."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        mean, var = torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 2.0])
        y = ops.batch_norm(torch.randn(0, 2, 3).to(dtype), None, None, mean, var, True)
        assert y.shape == (0, 2, 3) and y.dtype == dtype
        assert mean.isnan().tolist() == [True, False] and var.tolist() == [float("inf"), 2.0]
    for training in (True, False):
        x = torch.randn(3, 0, requires_grad=True)
        y = ops.batch_norm(x, None, None, torch.zeros(0), torch.ones(0), training)
        assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == (3, 0)
    for shape in ((0, 3), (3, 0), (2, 3, 0)):
        with pytest.raises(ValueError, match="at least one channel and one number"):
            ops.batch_moments(torch.randn(shape))


def test_one_number_per_channel_is_torchs_error(backend):
    """In training, for each layer: type and text; in eval it passes."""
    pairs = ((BatchNorm1d, nn.BatchNorm1d, (1, 4)), (BatchNorm1d, nn.BatchNorm1d, (1, 4, 1)),
             (BatchNorm2d, nn.BatchNorm2d, (1, 4, 1, 1)), (BatchNorm3d, nn.BatchNorm3d, (1, 4, 1, 1, 1)))  # fmt: skip
    for one, other, shape in pairs:
        x, errors = torch.randn(shape), []
        for layer in (one(4), other(4)):
            with pytest.raises(ValueError) as error:
                layer(x)
            errors.append(str(error.value))
            assert int(layer.num_batches_tracked) == 1
        assert errors[0] == errors[1]
        torch.testing.assert_close(one(4).eval()(x), other(4).eval()(x))


def test_settings_are_checked(backend):
    """One sentence, before any work."""
    x, zero, one = torch.randn(5, 3), torch.zeros(3), torch.ones(3)
    trained = zero.clone().requires_grad_()
    for arguments, error, text in (
        ((None, None, zero, None), ValueError, "must be given together"),
        ((None, None, None, one), ValueError, "must be given together"),
        ((None, None, trained, one), ValueError, "running_mean is a statistic"),
        ((None, None, zero, trained, True), ValueError, "running_var is a statistic"),
        ((None, None, zero, one, True, "0.1"), TypeError, "momentum must be a number"),
        ((None, None, zero, one, True, True), TypeError, "momentum must be a number"),
        ((None, None, zero, one, True, torch.ones(1)), ValueError, r"momentum must be .* got shape \(1,\)"),
        ((None, None, zero, one, True, torch.tensor(1)), ValueError, r"momentum must be .* int64"),
        ((None, None, zero, one, True, torch.tensor(0.1, requires_grad=True)), ValueError, "requires_grad=True"),
    ):
        with pytest.raises(error, match=text):
            ops.batch_norm(x, *arguments)
    assert not zero.any() and (one == 1).all()


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_parameters_of_any_dtype(dtype, training, backend):
    """Those that torch's kernels do not mix too: the result agrees with fp64 to 8 eps."""
    x, channel, dy = data((6, 5, 3), dtype)
    for kinds in itertools.product((torch.float32, torch.bfloat16, torch.float64), repeat=2):
        mixed = [t.to(kinds[k > 1]) for k, t in enumerate(channel)]
        exact = call(torchs(training, "relu"), x.double(), [t.double() for t in mixed], dy.double())
        found = call(ours(training, "relu"), x, mixed, dy)
        for k, (r, e) in enumerate(zip(found, exact, strict=True)):
            assert r.dtype == (dtype if k < 2 else mixed[0].dtype if k < 4 else mixed[2].dtype)
            scale = max(float(e.abs().max()), float(dy.double().abs().sum((0, 2)).max()) if k in (2, 3) else 0)
            eps = max(torch.finfo(t).eps for t in (r.dtype, torch.float32))  # statistics and sums are fp32
            assert float((r.double() - e).abs().max()) <= 8 * eps * scale, (kinds, k)


def test_autocast_leaves_the_dtype_of_x(backend):
    """As torch's batch norm."""
    device = torch.get_default_device().type
    layer = BatchNorm1d(5, activation="relu")
    with torch.autocast(device, torch.bfloat16):
        assert layer(torch.randn(6, 5)).dtype == torch.float32
        assert layer(torch.randn(6, 5).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("training", (True, False))
def test_frozen_tensors(training, backend):
    """Every choice of what needs a gradient: those, with the bits of all; without one there is no graph."""
    x, channel, dy = data((6, 5, 3), torch.float32)
    every = call(ours(training, "relu"), x, channel, dy)[1:4]
    for needed in itertools.product((True, False), repeat=3):
        given = [t.clone().requires_grad_(flag) for t, flag in zip((x, *channel[:2]), needed, strict=True)]
        y = ours(training, "relu")(*given, *(t.clone() for t in channel[2:]))
        assert y.requires_grad == any(needed)
        if y.requires_grad:
            y.backward(dy)
        for t, flag, expected in zip(given, needed, every, strict=True):
            assert (t.grad is None) is not flag
            if flag:
                torch.testing.assert_close(t.grad, expected, rtol=1e-5, atol=1e-5)
