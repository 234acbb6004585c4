"""`KernelSSL` where its input is singular, degenerate or wrong; scikit-learn's checks; the example."""

import pickle
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from kernels import D, N, data, eye, kernel_of
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.utils._python_dispatch import TorchDispatchMode

from sslkern.decomposition import KernelSSL, RelationGraph


def test_far_samples_are_embedded_as_zero_and_leave_the_others_alone():
    x, y = data()
    model = KernelSSL(3, invariance=0.02).fit(x, y)
    far = np.zeros((3, D))
    far[:, 0] = 1e4, -1e8, 1e200
    z = model.transform(np.concatenate([x, far]))
    assert np.allclose(z[:N], model.embedding_, atol=1e-10) and not z[N:].any()


@pytest.mark.parametrize("ridge", (0.0, 1e-8, 1e-3))
@pytest.mark.parametrize("offset", (0.0, 1e6))
def test_duplicates_make_the_kernel_singular(ridge, offset):
    """Every sample twice gives each the same embedding, and that of single samples up to the scale of L and Z."""
    x, y = data()
    x = x + offset
    twice, labels = np.repeat(x, 2, 0), np.repeat(y, 2)
    model = KernelSSL(4, invariance=0.01, ridge=ridge, gamma=1.0).fit(twice, labels)
    z = model.embedding_
    assert np.isfinite(z).all() and np.allclose(z[::2], z[1::2], atol=1e-8)
    assert np.allclose(model.transform(twice), z, atol=1e-8)
    once = KernelSSL(4, invariance=0.02, ridge=ridge / 2, gamma=1.0).fit(x, y).embedding_
    assert np.allclose(2 * z[::2] @ z[::2].T, once @ once.T, atol=1e-6)


def test_columns_beyond_the_rank_are_zero():
    x, y = data()
    model = KernelSSL(60, kernel="linear", invariance=0.001).fit(x, y)
    assert model.embedding_.shape == (N, 60) and model.dual_coef_.shape == (N, 60)
    assert (model.eigenvalues_ > 0).sum() == D and not model.embedding_[:, D:].any()
    assert model.transform(x[:2]).shape == (2, 60)
    labels = KernelSSL(10, contrastive=True).fit(x, y)
    assert (labels.eigenvalues_ > 0).sum() == 5  # I + G has 5 positive eigenvalues
    exact = KernelSSL(10, contrastive=True, ridge=0.0).fit(x, y)
    assert (exact.eigenvalues_[5:] == 0).all() and not exact.embedding_[:, 5:].any()
    assert KernelSSL(3, ridge=0.0).fit(x[:2], [0, 1]).embedding_.shape == (2, 3)


@pytest.mark.parametrize("n_landmarks", (None, 4))
@pytest.mark.parametrize("ridge", (0.0, 1e-3))
@pytest.mark.parametrize(
    "kernel, x", (("rbf", np.ones((N, D))), ("linear", np.zeros((N, D))), ("linear", np.ones((N, D))))
)
@pytest.mark.parametrize("invariance", (0.0, 1.0))
def test_constant_features_have_a_zero_embedding(invariance, kernel, x, ridge, n_landmarks):
    _, y = data()
    settings = {"invariance": invariance, "ridge": ridge, "n_landmarks": n_landmarks, "random_state": 0}
    model = KernelSSL(2, kernel=kernel, **settings)
    with pytest.warns(UserWarning, match="The embedding is zero"):
        z = model.fit_transform(x, y)
    assert not z.any() and not model.transform(x + 1).any()


def test_a_large_invariance_or_ridge_leaves_nothing():
    x, _ = data()
    connected = RelationGraph.from_neighbors(x, 5)
    for settings in ({"invariance": 1e6}, {"ridge": 1e6}):
        with pytest.warns(UserWarning, match="no direction of the kernel 'rbf' is worth its cost"):
            assert not KernelSSL(2, **settings).fit(x, connected).embedding_.any()


def test_no_edges_is_kernel_pca():
    """Without a relation the objective asks for variance and smoothness: the span of the leading kernel components."""
    x, _ = data()
    alone = RelationGraph.from_edges([], [], N)
    z = torch.from_numpy(KernelSSL(3, ridge=0.1, gamma=0.5).fit(x, alone).embedding_)
    h = eye(N) - 1 / N
    leading = torch.linalg.eigh(h @ kernel_of("rbf", x, x, 0.5) @ h)[1][:, -3:]
    ours = torch.linalg.qr(h @ z)[0]
    assert torch.linalg.svdvals(ours.T @ leading).min() > 0.9


def test_the_user_can_change_their_array_afterwards():
    x, y = data()
    model = KernelSSL(3, invariance=0.02).fit(x, y)
    new = x[:5].copy()
    before = model.transform(new)
    x += 10
    assert np.array_equal(model.transform(new), before)


def test_clone_pickle_and_repr():
    x, y = data()
    model = KernelSSL(3, gamma=0.5, invariance=0.02, n_landmarks=11, random_state=5).fit(x, y)
    copy = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copy.transform(x), model.transform(x))
    assert np.array_equal(clone(model).fit(x, y).dual_coef_, model.dual_coef_)
    assert "gamma=0.5" in repr(model)


@pytest.mark.parametrize(
    "settings, sentence",
    (
        ({"n_components": 0}, "n_components must be an integer >= 1, got 0."),
        ({"n_components": 2.0}, "n_components must be an integer >= 1, got 2.0."),
        ({"n_components": True}, "n_components must be an integer >= 1, got True."),
        ({"n_components": None}, "n_components must be an integer >= 1, got None."),
        ({"n_landmarks": 0}, "n_landmarks must be an integer >= 1, got 0."),
        ({"kernel": "poly"}, "kernel must be one of 'rbf', 'linear', 'cosine', got 'poly'."),
        ({"gamma": "median"}, "gamma must be 'scale', 'auto' or a finite number > 0, got 'median'."),
        ({"gamma": 0.0}, "gamma must be 'scale', 'auto' or a finite number > 0, got 0.0."),
        ({"gamma": np.nan}, "gamma must be 'scale', 'auto' or a finite number > 0, got nan."),
        ({"invariance": -1.0}, "invariance must be a number >= 0, got -1.0."),
        ({"ridge": float("inf")}, "ridge must be a number >= 0, got inf."),
        ({"contrastive": 1}, "contrastive must be"),
        ({"n_landmarks": 3, "random_state": "a"}, "random_state must be None, an int"),
    ),
)
def test_a_wrong_setting_gets_one_sentence(settings, sentence):
    x, y = data()
    with pytest.raises((TypeError, ValueError)) as error:
        KernelSSL(**settings).fit(x, y)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "x, y, sentence",
    (
        (np.ones((1, 3)), [0], "minimum of 2 is required"),
        (torch.ones(1, 3), [0], "at least 2 sample"),
        (np.full((4, 3), np.nan), np.arange(4), "contains NaN"),
        (torch.full((4, 3), np.inf), np.arange(4), "NaN or infinity"),
        (np.ones(4), np.arange(4), "Expected 2D array"),
        (data()[0], None, "the target y is None"),
        (data()[0], np.arange(N - 1), "y must"),
        (data()[0], np.ones((N, N - 1)), "y must"),
        (data()[0], RelationGraph.from_edges([0], [1], N + 1), f"y must relate {N} samples"),
        (data()[0], -np.ones((N, N)), "y must be finite and >= 0"),
        (data()[0] * 1e200, np.arange(N), "X must be scaled"),
    ),
)
def test_wrong_data_gets_one_sentence(x, y, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        KernelSSL().fit(x, y)


def test_new_samples_are_checked():
    x, y = data()
    with pytest.raises(ValueError, match="not fitted"):
        KernelSSL().transform(x)
    model = KernelSSL().fit(x, y)
    for call in (model.transform, model.induced_kernel, lambda wrong: model.induced_kernel(x, wrong)):
        with pytest.raises(ValueError, match="2 features"):
            call(x[:, :2])


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the example with flags; its exit code."""
    monkeypatch.syspath_prepend(ROOT / "examples")

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["kernel_ssl", "--out", str(tmp_path / "figure.png"), *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / "kernel_ssl.py"), run_name="__main__")
        return ended.value.code

    return main


def test_the_example_names_a_wrong_flag(run, capsys):
    for flags, sentence in (
        (("--seeds", "0"), "--seeds must be between 1 and 100, got 0."),
        (("--images", "19"), "--images must be between 20 and 1000, got 19."),
        (("--out", "figure.pdf"), "--out must be the name of a .png file"),
    ):
        assert run(*flags) == 2
        assert sentence in capsys.readouterr().err


class Largest(TorchDispatchMode):
    """The number of elements of the largest dense result of any torch operation."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = [z for z in (out if isinstance(out, tuple | list) else [out]) if isinstance(z, torch.Tensor)]
        self.seen = max(self.seen, *(z.numel() for z in results if z.layout == torch.strided), 0)
        return out


def test_no_matrix_is_n_by_n():
    """With M landmarks, nothing in `fit` is larger than N x M, and nothing in `transform` larger than N x D."""
    n, m = 5_000, 64
    random = np.random.default_rng(0)
    x = random.normal(size=(n, 4))
    graph = RelationGraph.from_edges(*random.integers(n, size=(2, 5 * n)), n)
    model = KernelSSL(3, invariance=0.01, n_landmarks=m, random_state=0)
    with Largest() as fit:
        model.fit(x, graph)
    assert fit.seen == n * m
    with Largest() as transform:
        model.transform(x)
    assert transform.seen == n * 4


@parametrize_with_checks([KernelSSL(), KernelSSL(contrastive=True), KernelSSL(n_landmarks=5)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)
