"""The ridge path: scikit-learn's Ridge and RidgeClassifier for every decay, singular matrices, inputs and messages."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from memory import allocated
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge, RidgeClassifier

from sslkern.analysis import RidgePath, ridge_path
from sslkern.analysis import _ridge as ridge

DECAYS = (1e-2, 1.0, 37.0, 1e4)
NAN, INF = float("nan"), float("inf")


def problem(n, d, columns=2, seed=0):
    """x far from centred, with features of different scales; targets; test samples."""
    random = np.random.default_rng(seed)
    scale = np.logspace(-1, 1, d)
    x, new = (random.normal(size=(rows, d)) * scale + 5 for rows in (n, 23))
    return x, random.normal(size=(n, columns)) - 3, new


def close(found, truth, tolerance=1e-10):
    assert found.shape == truth.shape
    assert abs(found - truth).max() <= tolerance * max(1, abs(truth).max()), abs(found - truth).max()


@pytest.fixture(params=(None, 40), ids=("one block", "blocks"))
def blocks(request, monkeypatch):
    """In blocks of one or few rows and columns too."""
    if request.param:
        monkeypatch.setattr(ridge, "_BLOCK", request.param)


@pytest.mark.parametrize("intercept", (True, False))
@pytest.mark.parametrize("n, d", ((80, 7), (12, 30), (9, 9), (10, 9), (1, 4), (30, 1), (2, 1)))
def test_it_is_ridge(n, d, intercept, blocks):
    """Weights, intercepts and predictions for every decay, and the errors of test targets."""
    x, y, new = problem(n, d)
    truth = np.random.default_rng(1).normal(size=(23, 2))
    path = ridge_path(x, y, DECAYS, new, truth, fit_intercept=intercept, weights=True)
    assert path.weights.shape == (4, 2, d) and path.intercepts.shape == (4, 2) and path.predictions.shape == (4, 23, 2)
    for k, decay in enumerate(DECAYS):
        model = Ridge(alpha=decay, fit_intercept=intercept, solver="svd").fit(x, y)
        close(path.weights[k], model.coef_)
        close(path.intercepts[k], np.broadcast_to(model.intercept_, 2))
        close(path.predictions[k], model.predict(new))
        close(path.errors[k], ((model.predict(new) - truth) ** 2).mean(0))
    assert path.accuracies is None and path.classes is None
    flat = ridge_path(x, y[:, 1], DECAYS, new, truth[:, 1], fit_intercept=intercept, weights=True)
    for name, shape in {"weights": (4, d), "intercepts": (4,), "predictions": (4, 23), "errors": (4,)}.items():
        both = getattr(path, name)
        close(getattr(flat, name), both[:, 1] if name == "weights" else both[..., 1], 1e-12)
        assert getattr(flat, name).shape == shape


@pytest.mark.parametrize("classes", (10, 3, 2, 1))
@pytest.mark.parametrize("n", (150, 40))
def test_it_is_the_ridge_classifier(classes, n, blocks):
    """Predictions, weights, and the accuracy of every class, on digits."""
    x, y = load_digits(n_class=max(classes, 2), return_X_y=True)
    y = y + 3 if classes > 1 else np.full(len(y), 7)
    path = ridge_path(x[:n], y[:n], DECAYS, x[200:], y[200:], weights=True)
    for k, decay in enumerate(DECAYS):
        model = RidgeClassifier(alpha=decay, solver="svd").fit(x[:n], y[:n])
        guess = model.predict(x[200:])
        assert np.array_equal(path.predictions[k], guess)
        close(path.weights[k], np.atleast_2d(model.coef_))
        close(path.intercepts[k], np.broadcast_to(model.intercept_, path.intercepts[k].shape))
        assert path.accuracies[k] == pytest.approx((guess == y[200:]).mean(), abs=1e-15)
        close(path.class_accuracies[k], np.array([(guess == c)[y[200:] == c].mean() for c in path.classes]), 1e-15)
    assert np.array_equal(path.classes, np.unique(y)) and path.errors is None


@pytest.mark.parametrize("labels", ([0, 1, 1, 0], [2, 1, 0, 2, 1, 0], [5]))
def test_ties_go_to_the_first_class(labels):
    """Constant features tell nothing, and every score is equal; as in scikit-learn."""
    x = np.full((len(labels), 3), 0.7)
    path = ridge_path(x, labels, DECAYS, x, labels)
    assert (path.predictions == RidgeClassifier().fit(x, labels).predict(x)).all()
    assert (path.degrees_of_freedom == 0).all() and (path.predictions == min(labels)).all()


def test_labels_of_any_kind():
    x, y = load_digits(n_class=3, return_X_y=True)
    truth = ridge_path(x[:100], y[:100], [1.0], x[100:], y[100:])
    names = np.array(["one", "three", "zero"])  # sorted
    for labels in (names[y], names[y].astype(object), names[y].tolist()):
        path = ridge_path(x[:100], labels[:100], [1.0], x[100:], labels[100:])
        assert path.classes.tolist() == names.tolist()
        assert np.array_equal(path.predictions, names[truth.predictions])
        assert np.array_equal(path.class_accuracies, truth.class_accuracies)
    assert "zero" in path.table() or "one" in path.table() or "three" in path.table()
    tensors = ridge_path(
        *map(torch.from_numpy, (x[:100], y[:100])), torch.ones(1), *map(torch.from_numpy, (x[100:], y[100:]))
    )
    assert torch.equal(tensors.predictions, torch.from_numpy(truth.predictions))
    assert isinstance(tensors.class_accuracies, torch.Tensor) and torch.equal(tensors.classes, torch.arange(3))
    mixed = ridge_path(x[:100], torch.from_numpy(y[:100]), [1.0], x[100:], y[100:])
    assert isinstance(mixed.predictions, torch.Tensor) and isinstance(mixed.accuracies, np.ndarray)
    flags = ridge_path(x[:100], y[:100] > 0, [1.0], x[100:], y[100:] > 0)
    assert flags.predictions.dtype == bool and flags.accuracies[0] > 0.9
    some = ridge_path(x[:100], y[:100], [1.0], x[100:][y[100:] != 1], y[100:][y[100:] != 1])
    assert np.isnan(some.class_accuracies[0]).tolist() == [False, True, False] and "nan" not in some.table()


@pytest.mark.parametrize("shape", ((40, 6), (10, 30)))
def test_degrees_of_freedom(shape):
    """The trace of the hat matrix, column by column, less the 1 of the intercept; N - 1 or D without decay."""
    x = problem(*shape)[0]
    path = ridge_path(x, np.eye(len(x)), (0, *DECAYS), x)
    for k, fit in enumerate(path.predictions):
        assert path.degrees_of_freedom[k] == pytest.approx(np.trace(fit) - 1, abs=1e-8)
    assert path.degrees_of_freedom[0] == pytest.approx(min(shape[1], shape[0] - 1))


@pytest.mark.parametrize("n, d", ((40, 8), (8, 40), (20, 20), (1, 5)))
@pytest.mark.parametrize("fault", (None, "duplicates", "constant", "all constant"))
def test_no_decay_is_the_smallest_least_squares_solution(n, d, fault):
    x, y, _ = problem(n, d)
    if fault == "duplicates":
        x[:, 1] = x[:, 0]
    elif fault:
        x[:, : d if fault == "all constant" else 2] = 0.7
    path = ridge_path(x, y, [0.0, 1e-30, 1.0], weights=True)
    centred = np.where(np.ptp(x, axis=0) == 0, 0, x - x.mean(0))
    truth = np.linalg.lstsq(centred, y - y.mean(0))[0].T
    for k in (0, 1):
        close(path.weights[k], truth, 1e-9)
    close(path.weights[2], Ridge(alpha=1.0, solver="svd").fit(x, y).coef_)


@pytest.mark.parametrize("n, d", ((60, 12), (12, 60)))
def test_small_singular_values_are_kept(n, d):
    """Singular values from 1 to 1e-11, and a direction without any: the fit of lstsq and of Ridge by an SVD, which a
    plain Gram matrix misses by far."""
    random = np.random.default_rng(0)
    k = min(n, d) - 2
    left, right = (np.linalg.qr(random.normal(size=(m, k)))[0] for m in (n, d))
    left = np.linalg.qr(left - left.mean(0))[0]
    x = left * np.logspace(0, -11, k) @ right.T
    y = left @ random.normal(size=(k, 2)) + random.normal(size=2)
    path = ridge_path(x, y, [0.0, 1e-20, 1e-12], x)
    close(path.predictions[0], y, 1e-3)  # eps/1e-11
    for k in (1, 2):
        close(path.predictions[k], Ridge(alpha=path.decays[k], solver="svd").fit(x, y).predict(x), 1e-5)
    gram = (x - x.mean(0)).T @ (x - x.mean(0)) if n > d else (x - x.mean(0)) @ (x - x.mean(0)).T
    assert np.linalg.eigvalsh(gram)[2] < 0 or np.linalg.eigvalsh(gram)[2] > 1e-19


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.int64))
def test_it_is_computed_in_float64(dtype):
    """Equal to Ridge in float64 on the same numbers, though they are far from 0; only the result is rounded."""
    x, y, new = (torch.from_numpy(part) for part in problem(60, 8))
    x, new = ((100 * part).to(dtype) for part in (x, new))
    path = ridge_path(x, y.float(), DECAYS, new, weights=True)
    expected = torch.float64 if dtype == torch.int64 else torch.float32
    assert path.weights.dtype == path.predictions.dtype == path.intercepts.dtype == expected
    assert path.decays.dtype == path.degrees_of_freedom.dtype == torch.float64
    for k, decay in enumerate(DECAYS):
        model = Ridge(alpha=decay).fit(x.double().numpy(), y.float().double().numpy())
        close(path.predictions[k].double().numpy(), model.predict(new.double().numpy()), 1e-6)


def test_layouts_gradients_and_inputs_that_are_kept():
    x, y, new = problem(40, 6)
    truth = ridge_path(x, y, DECAYS, new)
    for other in (
        x.tolist(),
        np.asfortranarray(x),
        torch.from_numpy(x)[:, None].expand(-1, 2, -1)[:, 1],
        x.astype(">f8"),
    ):
        found = ridge_path(other, y, list(DECAYS), new)
        close(np.asarray(found.predictions), truth.predictions, 1e-13)
    leaf = torch.from_numpy(x).requires_grad_()
    found = ridge_path(leaf, torch.from_numpy(y).requires_grad_(), torch.tensor(DECAYS), torch.from_numpy(new))
    assert not found.predictions.requires_grad and leaf.grad is None
    assert np.array_equal(x, problem(40, 6)[0])
    again = ridge_path(x, y, DECAYS, new)
    assert np.array_equal(again.predictions, truth.predictions)
    backwards = ridge_path(x, y, DECAYS[::-1], new)
    assert np.array_equal(backwards.predictions[::-1], truth.predictions)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(ridge_path(x, y, DECAYS, new).predictions, truth.predictions)


def test_memory_is_that_of_the_predictions(monkeypatch):
    """Not that of targets of all classes, 16 MB here, nor that of the scores for all decays, 32 MB."""
    monkeypatch.setattr(ridge, "_BLOCK", 50_000)  # 0.4 MB
    x, labels = torch.randn(4000, 8), torch.arange(4000) % 500
    peaks = []
    for n in (1, 80):
        call = partial(ridge_path, x, labels, np.logspace(-2, 4, n), x[:100], labels[:100])
        peaks.append(allocated(call)[0])
    assert peaks[0] < 5e6 and peaks[1] - peaks[0] < 1e6, peaks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    for shape in ((200, 30), (30, 200)):
        x, y, new = (torch.from_numpy(part) for part in problem(*shape))
        here, there = (ridge_path(x.to(d), y, DECAYS, new, weights=True) for d in ("cpu", "cuda"))
        assert there.predictions.is_cuda and there.weights.is_cuda and there.degrees_of_freedom.is_cuda
        close(there.predictions.cpu().numpy(), here.predictions.numpy())
        labels = torch.arange(len(x)) % 3
        here, there = (ridge_path(x.to(d), labels, DECAYS, x, labels) for d in ("cpu", "cuda"))
        assert torch.equal(there.predictions.cpu(), here.predictions) and "worst class" in there.table()


X, Y, LABELS = np.ones((5, 3)), np.ones(5), np.arange(5) % 2


@pytest.mark.parametrize(
    "arguments, options, error, sentence",
    (
        ((Y, Y, [1.0]), {}, ValueError, "x must have shape (N, D) with at least one row and one column, got (5,)."),
        ((X[:0], Y[:0], [1.0]), {}, ValueError, "x must have shape (N, D) with at least one row"),
        ((X * NAN, Y, [1.0]), {}, ValueError, "x must be finite, but it contains NaN or infinity."),
        ((X.astype(str), Y, [1.0]), {}, TypeError, "x must be an array of numbers, got <U"),
        ((torch.ones(5, 3).to_sparse(), Y, [1.0]), {}, TypeError, "x must be dense and real, got torch.sparse_coo"),
        (([[1.0, 2], [3]], Y, [1.0]), {}, ValueError, "x must be an array, got lists of different lengths."),
        ((X, Y[:4], [1.0]), {}, ValueError, "y must have shape (5,) or (5, C) for 5 samples, got (4,)."),
        ((X, Y * INF, [1.0]), {}, ValueError, "y must be finite, but it contains NaN or infinity."),
        ((X, X.astype(int), [1.0]), {}, ValueError, "y must have one label for each of the 5 samples, got"),
        ((X, Y + 1j, [1.0]), {}, TypeError, "y must be labels, integers or strings, got complex128."),
        ((X, np.array([1, "a", 2, 3, 4], object), [1.0]), {}, TypeError, "y must be all integers or all strings"),
        ((X, Y, []), {}, ValueError, "decays must have shape (L,) with L >= 1, got (0,)."),
        ((X, Y, 1.0), {}, ValueError, "decays must have shape (L,) with L >= 1, got ()."),
        ((X, Y, [1.0, -2.0]), {}, ValueError, "decays must be finite and >= 0, got -2."),
        ((X, Y, [NAN]), {}, ValueError, "decays must be finite and >= 0, got nan."),
        ((X, Y, ["1"]), {}, TypeError, "decays must be an array of numbers, got <U1."),
        ((X, Y, [1.0], np.ones((2, 4))), {}, ValueError, "x_test must have the 3 columns of x, got shape (2, 4)."),
        ((X, Y, [1.0], X * INF), {}, ValueError, "x_test must be finite"),
        ((X, Y, [1.0], None, Y), {}, ValueError, "y_test needs x_test, got y_test alone."),
        ((X, Y, [1.0], X, X), {}, ValueError, "y_test must have as many columns as y, 1, got shape (5, 3)."),
        ((X, LABELS, [1.0], X, LABELS + 1), {}, ValueError, "y_test must have only labels of y, got '2'."),
        ((X, LABELS, [1.0], X, Y), {}, TypeError, "y_test must be labels, integers or strings, got float64."),
        ((X, Y, [1.0]), {"weights": 1}, TypeError, "weights must be True or False, got 1."),
        ((X, Y, [1.0]), {"fit_intercept": None}, TypeError, "fit_intercept must be True or False, got None."),
    ),
    ids=str,
)  # fmt: skip
def test_messages(arguments, options, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        ridge_path(*arguments, **options)


def test_the_table():
    x, y, new = problem(40, 6)
    assert isinstance(ridge_path(x, y, DECAYS), RidgePath)
    lines = ridge_path(x, y, DECAYS, new, np.ones((23, 2))).table().splitlines()
    assert lines[0].split() == ["decay", "degrees", "of", "freedom", "mean", "squared", "error"] and len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert ridge_path(x, y, DECAYS).table().splitlines()[1].split()[0] == "0.01"
    labels = np.arange(40) % 3
    assert "worst class" in ridge_path(torch.from_numpy(x), labels, DECAYS, x, labels).table()
