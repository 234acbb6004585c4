"""The local map of a network: exact on its polytope, by products, without a trace in the network."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from local_maps import NETWORKS, assert_untouched, build, everything, normal
from sentences import complain
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn.parallel import DistributedDataParallel

from sslkern.analysis import LocalAffine, hessian_factors, local_affine
from sslkern.analysis._linearized import Linearized


def jacobians(net, x):
    """One sample at a time, by torch, of networks that it can differentiate twice or once."""
    rows = [jacobian(lambda z: net(z[None].clone())[0].flatten(), sample) for sample in x]
    return torch.stack([row.reshape(row.shape[0], -1) for row in rows])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_network(name, dtype):
    """net(x') = A x' + b at the samples and beside them; A is the Jacobian; and every product is one with A."""
    net, shape = build(name, dtype)
    x = normal(4, *shape, dtype=dtype)
    maps = local_affine(net, x)
    net.eval()
    eps = 200 * torch.finfo(dtype).eps
    close = {"rtol": eps, "atol": eps}
    near = x + 1e-9 * normal(*x.shape, seed=1, dtype=dtype)
    for point in (x, near):
        torch.testing.assert_close(maps(point), net(point.clone()), **close)
    a = jacobians(net, x)
    n, p, d = maps.shape
    assert a.shape == (n, p, d) == (4, maps.offset[0].numel(), x[0].numel())
    assert maps.input_shape == shape and maps.output_shape == net(x.clone()).shape[1:]
    torch.testing.assert_close(maps.matrix(), a, **close)
    v, u = normal(4, d, 3, dtype=dtype), normal(4, p, 3, dtype=dtype)
    torch.testing.assert_close(maps.matmat(v), a @ v, **close)
    torch.testing.assert_close(maps.rmatmat(u), a.mT @ u, **close)
    torch.testing.assert_close(maps.matmat(v[0]), a @ v[0], **close)
    torch.testing.assert_close(maps.matvec(v[..., 0]), (a @ v)[..., 0], **close)
    torch.testing.assert_close(maps.matvec(v[0, :, 0]), (a @ v[0])[..., 0], **close)
    torch.testing.assert_close(maps.rmatvec(u[..., 0]), (a.mT @ u)[..., 0], **close)
    for i in (0, 2, -1, np.int64(1)):
        one = maps[i]
        assert one.shape == (p, d)
        torch.testing.assert_close(one.matrix(), a[i], **close)
        torch.testing.assert_close(one.offset, maps.offset[i], **close)
        torch.testing.assert_close(one.matvec(v[i, :, 0]), (a @ v)[i, :, 0], **close)
        torch.testing.assert_close(one.rmatmat(u[i]), (a.mT @ u)[i], **close)
        torch.testing.assert_close(one(x[i]), net(x.clone())[i], **close)


class Scalars(nn.Module):
    """From one number to one number, without dimensions for features."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 4).double()

    def forward(self, x):
        return self.linear(x[:, None]).relu().sum(1)


def test_samples_without_features():
    net, x = Scalars(), normal(3)
    maps = local_affine(net, x)
    assert maps.shape == (3, 1, 1) and maps[1].shape == (1, 1) and maps.output_shape == maps.input_shape == ()
    torch.testing.assert_close(maps(x), net(x).detach())
    torch.testing.assert_close(maps[1](x[1]), net(x)[1].detach())
    factors = hessian_factors(net, "linear", x)
    assert factors.maps().shape == (3, 1, 4) and factors.root.shape == (3, 4)
    m, h = factors.maps()[:, 0], factors.inputs
    torch.testing.assert_close(factors.matrix(), 2 * (m.mT * h[:, 0] ** 2) @ m)


def test_hardsigmoid():
    """torch's own gradient of it has a slope of 1/6 in float32, and none of second order."""
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Hardsigmoid()).double(), normal(5, 4)
    near = x + 1e-4 * normal(5, 4, seed=1)
    torch.testing.assert_close(local_affine(net, x)(near), net(near).detach(), rtol=0, atol=1e-15)


def test_another_polytope_has_another_map():
    """The test above can fail: beyond a border, A x' + b is not the network."""
    net, shape = build("mlp")
    x = normal(2, *shape)
    maps = local_affine(net, x)
    assert (maps(-x) - net.eval()(-x)).abs().max().item() > 0.1


def test_as_a_linear_operator_of_scipy():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    net, shape = build("conv")
    one = local_affine(net, normal(2, *shape))[1]
    a, matrix = one.as_linear_operator(), one.matrix().numpy()
    assert isinstance(a, linalg.LinearOperator) and a.shape == matrix.shape and a.dtype == np.float64
    v, u = normal(matrix.shape[1], 2).numpy(), normal(matrix.shape[0], 2).numpy()
    for found, true in (
        *((a @ v, matrix @ v), (a @ v[:, 0], matrix @ v[:, 0]), (a @ v[:, :1], matrix @ v[:, :1])),
        *((a.T @ u, matrix.T @ u), (a.rmatvec(u[:, 0]), matrix.T @ u[:, 0])),
    ):
        np.testing.assert_allclose(found, true, atol=1e-13)
    s = linalg.svds(a, 2, return_singular_vectors=False)
    np.testing.assert_allclose(s, np.linalg.svd(matrix, compute_uv=False)[1::-1], rtol=1e-10)


@pytest.mark.parametrize("name", ("conv", "own norms", "mlp"))
def test_the_network_stays_as_it_was(name, monkeypatch):
    """Also when it raises in the middle."""
    net, shape = build(name)
    weight = next(net.parameters())
    weight.grad = torch.ones_like(weight)
    before = everything(net)
    maps = local_affine(net, normal(3, *shape))
    maps[0].matrix(), maps.matvec(normal(maps.shape[-1]))
    assert_untouched(net, before)
    monkeypatch.setattr(net[-1], "forward", fail)
    before = everything(net)
    with pytest.raises(OSError):
        local_affine(net, normal(2, *shape))
    assert_untouched(net, before)


def fail(x):
    if isinstance(x, torch.Tensor):  # torch.fx passes
        raise OSError
    return x


class Writing(nn.Module):
    """Writes into a buffer in every mode, and shares memory with its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return F.relu_(x) + self.linear(x)


def test_buffers_and_samples_are_not_written_into():
    net, x = Writing(), normal(2, 3)
    try:
        local_affine(net, x)
    except ValueError as error:
        assert "net must" in str(error)
    assert net.calls == 0 and torch.equal(x, normal(2, 3))


@pytest.mark.parametrize("context", ("no_grad", "inference", "autocast", "frozen", "requires_grad"))
def test_contexts(context):
    """Gradients switched off around it, half precision around it, frozen parameters, samples with gradients."""
    net, shape = build("conv", torch.float32)
    x = normal(2, *shape, dtype=torch.float32)
    true = local_affine(net, x).matrix()
    around = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }.get(context, torch.enable_grad)
    net.requires_grad_(context != "frozen")
    x.requires_grad_(context == "requires_grad")
    with around():
        z = x.clone() if context == "inference" else x
        maps = local_affine(net, z)
        assert torch.equal(maps.matrix(), true)
        torch.testing.assert_close(maps[1].matrix(), true[1])
    assert not maps.matrix().requires_grad and x.grad is None


def test_wrapped_networks(tmp_path):
    """torch.compile, DistributedDataParallel, DataParallel, and both together."""
    net, shape = build("conv")
    x = normal(2, *shape)
    true = local_affine(net, x).matrix()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(net)
        for wrapped in (torch.compile(net), parallel, torch.compile(parallel), nn.DataParallel(net)):
            assert torch.equal(local_affine(wrapped, x).matrix(), true)
    finally:
        dist.destroy_process_group()


def test_weights_that_changed_raise():
    """An optimizer's step in place, and a weight that was replaced."""
    net, shape = build("mlp")
    maps = local_affine(net, normal(2, *shape))
    one = maps[0]
    with torch.no_grad():
        net[1].weight.mul_(2)
    for call in (lambda: maps.matvec(normal(7)), lambda: one.rmatvec(normal(20)), lambda: maps[1]):
        with pytest.raises(RuntimeError, match=r"the weights of net have changed: call local_affine again\."):
            call()
    assert local_affine(net, normal(2, *shape)).matrix().isfinite().all()


def test_constants_and_dead_networks():
    """No output depends on x: A is zero."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.constant_(net[0].bias, -100.0)
    maps = local_affine(net, normal(2, 3))
    assert not maps.matrix().any() and torch.equal(maps.offset, net[2].bias.detach().expand(2, 2))


class Mean(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Hard(nn.Module):
    def forward(self, x):
        return F.hardsigmoid(x)


NET, SHAPE = build("mlp")
X = normal(3, 7)
MAPS = local_affine(NET, X)
HUGE = nn.Linear(7, 2).double()
nn.init.constant_(HUGE.weight, 1e10)
BAD = {
    "function": (TypeError, "net must be a torch.nn.Module, got", lambda: local_affine(torch.relu, X)),
    "x list": (TypeError, "x must be a floating-point torch.Tensor", lambda: local_affine(NET, X.tolist())),
    "x integers": (TypeError, "x must be a floating-point", lambda: local_affine(NET, X.long())),
    "x half": (TypeError, "x must be float32 or float64", lambda: local_affine(NET, X.half())),
    "x float32": (
        TypeError,
        "x must have the dtype and the device of net, float64",
        lambda: local_affine(NET, X.float()),
    ),
    "no rows": (ValueError, "x must have at least 1 row", lambda: local_affine(NET, X[:0])),
    "no features": (ValueError, "x must have at least one number", lambda: local_affine(NET, X[:, :0])),
    "NaN": (ValueError, "x must be finite", lambda: local_affine(NET, X * float("nan"))),
    "GELU": (ValueError, "net must be", lambda: local_affine(nn.Sequential(nn.Linear(7, 2), nn.GELU()).double(), X)),
    "softmax": (ValueError, "net must be", lambda: local_affine(nn.Softmax(-1), X)),
    "once": (ValueError, "net must have gradients that can be differentiated", lambda: Linearized(Once.apply, X)),
    "functional": (ValueError, "torch reports: derivative for aten::hardsigmoid", lambda: local_affine(Hard(), X)),
    "mean": (ValueError, "net must", lambda: local_affine(Mean(), X)),
    "overflow": (ValueError, "net must return finite numbers", lambda: local_affine(HUGE, 1e300 * X)),
    "v shape": (ValueError, "v must be a floating-point tensor (3, 7, k)", lambda: MAPS.matmat(normal(8, 2))),
    "v of one": (ValueError, "v must be a floating-point tensor (7, k)", lambda: MAPS[0].matvec(normal(8))),
    "u shape": (ValueError, "u must be a floating-point tensor (3, 20, k)", lambda: MAPS.rmatvec(normal(7))),
    "v list": (ValueError, "v must be a floating-point tensor", lambda: MAPS.matvec([1.0] * 7)),
    "v float32": (TypeError, "v and x must have the same dtype", lambda: MAPS.matvec(normal(7).float())),
    "index": (IndexError, "the sample must be an integer from -3 to 2, got 3", lambda: MAPS[3]),
    "slice": (IndexError, "the sample must be an integer", lambda: MAPS[:2]),
    "twice": (TypeError, "this is the map of one sample", lambda: MAPS[0][0]),
    "length": (TypeError, "this is the map of one sample", lambda: len(MAPS[0])),
    "operator": (ValueError, "a must be the map of one sample, got those of 3", lambda: MAPS.as_linear_operator()),
    "call": (ValueError, "x must have shape (3, 7)", lambda: MAPS(X[0])),
}


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    complain(*BAD[name])


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"as_linear_operator needs SciPy: pip install scipy\."):
        MAPS[0].as_linear_operator()
    assert "shape=(3, 20, 7)" in repr(MAPS) and isinstance(MAPS, LocalAffine) and len(MAPS) == 3
