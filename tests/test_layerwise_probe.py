"""Layerwise ridge probes: scikit-learn's classifiers, from sums; what they leave alone, and what they refuse."""

import copy
import re

import numpy as np
import pytest
import ranks
import torch
from memory import allocated
from sklearn.linear_model import RidgeClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sslkern.analysis import layerwise_probe

NAN = float("nan")


def samples(n, d, classes=3, seed=0, shift=0.0, dtype=torch.float64):
    """Classes that a linear classifier separates in part."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=generator)
    x = 0.5 * centres[y] + torch.randn(n, d, generator=generator, dtype=torch.float64) + shift
    return x.to(dtype), y


def network(inputs, widths=(9, 40, 5), dtype=torch.float64):
    torch.manual_seed(1)
    layers = [nn.BatchNorm1d(inputs, affine=False)]
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU(inplace=True), nn.Dropout(0.9)]
        inputs = width
    return nn.Sequential(*layers[:-2]).to(dtype)


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def expected(net, result, train, test):
    """The accuracies (L, S) of scikit-learn's classifiers on the features of the layers, in float64."""
    net = copy.deepcopy(net).eval()
    features = {}
    for name in result.layers:
        cut = net[: int(name) + 1]
        with torch.no_grad():
            features[name] = [cut(x).double().numpy() for x, _ in (train, test)]

    def score(x, held, alpha):
        solver = "svd" if x.shape[1] < len(x) else "cholesky"
        return RidgeClassifier(alpha, solver=solver).fit(x, train[1].numpy()).score(held, test[1].numpy())

    rows = zip(features.values(), result.alphas.tolist(), strict=True)
    return torch.tensor([[score(*pair, alpha) for alpha in alphas] for pair, alphas in rows], dtype=torch.float64)


@pytest.mark.parametrize("size", (1, 60, 100))
@pytest.mark.parametrize("n", (61, 20))
def test_it_is_ridge_classification(n, size):
    """For 61 samples the layers of 9, 5 and 40 features are primal, and for 20 samples the one of 40 is dual."""
    train, test = samples(n, 8), samples(50, 8, seed=1)
    net = network(8)
    result = layerwise_probe(net, batches(*train, size), validation=batches(*test, 13))
    assert result.layers == ("0", "1", "2", "4", "5", "7") and result.n_features == (8, 9, 9, 40, 40, 5)
    assert (result.n_train, result.n_test, result.classes) == (n, 50, (0, 1, 2)) and not result.left_out
    torch.testing.assert_close(result.accuracy, expected(net, result, train, test), rtol=0, atol=1e-12)
    assert len(result.accuracy.unique()) > 6


@pytest.mark.parametrize("classes", (2, 5))
def test_large_means_and_other_labels(classes):
    """A mean of 1e6 standard deviations costs no accuracy, in float64 sums of float32 features too. Any integers are
    classes. A class that was not seen in training counts as an error."""
    (x, y), (held, labels) = samples(80, 6, classes, shift=1e6), samples(70, 6, classes, 1, shift=1e6)
    for dtype in (torch.float64, torch.float32):
        train, test = (x.to(dtype), 10 * y - 3), (held.to(dtype), 10 * labels - 3)
        # strengths at which float32 inputs and their float64 copies are the same problem
        found = layerwise_probe(nn.ReLU(), batches(*train, 9), validation=batches(*test, 9), strengths=(1e-3, 1))
        assert found.classes == tuple(10 * c - 3 for c in range(classes))
        scores = [
            RidgeClassifier(a, solver="svd").fit(train[0].double(), train[1]).score(test[0].double(), test[1])
            for a in found.alphas[0].tolist()
        ]
        np.testing.assert_allclose(found.accuracy[0], scores, rtol=0, atol=1e-12)
        spread = train[0].double().var(0).sum() * 79 / 6
        torch.testing.assert_close(found.alphas[0], torch.tensor([1e-3, 1.0]).double() * spread, rtol=1e-6, atol=0)
    test[1][::2] = 1000
    unseen = layerwise_probe(nn.ReLU(), batches(*train, 9), validation=[test], strengths=(1,))
    assert 0 < float(unseen.accuracy) <= 0.5


@pytest.mark.parametrize("n", (83, 21))
def test_folds(n):
    """Without validation, the accuracy is that of scikit-learn on the folds that deal the samples of each class in
    turn; the batches do not matter."""
    x, y = samples(n, 8)
    net = network(8)
    result = layerwise_probe(net, batches(x, y, 10), folds=4)
    seen, fold = {}, []
    for label in y.tolist():
        fold.append((seen.setdefault(label, 0) + label) % 4)
        seen[label] += 1
    fold, hits = torch.tensor(fold), 0
    for k in range(4):
        train, test = ((x[rows], y[rows]) for rows in (fold != k, fold == k))
        hits = hits + expected(net, result, train, test) * len(test[1])
    torch.testing.assert_close(result.accuracy, hits / n, rtol=0, atol=1e-12)
    assert result.n_train == result.n_test == n
    for size in (1, n):
        assert torch.equal(layerwise_probe(net, batches(x, y, size), folds=4).accuracy, result.accuracy)
    order = y.argsort()  # sorted by class, which would leave classes out of folds of batches
    assert float(layerwise_probe(net, batches(x[order], y[order], 10)).best_accuracy.max()) > 0.5


def test_float32_and_bfloat16():
    """Features of lower precision are those of the same network; the sums are in float64."""
    train, test = samples(200, 8, dtype=torch.float32), samples(200, 8, seed=1, dtype=torch.float32)
    net = network(8, dtype=torch.float32)
    result = layerwise_probe(net, batches(*train, 32), validation=batches(*test, 32))
    wide = expected(net, result, train, test)
    assert float((result.accuracy - wide).abs().max()) <= 0.005  # one sample near a boundary
    half = layerwise_probe(
        net.bfloat16(), [(x.bfloat16(), y) for x, y in batches(*train, 32)], validation=[(test[0].bfloat16(), test[1])]
    )
    assert float((half.best_accuracy - result.best_accuracy).abs().max()) < 0.06
    with torch.autocast("cpu", torch.bfloat16):
        auto = layerwise_probe(net.float(), batches(*train, 32), validation=batches(*test, 32))
    assert float((auto.best_accuracy - result.best_accuracy).abs().max()) < 0.06


def test_constant_features_tell_the_largest_class():
    x, y = samples(40, 3)
    share = float(y.bincount().max()) / 40
    result = layerwise_probe(nn.ReLU(), [(torch.full((40, 3), 0.7, dtype=torch.float64), y)], validation=[(x, y)])
    assert (result.accuracy == share).all()
    dead = torch.cat([x, torch.zeros(40, 2, dtype=torch.float64), x], 1)  # dead and duplicated features
    assert layerwise_probe(nn.Tanh(), [(dead, y)], validation=[(dead, y)]).best_accuracy > share


def test_memory_does_not_grow_with_the_samples():
    """Once there are more samples than features, the peak is the same for four times as many."""
    net = network(8, (64, 64))

    class Made:
        def __init__(self, count):
            self.count = count

        def __iter__(self):
            return (samples(50, 8, seed=k) for k in range(self.count))

    peaks = [allocated(lambda n=n: layerwise_probe(net, Made(n), validation=Made(n)))[0] for n in (6, 24)]
    assert peaks[1] <= 1.01 * peaks[0] and peaks[1] < 16 * 64 * 64 * 8, peaks


def test_the_model_is_left_as_it_was():
    """Modes, parameters, buffers, gradients, hooks and random numbers; and after an exception too."""
    x, y = samples(60, 8)
    net = network(8).train()
    net[1].eval()
    net[1](x).sum().backward()
    calls = []
    net[2].register_forward_hook(lambda *_: calls.append(1))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes, grads = [m.training for m in net.modules()], [p.grad for p in net.parameters()]
    data = DataLoader(TensorDataset(x, y), batch_size=16)
    nans = [*data, (x[:3] * NAN, y[:3])]
    broken = [*data, (x[:3], y[:2])]
    wrong = [*data, (x[:3, :5], y[:3])]
    for loader, error in ((data, None), (nans, ValueError), (broken, ValueError), (wrong, RuntimeError)):
        torch.manual_seed(5)
        if error is None:
            layerwise_probe(net, loader)
        else:
            with pytest.raises(error):
                layerwise_probe(net, loader)
        after = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(after, torch.rand(3))
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert [m.training for m in net.modules()] == modes and [p.grad for p in net.parameters()] == grads
        ran = len(calls)
        net[2](torch.zeros(1, 9, dtype=torch.float64))
        assert len(calls) == ran + 1 and all(len(m._forward_hooks) == (m is net[2]) for m in net.modules())


@pytest.mark.parametrize(
    ("settings", "loader", "said"),
    (
        ({}, [(0, 1)], "loader must give pairs (x, y) of tensors, got tuple of 2."),
        ({}, [torch.zeros(3, 8)], "loader must give pairs (x, y) of tensors, got Tensor."),
        ({}, [(torch.zeros(3, 8), torch.zeros(3))], "loader must give integer labels (N,) as a tensor, got float32."),
        ({}, [(torch.zeros(3, 8), torch.zeros(4).long())], "loader must give one label for each row of x, got x of"),
        ({}, [], "loader must have samples of at least two classes, got 0 of the classes []."),
        ({}, [(torch.zeros(30, 8).double(), torch.ones(30).long())], "got 30 of the classes [1]."),
        ({}, [(torch.zeros(9, 8).double(), torch.arange(9))], "loader must have at least 10 samples, got 9."),
        ({}, iter([1]), "loader must be readable twice if there is no validation, but it is an iterator"),
        ({}, 3, "loader must be an iterable of pairs (x, y), got int."),
        ({"validation": 3}, None, "validation must be an iterable of pairs (x, y), got int."),
        ({"validation": []}, None, "validation must have at least one sample, got none."),
        ({"folds": 1}, None, "folds must be an integer >= 2, got 1."),
        ({"strengths": []}, None, "strengths must have at least one number."),
        ({"strengths": 1.0}, None, "strengths must be a sequence of numbers > 0, got 1.0."),
        ({"strengths": (1, 0)}, None, "each of strengths must be a finite number > 0, got 0"),
        ({"group": 3}, None, "group must be None, 'world'"),
    ),
)
def test_one_sentence(settings, loader, said):
    x, y = samples(40, 8)
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        layerwise_probe(network(8), [(x, y)] if loader is None else loader, **settings)


def test_inputs_are_not_overwritten():
    """Modules that work in place get a copy, so that batches in a list stay as they are."""
    x, y = samples(40, 8)
    kept = x.clone()
    result = layerwise_probe(nn.Sequential(nn.ReLU(inplace=True), nn.Tanh()), [(x, y)])
    assert torch.equal(x, kept) and len(result.layers) == 2


def test_batches_that_differ_are_refused():
    """Folds need the same batches twice. Features must be finite, and the layer is named that has others."""
    x, y = samples(40, 8)
    data = TensorDataset(x, y)
    with pytest.raises(ValueError, match="but it shuffles"):
        layerwise_probe(network(8), DataLoader(data, 8, shuffle=True))
    assert layerwise_probe(network(8), DataLoader(data, 8, shuffle=True), validation=[(x, y)]).n_test == 40

    class Noisy:
        def __iter__(self):
            return iter([(x + torch.rand(()), y)])

    with pytest.raises(ValueError, match="the same batches twice if there is no validation, but they differ"):
        layerwise_probe(network(8), Noisy())
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        net[2].weight[0, 0] = NAN
    for rows in (40, 3):
        with pytest.raises(
            ValueError, match="layers must have finite features, but '2' has NaN or infinity for loader"
        ):
            layerwise_probe(net, [(x[:rows], torch.arange(rows))], validation=[(x, y)])
    with pytest.raises(ValueError, match="'0' has NaN or infinity for validation"):
        layerwise_probe(nn.Sequential(nn.ReLU()), [(x, y)], validation=[(x / 0, y)])


def check_ranks():
    """Ranks with different numbers of batches, and of one class each: the result of one process on all samples."""
    net, rank = network(8), torch.distributed.get_rank()
    for n in (90, 20):
        train, test = samples(n, 8, shift=100.0), samples(60, 8, seed=1, shift=100.0)
        order = train[1].argsort(stable=True)
        train = train[0][order], train[1][order]
        alone = layerwise_probe(net, [train], validation=[test])
        for cut in (n // 3, 0):
            own = [part[:cut] if rank else part[cut:] for part in (*train, *test)]
            loaders = batches(*own[:2], 7) if len(own[0]) else [], batches(*own[2:], 9) if len(own[2]) else []
            joint = layerwise_probe(net, loaders[0], validation=loaders[1], group="world")
            assert torch.equal(joint.accuracy, alone.accuracy) and joint.layers == alone.layers
            torch.testing.assert_close(joint.alphas, alone.alphas, rtol=1e-12, atol=0)
            assert (joint.n_train, joint.n_test, joint.classes) == (n, 60, (0, 1, 2))
        wrapped = nn.parallel.DistributedDataParallel(net)
        folded = layerwise_probe(wrapped, batches(*(part[rank::2] for part in train), 7), group="world")
        assert folded.n_test == n and float(folded.best_accuracy.max()) > 0.4
    wrong = [(train[0] * NAN, train[1])] if rank else [train]
    with pytest.raises(ValueError, match="'0' has NaN"):
        layerwise_probe(net, wrong, validation=[test], group="world")
    for settings, said in (
        ({}, "must give pairs"),
        ({"folds": 1}, "folds must be"),
        ({"layers": ["none"]}, "layers must"),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=said if rank else "rank 1"):
            own = settings if rank else {}
            layerwise_probe(net, [3] if rank and not own else [train], validation=[test], group="world", **own)


def test_ranks(tmp_path):
    ranks.run(2, [check_ranks], tmp_path)
