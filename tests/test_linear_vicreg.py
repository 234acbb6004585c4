"""LinearVICReg: its closed form against descent and other solvers, scikit-learn's conventions, and degenerate data."""

import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from spectral import cosines, descend, start, vicreg

from sslkern.decomposition import LinearVICReg, RelationGraph


def samples(n=60, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 5, np.arange(n) % 4


def test_scikit_learns_checks():
    check_estimator(LinearVICReg(), on_skip=None)


@pytest.mark.parametrize("relation", ("labels", "neighbors"))
@pytest.mark.parametrize("seed", (0, 1))
def test_descent_reaches_the_closed_form(relation, seed):
    x, labels = samples(seed=seed)
    graph = RelationGraph.from_labels(labels) if relation == "labels" else RelationGraph.from_neighbors(x, 3)
    model = LinearVICReg(3).fit(x, graph)
    wide = torch.from_numpy(x - x.mean(0))

    def objective(w):
        return vicreg(wide @ w, graph, model.invariance_)

    w, value = descend(objective, 0.1 * start(6, 3, seed=seed))
    best = torch.from_numpy(model.components_.T)
    closed = float(objective(best))
    assert abs(value - closed) <= 1e-6 * closed
    assert (w @ w.T - best @ best.T).norm() <= 1e-4 * (best @ best.T).norm()


def test_it_solves_the_generalised_eigenproblem():
    x, labels = samples()
    graph = RelationGraph.from_labels(labels)
    centred = x - x.mean(0)
    b = centred.T @ graph.laplacian(torch.from_numpy(centred)).numpy() / 60
    mu, w = scipy.linalg.eigh(b, centred.T @ centred / 60)
    model = LinearVICReg(3).fit(x, labels)
    assert np.allclose(model.eigenvalues_, mu[:3]) and np.isclose(model.invariance_, 1 / (2 * mu[2]))
    scaled = w[:, :3] * np.sqrt(1 - mu[:3] / (2 * mu[2]))
    assert np.allclose(np.abs(model.components_), np.abs(scaled.T))
    z = model.transform(x)
    assert np.allclose(z.T @ z / 60, np.diag(1 - mu[:3] / (2 * mu[2]))) and np.allclose(z.mean(0), 0)
    assert (LinearVICReg(3, invariance=1 / mu[1] + 1e-9).fit(x, labels).components_[1:] == 0).all()


def test_balanced_classes_give_the_directions_of_a_discriminant_analysis():
    x, labels = samples(80)
    ours = LinearVICReg(3).fit(x, labels).components_
    theirs = LinearDiscriminantAnalysis(solver="eigen").fit(x, labels).scalings_[:, :3]
    assert cosines(torch.from_numpy(ours.T), torch.from_numpy(theirs)).min() > 1 - 1e-8


def test_more_features_than_samples_is_the_map_on_their_span():
    rng = np.random.default_rng(0)
    x, basis = rng.normal(size=(20, 7)), np.linalg.qr(rng.normal(size=(50, 7)))[0]
    labels = np.arange(20) % 3
    small, large = LinearVICReg(4).fit(x, labels), LinearVICReg(4).fit(x @ basis.T, labels)
    assert np.allclose(small.eigenvalues_, large.eigenvalues_)
    assert np.allclose(np.abs(small.components_), np.abs(large.components_ @ basis))
    assert np.allclose(large.components_ @ (np.eye(50) - basis @ basis.T), 0)
    wide = LinearVICReg(5).fit(rng.normal(size=(8, 40)), np.arange(8) % 2)  # every class can collapse to a point
    assert np.isfinite(wide.components_).all() and (wide.eigenvalues_[:1] == 0).all()


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_constant_and_repeated_features_and_samples(dtype):
    x, labels = samples()
    wide = np.concatenate((x, x[:, :2], np.full((60, 1), 3.0)), 1).astype(dtype)
    wide, labels = np.concatenate((wide, wide)), np.concatenate((labels, labels))
    plain = LinearVICReg(3).fit(np.concatenate((x, x)), labels)
    model = LinearVICReg(3).fit(wide, labels)
    assert model.components_.dtype == dtype and np.abs(model.components_[:, -1]).max() < 1e-3
    tolerance = 1e-8 if dtype == np.float64 else 2e-3
    assert np.allclose(model.eigenvalues_, plain.eigenvalues_, rtol=tolerance)
    z, expected = model.transform(wide), plain.transform(np.concatenate((x, x)))
    assert np.allclose(np.abs(z), np.abs(expected), atol=tolerance * 10)


def test_components_beyond_the_rank_are_0_with_a_warning():
    x, labels = samples()
    wide = np.repeat(x[:, :1], 3, 1)
    with pytest.warns(UserWarning, match="span only 1 dimensions, so the last 2 of 3 components are 0"):
        model = LinearVICReg(3).fit(wide, labels)
    assert (model.components_[1:] == 0).all() and np.isinf(model.eigenvalues_).tolist() == [False, True, True]
    assert np.isclose(model.transform(wide).var(0)[0], 0.5)
    with pytest.warns(UserWarning, match="span only 0 dimensions"):
        model = LinearVICReg(1).fit(np.ones((4, 2)), [0, 0, 1, 1])
    assert (model.transform(np.ones((4, 2))) == 0).all()


def test_no_relation_whitens():
    x, _ = samples()
    model = LinearVICReg(6).fit(x, RelationGraph.from_edges([], [], 60))
    z = model.transform(x)
    assert np.allclose(z.T @ z / 60, np.eye(6)) and model.invariance_ == 1 and (model.eigenvalues_ == 0).all()


def test_every_kind_of_relation_is_the_same():
    x, labels = samples()
    graph = RelationGraph.from_labels(labels)
    expected = LinearVICReg(2).fit(x, labels).components_
    for y in (graph, labels.tolist(), torch.from_numpy(labels), graph.to_scipy(), graph.to_scipy().toarray()):
        assert np.allclose(LinearVICReg(2).fit(x, y).components_, expected)
    assert np.allclose(LinearVICReg(2).fit(x, np.array([*"abcd"])[labels]).components_, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_tensors_in_tensors_out(dtype):
    x, labels = samples()
    given = torch.from_numpy(x).to(dtype)
    model = LinearVICReg(2).fit(given, labels)
    for value in (model.components_, model.eigenvalues_, model.mean_, model.transform(given)):
        assert isinstance(value, torch.Tensor) and value.dtype == dtype
    plain = LinearVICReg(2).fit(x, labels)
    assert np.allclose(model.transform(given), plain.transform(x), atol=1e-3 if dtype == torch.float32 else 1e-10)
    assert isinstance(model.transform(x), np.ndarray)


def test_pipelines_clones_and_pickles():
    x, labels = load_wine(return_X_y=True)
    pipe = make_pipeline(LinearVICReg(2), KNeighborsClassifier(5)).fit(x, labels)
    assert pipe.score(x, labels) > 0.95
    assert clone(pipe).fit(x, labels).score(x, labels) == pipe.score(x, labels)
    assert pickle.loads(pickle.dumps(pipe)).score(x, labels) == pipe.score(x, labels)
    x, labels = load_digits(return_X_y=True)  # three pixels are constant
    assert np.isfinite(LinearVICReg(9).fit_transform(x, labels)).all()


@pytest.mark.parametrize(
    ("settings", "x", "y", "error", "said"),
    (
        ({"n_components": 0}, None, None, ValueError, "n_components must be an integer >= 1, got 0"),
        ({"n_components": 7}, None, None, ValueError, "n_components must be at most the number of features, 6, got 7"),
        ({"n_components": 2.0}, None, None, ValueError, "n_components must be an integer"),
        ({"invariance": -1}, None, None, ValueError, "invariance must be a number >= 0"),
        ({}, None, "none", ValueError, "requires y to be passed, but the target y is None"),
        ({}, None, [0, 1], ValueError, "y must relate 60 samples, got 2"),
        ({}, None, np.linspace(0, 1, 60), ValueError, "y must be integers or strings"),
        ({}, np.full((60, 6), np.nan), None, ValueError, "NaN"),
        ({}, torch.full((60, 6), torch.inf), None, ValueError, "X must be finite"),
        ({}, np.ones((1, 6)), [0], ValueError, "minimum of 2 is required"),
        ({}, torch.ones(1, 6), [0], ValueError, "at least 2 sample"),
    ),
)
def test_a_wrong_argument_gets_one_sentence(settings, x, y, error, said):
    given, labels = samples()
    x = given if x is None else x
    y = labels if y is None else None if isinstance(y, str) else y
    with pytest.raises(error, match=said):
        LinearVICReg(**settings).fit(x, y)
