"""Batch norm as an op: what has its kernels, tensors and layouts, and the same call of torch's."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import running_on
from simulator import Unavailable
from simulator import batch_norm as simulated

from sslkern import ops

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
