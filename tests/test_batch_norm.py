"""Batch moments and batch norm against torch's own: values, gradients, running statistics, NaN, and geometry."""

import itertools
from functools import partial

import batch_norms
import pytest
import torch
import torch.nn.functional as F
from batch_norms import DTYPES, ORDERS, call, data, layouts, ours, torchs

from sslkern import ops

backend = batch_norms.backend
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


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_16_bit_number(dtype, backend):
    """Read exactly and rounded to the nearest even one, subnormal numbers, overflow, infinity and NaN included."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64)
    zero, one = torch.zeros(64), torch.ones(64)
    for scale in (1.0, 1 / 3, 2**-12 / 3, 2**-20, 1.7, 1e4):
        y = ops.batch_norm(x, scale * one, zero, zero, one, eps=0.0)
        assert torch.equal(y.nan_to_num(7), (x.float() * scale).to(dtype).nan_to_num(7)), scale
