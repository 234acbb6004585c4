"""The Hessian of the squared error in the weight of a layer: that of autograd, of the formula, and by products."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from local_maps import assert_untouched, build, everything, normal
from sentences import complain
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from sslkern.analysis import HessianFactors, extreme_singular_values, hessian_factors

LAYERS = {  # network -> layers to differentiate
    "mlp": ("1", "3"),
    "dense": ("first", "second"),
    "conv": ("0", "1", "3.conv", "3.norm", "7"),
    "tokens": ("0", "2"),
    "own norms": ("3", "4"),
    "affine": ("",),
    "one feature": ("0",),
}
CASES = [(name, layer) for name, layers in LAYERS.items() for layer in layers]


def by_torch(net, layer, x, y):
    """The Hessian of the sum of squares by torch, of a network whose batch norms are torch's own."""
    import copy

    import sslkern.nn

    net = sslkern.nn.convert_batchnorm(copy.deepcopy(net), back=True).eval()
    key = f"{layer}.weight".lstrip(".")
    weight = net.get_submodule(layer).weight.detach()
    loss = hessian(lambda w: (functional_call(net, {key: w}, (x.clone(),)) - y).square().sum(), weight)
    return loss.reshape(weight.numel(), -1)


@pytest.mark.parametrize("name, layer", CASES)
def test_it_is_that_of_autograd(name, layer):
    """To 1e-10 of its largest entry, whatever the targets; every product is one with it."""
    net, shape = build(name)
    x = normal(6, *shape)
    y = normal(*net.eval()(x.clone()).shape, seed=1)
    net.train()
    factors = hessian_factors(net, layer, x)
    true = by_torch(net, layer, x, y)
    scale = true.abs().max().item()
    assert scale > 0 or name == "one feature"
    close = {"rtol": 0, "atol": 1e-10 * scale}
    found = factors.matrix()
    assert found.shape == factors.shape == true.shape
    torch.testing.assert_close(found, true, **close)
    torch.testing.assert_close(found, by_torch(net, layer, x, 0 * y), **close)
    v = normal(*factors.weight_shape, seed=2)
    torch.testing.assert_close(factors.matvec(v).flatten(), true @ v.flatten(), rtol=1e-9, atol=1e-10 * scale)
    assert torch.equal(factors.matvec(v.flatten()), factors.matvec(v).flatten())
    torch.testing.assert_close(factors.matmat(normal(v.numel(), 3)), true @ normal(v.numel(), 3), rtol=1e-9, atol=1e-9)
    root = factors.root.dense()
    assert root.shape == (y.numel(), v.numel()) and factors.rank_bound == min(root.shape)
    torch.testing.assert_close(root.mT @ root, true, **close)


@pytest.mark.parametrize("name, layer", (("mlp", "1"), ("mlp", "3"), ("dense", "second"), ("own norms", "3")))
def test_it_is_the_formula(name, layer):
    """H = 2 sum_i (M_i'M_i) (x) (h_i h_i'), with h_i the input of the layer."""
    net, shape = build(name)
    factors = hessian_factors(net, net.get_submodule(layer), normal(5, *shape))
    m, h = factors.maps(), factors.inputs
    assert m.shape[::2] == (5, factors.weight_shape[0]) and h.shape == (5, factors.weight_shape[1])
    terms = [torch.kron(m_i.mT @ m_i, torch.outer(h_i, h_i)) for m_i, h_i in zip(m, h, strict=True)]
    torch.testing.assert_close(2 * torch.stack(terms).sum(0), factors.matrix(), rtol=1e-10, atol=1e-12)


def test_its_eigenvalues():
    """From R, against eigvalsh of H, with zeros where there are fewer outputs than weights."""
    net, shape = build("mlp")
    for n in (2, 40):
        factors = hessian_factors(net, "1", normal(n, *shape))
        true = torch.linalg.eigvalsh(factors.matrix())
        p = len(true)
        for k in (1, 4, p):
            for settings in ({}, {"method": "dense"}):
                found = factors.extreme_singular_values(k, **settings)
                assert found.converged and found.shape == (p, p) and found.largest.shape == (k,)
                scale = 1e-11 * true[-1].item()
                torch.testing.assert_close(found.largest, true.flip(0)[:k], rtol=0, atol=scale)
                torch.testing.assert_close(found.smallest, true[:k], rtol=0, atol=scale)
        found = extreme_singular_values(factors, 2)
        np.testing.assert_allclose(found.largest, true.flip(0)[:2], rtol=1e-8)
        if n == 2:
            assert factors.rank_bound == p - int((found.smallest == 0).sum()) or factors.rank_bound <= 40
            assert factors.condition() == float("inf")


def test_its_condition_is_the_square_of_that_of_its_root():
    """Where H is too ill-conditioned for its own products, R still tells."""
    net = nn.Linear(3, 2).double()
    x = normal(50, 3) * torch.tensor([1, 1e-3, 1e-6], dtype=torch.float64)
    factors = hessian_factors(net, net, x)
    true = torch.linalg.cond(x) ** 2
    assert factors.condition() == pytest.approx(true.item(), rel=1e-8)
    assert true > 1e11
    with pytest.raises(RuntimeError, match='pass method="dense"'):
        hessian_factors(nn.Linear(400, 1), "", normal(420, 400, dtype=torch.float32)).condition(max_products=20)


def test_gradient_descent_sees_it():
    """One step of Newton's method with H, from any weight of the piece, reaches the minimum of an affine network."""
    net = nn.Linear(4, 3, bias=False).double()
    x, y = normal(30, 4), normal(30, 3, seed=1)
    h = hessian_factors(net, net, x).matrix()
    gradient = torch.autograd.grad((net(x) - y).square().sum(), net.weight)[0]
    w = net.weight - torch.linalg.solve(h, gradient.flatten()).reshape(3, 4)
    torch.testing.assert_close(w, torch.linalg.lstsq(x, y).solution.mT, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name, layer", (("conv", "3.conv"), ("own norms", "3")))
def test_the_network_stays_as_it_was(name, layer):
    net, shape = build(name)
    before = everything(net)
    factors = hessian_factors(net, layer, normal(3, *shape))
    factors.matvec(normal(*factors.weight_shape)), factors.condition(method="dense")
    assert_untouched(net, before)
    with pytest.raises(RuntimeError):
        hessian_factors(net, layer, normal(3, *shape)[..., :-1])
    assert_untouched(net, before)
    if layer == "3":
        factors.maps()
        assert_untouched(net, before)


def test_wrapped_networks_and_contexts():
    """In DataParallel, in no_grad, in float32."""
    net, shape = build("mlp", torch.float32)
    x = normal(4, *shape, dtype=torch.float32)
    true = hessian_factors(net, "1", x).matrix()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wrapped = hessian_factors(nn.DataParallel(net), "1", x)
        assert wrapped.matrix().dtype == torch.float32 and torch.equal(wrapped.matrix(), true)
        wrapped.maps()
    double = hessian_factors(net.double(), "1", x.double()).matrix()
    torch.testing.assert_close(true.double(), double, rtol=1e-4, atol=1e-5 * double.abs().max().item())


def test_weights_that_changed_raise():
    net, shape = build("mlp")
    factors = hessian_factors(net, "1", normal(4, *shape))
    torch.optim.SGD(net.parameters(), 0.1).step()
    net[3].weight.data = net[3].weight.data.clone()  # the same parameter
    factors.matvec(normal(*factors.weight_shape))
    with torch.no_grad():
        net[3].weight.add_(1)
    for call in (factors.maps, lambda: factors.matvec(normal(*factors.weight_shape)), factors.matrix):
        with pytest.raises(RuntimeError, match=r"the weights of net have changed: call hessian_factors again\."):
            call()


class Tied(nn.Module):
    """Uses one weight twice, in two layers or in one."""

    def __init__(self, layers):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.twice = layers == 1
        if layers == 2:
            self.second.weight = self.first.weight

    def forward(self, x):
        return (self.first if self.twice else self.second)(F.relu(self.first(x)))


NET = build("mlp")[0]
CONV = build("conv")[0]
X = normal(3, 7)
SMOOTH = nn.Sequential(nn.Linear(7, 2), nn.GELU(), nn.Linear(2, 2)).double()
BAD = {
    "function": (TypeError, "net must be a torch.nn.Module", lambda: hessian_factors(torch.relu, "1", X)),
    "name": (ValueError, "layer must be a layer of net or its name, got '9'", lambda: hessian_factors(NET, "9", X)),
    "number": (TypeError, "layer must be a layer of net or its name, got int", lambda: hessian_factors(NET, 1, X)),
    "another": (ValueError, "does not contain this Linear", lambda: hessian_factors(NET, nn.Linear(7, 9), X)),
    "no weight": (ValueError, "layer must have a parameter named weight", lambda: hessian_factors(NET, "2", X)),
    "x": (TypeError, "x must be a floating-point torch.Tensor", lambda: hessian_factors(NET, "1", [1.0])),
    "dtype": (TypeError, "x must have the dtype and the device of net", lambda: hessian_factors(NET, "1", X.float())),
    "NaN": (ValueError, "x must be finite", lambda: hessian_factors(NET, "1", X * float("nan"))),
    "unused": (ValueError, "layer must be used by net", lambda: hessian_factors(Tied(1), "second", X[:, :3].float())),
    "twice": (ValueError, "used more than once", lambda: hessian_factors(Tied(1), "first", X[:, :3].float())),
    "tied": (ValueError, "used more than once", lambda: hessian_factors(Tied(2), "second", X[:, :3].float())),
    "GELU": (ValueError, "net must be", lambda: hessian_factors(SMOOTH, "0", X)),
    "maps": (ValueError, "maps needs a torch.nn.Linear", lambda: hessian_factors(CONV, "0", normal(2, 2, 6, 6)).maps()),
    "v": (ValueError, "v must have shape (9, 7) or (63,)", lambda: hessian_factors(NET, "1", X).matvec(X)),
    "V": (ValueError, "v must have shape (63, k)", lambda: hessian_factors(NET, "1", X).matmat(X)),
    "v dtype": (TypeError, "v and x must have the same", lambda: hessian_factors(NET, "1", X).matvec(torch.ones(63))),
    "k": (ValueError, "k must be at most 63", lambda: hessian_factors(NET, "1", X).extreme_singular_values(64)),
}


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    complain(*BAD[name])


def test_what_comes_before_the_layer_may_bend_smoothly():
    """Only what follows must be piecewise affine."""
    factors = hessian_factors(SMOOTH, "2", X)
    torch.testing.assert_close(factors.matrix(), by_torch(SMOOTH, "2", X, torch.zeros(3, 2)), rtol=1e-10, atol=1e-12)
    assert isinstance(factors, HessianFactors) and "shape=(4, 4), rank_bound=4" in repr(factors)
