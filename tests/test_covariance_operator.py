"""Covariance operators against autograd's updates, and against the matrices K that they never form."""

import pytest
import torch
from covariance_operators import (
    byol,
    contrastive,
    covariance_of,
    descent,
    jacobians,
    relu_net,
    residual_net,
    views_of,
    within_of,
)
from torch import nn

from sslkern.analysis import byol_covariance_operator, covariance_operator

PAIRS = ("all", "distinct")
LAYERS = (("0", 6), ("2", 6), ("4", 6))


def same(found, expected, tolerance=1e-12):
    scale = expected.abs().max()
    assert scale > 1e-6, "the case proves nothing"
    assert (found - expected).abs().max() <= tolerance * scale


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("beta", (0.0, 0.7))
@pytest.mark.parametrize("layer", ("0", "2", "4"))
@pytest.mark.parametrize(("v", "n"), ((2, 9), (3, 2)))
def test_the_update_of_a_relu_network_is_the_operator_times_the_weight(layer, beta, pairs, v, n):
    """First, middle and last layer, without biases but the last."""
    net, views = relu_net(), views_of(v, n, 6)
    weight = net.get_submodule(layer).weight
    expected = descent(net, weight, views, lambda f: contrastive(f, beta, pairs))
    operator = covariance_operator(net, views, layer, beta=beta, pairs=pairs)
    same(operator.apply(), expected)
    same(operator.apply(weight), expected)
    same(operator.update(), expected)


@pytest.mark.parametrize(("layer", "holds"), (("entry", True), ("inner", False), ("head", True), ("stem.0", False)))
def test_convolutions_a_residual_block_and_pooling(layer, holds):
    """The product with the weight is the update unless a shortcut leads around the layer, or what follows it is not
    homogeneous; `update` always is."""
    net, views = residual_net(), views_of(2, 7, 1, 4, 4)
    weight = net.get_submodule(layer).weight
    for pairs in PAIRS:
        expected = descent(net, weight, views, lambda f, pairs=pairs: contrastive(f, pairs=pairs))
        operator = covariance_operator(net, views, layer, pairs=pairs)
        assert operator.layer == f"{layer}.weight" and operator.shape == (weight.numel(),) * 2
        same(operator.update(), expected)
        error = (operator.apply() - expected).norm() / expected.norm()
        assert error < 1e-12 if holds else error > 1e-2


def test_one_view_and_no_layer():
    """Without augmentation; the last layer by default."""
    net, views = relu_net(), views_of(1, 5, 6)
    operator = covariance_operator(net, views)
    assert operator.layer == "4.weight" and torch.equal(operator.weight, net[4].weight)
    same(operator.apply(), descent(net, net[4].weight, views, contrastive))


def test_where_biases_matter():
    """Biases before the layer, and of the last layer, do not; its own and later ones do, but not for `update`."""
    views = views_of(2, 9, 6)
    biased, last = relu_net(bias=True), relu_net(bias=True)
    for net in (biased, last):
        for layer in net[::2]:
            nn.init.normal_(layer.bias)
    last[2] = nn.Linear(8, 7, bias=False).double()
    for net, layer, holds in ((biased, "4", True), (biased, "2", False), (biased, "0", False), (last, "2", True)):
        expected = descent(net, net.get_submodule(layer).weight, views, contrastive)
        operator = covariance_operator(net, views, layer)
        same(operator.update(), expected)
        error = (operator.apply() - expected).norm() / expected.norm()
        assert error < 1e-12 if holds else error > 1e-2


def test_update_of_any_network():
    """Layer norm, tanh, and a parameter by its own name, of no layer called `weight`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Bilinear(5, 5, 3)).double()
    net.forward = lambda x: net[3](net[:3](x), x[:, :5])
    views = views_of(3, 6, 6)
    for name in ("0.weight", "0.bias", "1", "3"):
        parameter = net.get_parameter(name if "." in name else f"{name}.weight")
        same(covariance_operator(net, views, name).update(), descent(net, parameter, views, contrastive))


@pytest.mark.parametrize(("layer", "v", "n"), (("2", 3, 4), ("4", 2, 2), ("0", 1, 9)))
def test_matrix_norm_and_eigenvectors(layer, v, n):
    """Against K formed row by row: the operator, its terms, and LAPACK's eigenvectors; 56 and 48 elements by ARPACK."""
    net, views = relu_net(), views_of(v, n, 6)
    k = jacobians(net, f"{layer}.weight", views)
    expected = 2 * covariance_of(k.mean(0)) - 0.6 * within_of(k)
    operator = covariance_operator(net, views, layer, beta=0.3)
    same(operator.to_dense(), expected)
    same(operator.between.to_dense(), 2 * covariance_of(k.mean(0)))
    if v > 1:
        same(operator.within.to_dense(), -0.6 * within_of(k))
    operator = operator.between
    values, vectors = torch.linalg.eigh(2 * covariance_of(k.mean(0)))
    assert values[0] > -1e-12 and operator.norm() == pytest.approx(values[-1].item(), rel=1e-10)
    found, directions = operator.eigenvectors(3)
    torch.testing.assert_close(found, values[-3:].flip(0), rtol=1e-9, atol=1e-12)
    assert directions.shape == (3, *net.get_submodule(layer).weight.shape)
    overlap = directions.flatten(1) @ vectors[:, -3:].flip(1)
    if len(set(found.round(decimals=6).tolist())) == 3:
        torch.testing.assert_close(overlap.abs(), torch.eye(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(directions.flatten(1) @ directions.flatten(1).T, torch.eye(3).double())
    assert (found[1:] <= found[:-1]).all()


def test_norm_of_an_indefinite_operator():
    """With much weight on the positive pairs the largest eigenvalue in size is negative."""
    net, views = relu_net(), views_of(2, 5, 6)
    for layer in ("2", "4"):
        operator = covariance_operator(net, views, layer, beta=50.0)
        values = torch.linalg.eigvalsh(operator.to_dense())
        assert values[0] < -values[-1]
        assert operator.norm() == pytest.approx(-values[0].item(), rel=1e-10)
        torch.testing.assert_close(operator.eigenvectors(2)[0], values[-2:].flip(0), rtol=1e-8, atol=1e-12)


def test_weights_of_pairs():
    net, views = relu_net(), views_of(2, 6, 6)
    uniform = torch.full((6, 6), 1 / 30, dtype=torch.float64)
    for pairs in PAIRS:
        expected = covariance_operator(net, views, "2", pairs=pairs).to_dense()
        same(covariance_operator(net, views, "2", weights=uniform, pairs=pairs).to_dense(), expected)
    w = torch.rand(6, 6, dtype=torch.float64)
    k = jacobians(net, "2.weight", views).mean(0)
    differences = k[:, None] - k
    expected = torch.einsum("ij,ijdm,ijdn->mn", w, differences, differences)
    same(covariance_operator(net, views, "2", weights=w).to_dense(), expected)
    symmetric = w + w.T

    def loss(f):
        def of(a, b):
            square = (a[:, None] - b).square().sum(-1) / 2
            return (symmetric * (square.diagonal()[:, None] - square)).sum()

        return torch.stack([of(a, b) for a in f for b in f]).mean()

    for layer in ("0", "2", "4"):
        expected = descent(net, net.get_submodule(layer).weight, views, loss)
        same(covariance_operator(net, views, layer, weights=symmetric).apply(), expected)


def test_info_nce_is_a_weighted_covariance():
    """Without augmentation, the weights are the probabilities of the negatives over N t."""
    net, views, t = relu_net(), views_of(1, 7, 6), 0.3

    def logits(f):
        return -(f[0][:, None] - f[0]).square().sum(-1) / (2 * t)

    def loss(f):
        return nn.functional.cross_entropy(logits(f), torch.arange(7))

    with torch.no_grad():
        weights = logits(net(views[0])[None]).softmax(1) / (7 * t)
    for layer in ("0", "2", "4"):
        expected = descent(net, net.get_submodule(layer).weight, views, loss)
        same(covariance_operator(net, views, layer, weights=weights).apply(), expected, 1e-11)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("batch_norm", (True, False))
@pytest.mark.parametrize("kind", ("number", "none", "symmetric", "matrix", "linear"))
def test_byol_is_its_operator(kind, batch_norm, pairs):
    """Autograd of the loss with a centring layer and a predictor that is not updated; all layers."""
    torch.manual_seed(3)
    matrix = torch.randn(4, 4, dtype=torch.float64) / 2
    predictor = {"number": 0.4, "none": 1, "symmetric": matrix @ matrix.T, "matrix": matrix}.get(kind)
    if kind == "linear":
        predictor = nn.Linear(4, 4, bias=batch_norm).double()
        predict = predictor
    else:
        p = predictor * torch.eye(4).double() if kind in ("number", "none") else predictor

        def predict(z):
            return z @ p.T

    net, views = relu_net(last_bias=batch_norm), views_of(3, 5, 6)
    for layer in ("0", "2", "4"):
        expected = descent(net, net.get_submodule(layer).weight, views, lambda f: byol(f, predict, batch_norm, pairs))
        operator = byol_covariance_operator(net, predictor, views, layer, batch_norm=batch_norm, pairs=pairs)
        same(operator.apply(), expected)
        same(operator.update(), expected)
        same(operator.between.apply() + operator.within.apply(), expected)
        assert operator.symmetric == (kind not in ("matrix", "linear"))
    dense = operator.to_dense()
    same(operator.adjoint.to_dense(), dense.T)
    assert operator.norm() == pytest.approx(torch.linalg.matrix_norm(dense, 2).item(), rel=1e-9)


def test_centring_in_the_backward_alone_is_enough():
    class Centred(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f):
            return f.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad - grad.mean((0, 1))

    net, views = relu_net(), views_of(2, 5, 6)
    for layer in ("0", "2", "4"):
        expected = descent(
            net,
            net.get_submodule(layer).weight,
            views,
            lambda f: byol(Centred.apply(f), lambda z: 0.4 * z, batch_norm=False),
        )
        same(byol_covariance_operator(net, 0.4, views, layer).apply(), expected)


def test_the_implicit_contrastive_term_needs_both():
    """p (1 - p) Cov_i with both; nothing without a predictor; without batch norm, a second moment that is no
    covariance."""
    net, views = relu_net(), views_of(3, 5, 6)
    k, p = jacobians(net, "2.weight", views), 0.4
    covariance = covariance_of(k.mean(0)) * 4 / 5
    moment = torch.einsum("idm,idn->mn", k.mean(0), k.mean(0)) / 5
    both = byol_covariance_operator(net, p, views, "2")
    same(both.between.to_dense(), p * (1 - p) * covariance)
    same(both.within.to_dense(), -(p**2) * within_of(k))
    plain = byol_covariance_operator(net, p, views, "2", batch_norm=False)
    same(plain.between.to_dense(), p * (1 - p) * moment)
    assert torch.equal(plain.within.apply(), both.within.apply())
    for batch_norm in (True, False):
        none = byol_covariance_operator(net, 1.0, views, "2", batch_norm=batch_norm)
        assert none.between.norm() == 0 and not none.between.apply().any()
        assert torch.linalg.eigvalsh(none.to_dense()).max() < 1e-12
