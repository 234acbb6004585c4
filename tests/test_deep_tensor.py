"""DeepTensor: what it recovers, against decompositions without a prior; masks, stopping rules, units, and messages."""

import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from interpreters import python
from sklearn.base import clone
from torch import nn

from sslkern.decomposition import ConvGenerator, DeepTensor
from sslkern.decomposition._iterates import RunningAverage, truncate, unit_columns
from sslkern.decomposition._observed import standardize


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SLIM = partial(ConvGenerator, width=16, coarsest=8)
Fast = partial(DeepTensor, generator=SLIM, max_iter=120, random_state=0)


def smooth(n, p, rank=2):
    """A matrix of this rank with smooth factors, between 0 and 1."""
    i, j = np.linspace(0, 3, n)[:, None], np.linspace(0, 2, p)[:, None]
    u, v = (np.hstack([np.sin(x * (k + 1)) + 1 for k in range(rank)]) for x in (i, j))
    x = u @ v.T
    return x / x.max()


def smooth_volume(shape=(24, 17, 9)):
    first, second, third = (np.linspace(0, 1, n) for n in shape)
    return np.einsum("i,j,l->ijl", np.exp(-first), 1 + second, np.cos(third)) + np.einsum(
        "i,j,l->ijl", np.sin(5 * first), np.cos(4 * second), 1 + third**2
    )


def error(model, truth):
    return float(np.sqrt(np.square(model.reconstruction_ - truth).mean()) / np.std(truth))


def svd(x, rank):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def test_it_reproduces_a_smooth_matrix_without_noise():
    truth = smooth(41, 30)
    model = Fast(3, max_iter=200, averaging=0.9, learning_rate=3e-3).fit(truth)
    assert error(model, truth) < 0.05
    assert model.n_iter_ == model.best_iter_ == len(model.history_) == 200
    assert model.history_[-1] < 1e-2 * model.history_[0]


def test_it_denoises_better_than_any_truncated_svd():
    """Of a smooth matrix with noise as large as the signal; without a prior, it is no better than the SVD."""
    truth = smooth(64, 48)
    noisy = truth + truth.std() * np.random.default_rng(0).standard_normal(truth.shape)
    best = min(np.sqrt(np.square(svd(noisy, k) - truth).mean()) / truth.std() for k in range(1, 20))
    of_rank = np.sqrt(np.square(svd(noisy, 8) - truth).mean()) / truth.std()
    deep = error(Fast(8, max_iter=60).fit(noisy), truth)
    free = error(Fast(8, max_iter=500, generator="free", learning_rate=3e-2).fit(noisy), truth)
    assert deep < 0.75 * best and deep < 0.3 * of_rank
    assert 0.8 * of_rank < free < 1.2 * of_rank


def test_a_free_pca_is_the_truncated_svd():
    """Without a prior and noise, the optimum of the squared loss is the SVD of the centred data."""
    x = np.random.default_rng(1).standard_normal((12, 9))
    model = DeepTensor(3, generator="free", max_iter=1500, learning_rate=3e-2, averaging=0.9, random_state=0).fit(x)
    expected = svd(x - x.mean(), 3) + x.mean()
    assert np.abs(model.reconstruction_ - expected).max() < 1e-4
    u, v = model.factors_
    np.testing.assert_allclose(v.T @ v, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(u, axis=0), np.linalg.svd(x - x.mean())[1][:3], rtol=1e-4)


@pytest.mark.parametrize("form", ("cp", "nmf"))
def test_a_three_way_array(form):
    truth = smooth_volume() + (3 if form == "nmf" else 0)
    noisy = truth + 0.5 * truth.std() * np.random.default_rng(0).standard_normal(truth.shape)
    model = Fast(4, form=form, generator=SLIM).fit(noisy)
    assert error(model, truth) < (0.25 if form == "cp" else 0.4)  # the noise is 0.5
    assert [f.shape for f in model.factors_] == [(n, 4) for n in truth.shape]
    np.testing.assert_allclose(np.linalg.norm(model.factors_[2], axis=0), 1)
    expected = np.einsum("ir,jr,lr->ijl", *model.factors_) + model.offset_
    np.testing.assert_allclose(model.reconstruction_, expected, atol=1e-12)
    if form == "nmf":
        assert model.offset_ == 0 and all((f >= 0).all() for f in model.factors_)


@pytest.mark.parametrize("loss", ("l2", "poisson"))
def test_nmf_of_counts(loss):
    truth = smooth(40, 33)
    counts = np.random.default_rng(0).poisson(10 * truth)
    model = Fast(4, form="nmf", loss=loss, max_iter=80).fit(counts)
    assert error(model, 10 * truth) < 0.5 * np.sqrt(np.square(svd(counts, 4) - 10 * truth).mean()) / (10 * truth).std()
    assert all((f >= 0).all() for f in model.factors_) and model.offset_ == 0


def test_outliers_need_l1_or_huber():
    truth = smooth(50, 40)
    rng = np.random.default_rng(0)
    spoilt = np.where(rng.random(truth.shape) < 0.1, 10.0, truth)
    errors = {loss: error(Fast(4, loss=loss, max_iter=100).fit(spoilt), truth) for loss in ("l2", "l1", "huber")}
    assert errors["l1"] < 0.2 * errors["l2"] and errors["huber"] < 0.4 * errors["l2"], errors


@pytest.mark.parametrize("loss", ("l2", "l1", "huber", "poisson"))
def test_missing_elements_change_nothing_and_are_filled(loss):
    """NaN, a mask over anything, and a masked array are one; the gap is filled from its neighbours."""
    truth = smooth(40, 30)
    gap = np.ones(truth.shape, bool)
    gap[10:15, 8:14] = gap[30] = False
    with_nan = np.where(gap, truth, np.nan)
    model = Fast(3, loss=loss, max_iter=100, learning_rate=3e-3).fit(with_nan)
    for x, mask in (
        (np.where(gap, truth, 1e9), gap),
        (with_nan, np.ones_like(gap)),
        (np.ma.array(truth, mask=~gap), None),
    ):
        same = Fast(3, loss=loss, max_iter=10, learning_rate=3e-3).fit(x, mask=mask)
        assert np.array_equal(same.history_[:10], model.history_[:10])
    assert np.abs(model.reconstruction_ - truth)[~gap].mean() < 0.2 * truth.std()


def test_the_stopping_rule_holds_out_what_it_judges_by():
    """The result does not depend on the held-out elements before the choice, and is the best of the averages."""
    truth = smooth(48, 40)
    noisy = truth + truth.std() * np.random.default_rng(0).standard_normal(truth.shape)
    settings = dict(averaging=0.9, learning_rate=3e-3)
    model = Fast(10, max_iter=300, stopping="holdout", patience=60, **settings).fit(noisy)
    iterations, values = model.stopping_history_.T
    assert values.min() == values[iterations == model.best_iter_]
    assert model.n_iter_ == model.best_iter_ + 60 < 300
    late = Fast(10, max_iter=300, **settings).fit(noisy)
    assert error(model, truth) < 0.7 * error(late, truth)
    again = Fast(10, max_iter=model.best_iter_, stopping="holdout", **settings).fit(noisy)
    assert np.array_equal(again.reconstruction_, model.reconstruction_)


def test_held_out_elements_are_not_fitted():
    """Elements that the rule holds out may be spoilt without a change in any iterate."""
    x, seen = smooth(30, 20), {}

    class Spy(nn.Module):
        def __init__(self, n, rank):
            super().__init__()
            self.inner = SLIM(n, rank)

        def forward(self):
            seen.setdefault("factors", []).append(out := self.inner())
            return out

    def fit(x):
        seen.clear()
        model = DeepTensor(2, generator=Spy, max_iter=15, stopping="holdout", holdout=0.2, random_state=0).fit(x)
        return model, [f.detach().clone() for f in seen["factors"]]

    from sslkern.decomposition._base import generator
    from sslkern.decomposition._iterates import hold_out

    mask, index = hold_out(torch.Size(x.shape), None, 0.2, torch.device("cpu"), generator(0))
    assert int((~mask).sum()) == len(index[0]) == 120
    spoilt = x.copy()
    order = np.roll(np.arange(120), 1)
    rows, columns = (i.numpy() for i in index)
    spoilt[rows, columns] = x[rows[order], columns[order]]  # the same values, so the same scale
    (first, factors), (second, others) = fit(x), fit(spoilt)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(factors, others, strict=True))
    assert not np.allclose(first.stopping_history_[:, 1], second.stopping_history_[:, 1], rtol=1e-3)


def test_discrepancy_stops_at_the_noise():
    truth = smooth(48, 40)
    noisy = truth + 0.2 * np.random.default_rng(0).standard_normal(truth.shape)
    model = Fast(6, max_iter=800, stopping="discrepancy", noise_std=0.2).fit(noisy)
    (_, before), (iteration, last) = model.stopping_history_[-2:]
    assert last <= 0.04 < before and iteration == model.n_iter_ == model.best_iter_ < 800
    assert error(model, truth) < 0.5


@pytest.mark.parametrize("form", ("pca", "nmf"))
def test_units_do_not_matter(form):
    """A change of units by a power of 2 changes no bit; by 1000, only rounding. A shift moves only the offset."""
    x = smooth(25, 18) + 0.1 * np.random.default_rng(0).random((25, 18))
    model = Fast(3, form=form, max_iter=40).fit(x)
    for unit in (2.0**40, 2.0**-40):
        assert np.array_equal(
            Fast(3, form=form, max_iter=40).fit(x * unit).reconstruction_, model.reconstruction_ * unit
        )
    other = Fast(3, form=form, max_iter=40).fit(x * 1000)
    np.testing.assert_allclose(other.reconstruction_, model.reconstruction_ * 1000, rtol=1e-6)
    np.testing.assert_allclose(other.history_, model.history_ * 1e6, rtol=1e-6)
    if form == "pca":
        shifted = Fast(3, max_iter=40).fit(x + 64)
        np.testing.assert_allclose(shifted.reconstruction_ - 64, model.reconstruction_, atol=1e-6)


@pytest.mark.parametrize("loss", ("l2", "l1", "huber", "poisson"))
@pytest.mark.parametrize("stopping", (None, "holdout"))
def test_history_is_the_loss_in_units_of_the_data(loss, stopping):
    """With one iteration and no averaging, the model of the history is the reconstruction."""
    x = 50 * smooth(22, 17) + 5
    x[3, 4] = np.nan
    model = Fast(3, loss=loss, max_iter=1, averaging=0, delta=0.7, stopping=stopping).fit(x)
    t, m = model.reconstruction_, x
    delta, size = 0.7 * model.scale_, np.abs(t - x)
    if loss == "poisson":
        low = 0.01 * np.nanmean(x)
        each = np.maximum(t, low) - m * (np.log(np.maximum(t, low)) + np.minimum(t / low - 1, 0))
    else:
        each = {"l2": size**2, "l1": size}.get(loss, np.where(size < delta, size**2 / 2, delta * (size - delta / 2)))
    if stopping is None:
        assert model.history_[0] == pytest.approx(np.nanmean(each), rel=1e-9)
    else:
        count = round(0.05 * 373)
        total = model.history_[0] * (373 - count) + model.stopping_history_[0, 1] * count
        assert total == pytest.approx(np.nansum(each), rel=1e-9)


def test_the_average_of_a_matrix_is_the_average_of_the_models():
    """Even when the factors turn; for other forms it is the average of balanced factors."""
    torch.manual_seed(0)
    u, v = torch.randn(15, 2, dtype=torch.float64), torch.randn(11, 2, dtype=torch.float64)
    average, weight, total = RunningAverage(0.5, exact=True), 0.0, 0.0
    for step in range(6):
        turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]
        average.update([(step + 1) * u @ turn, v @ turn])
        weight, total = weight / 2 + 0.5, total / 2 + 0.5 * (step + 1)
    a, b = average.factors
    torch.testing.assert_close(a @ b.T, total / weight * u @ v.T)
    scaled = RunningAverage(0.5, exact=False)
    for factor in (0.1, 3.0, 20.0):
        scaled.update([u * factor, v / factor])
    torch.testing.assert_close(scaled.factors[0] @ scaled.factors[1].T, u @ v.T)


def test_factors_of_more_columns_than_rows():
    torch.manual_seed(0)
    u, v = torch.randn(3, 7), torch.randn(5, 7)
    a, b = truncate([u, v], 7)
    assert a.shape == (3, 7) and b.shape == (5, 7)
    torch.testing.assert_close(a @ b.T, u @ v.T)
    zero = unit_columns([torch.zeros(3, 2), torch.zeros(4, 2)])
    assert all(bool(f.isfinite().all()) for f in zero)
    assert Fast(40, max_iter=10).fit(smooth(9, 7)).factors_[0].shape == (9, 40)


def test_kinds_of_arrays():
    """NumPy for NumPy and lists, tensors for tensors; the precision of X; integers in float64."""
    x = smooth(20, 15)
    model = Fast(2, max_iter=10).fit(x)
    for given in (x.tolist(), torch.from_numpy(x), torch.from_numpy(x).T.contiguous().T, np.asfortranarray(x)):
        other = Fast(2, max_iter=10).fit(given)
        assert isinstance(other.reconstruction_, torch.Tensor) == isinstance(given, torch.Tensor)
        np.testing.assert_allclose(np.asarray(other.reconstruction_), model.reconstruction_, rtol=1e-9)
    single = Fast(2, max_iter=10).fit(x.astype(np.float32))
    assert {a.dtype for a in (*single.factors_, single.reconstruction_)} == {np.dtype("f4")}
    np.testing.assert_allclose(single.reconstruction_, model.reconstruction_, atol=1e-4)
    for given in (x.astype(">f4"), x.astype(">f8"), (9 * x).astype(np.uint8), np.float16(x)):
        assert Fast(2, max_iter=2).fit(given).reconstruction_.dtype == ("f4" if given.dtype == np.float32 else "f8")
    assert Fast(2, max_iter=2).fit(torch.rand(9, 6, dtype=torch.bfloat16)).factors_[0].dtype == torch.float32
    with torch.inference_mode():
        inside = Fast(2, max_iter=10).fit(torch.from_numpy(x)).reconstruction_
    torch.testing.assert_close(inside, torch.from_numpy(model.reconstruction_), rtol=1e-9, atol=0)
    with torch.autocast("cpu"):
        assert np.array_equal(Fast(2, max_iter=10).fit(x).reconstruction_, model.reconstruction_)


@pytest.mark.parametrize("shape", ((1, 1), (1, 9), (9, 1), (2, 3), (3, 40), (5, 5), (16, 17), (33, 129)))
def test_every_size(shape):
    x = np.random.default_rng(0).random(shape)
    model = DeepTensor(2, max_iter=3, random_state=0).fit(x)
    assert model.reconstruction_.shape == shape and np.isfinite(model.reconstruction_).all()
    assert [f.shape for f in model.factors_] == [(n, 2) for n in shape]


@pytest.mark.parametrize("value", (0.0, -3.0, 1e30, 1e-30))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_constant_data(value, dtype):
    model = Fast(2, max_iter=5).fit(np.full((8, 6), value, dtype))
    assert np.abs(model.reconstruction_ - value).max() <= 4 * np.finfo(dtype).eps * (abs(value) or 1e-3)
    if value >= 0:
        for form in ("pca", "nmf"):
            assert np.isfinite(
                Fast(2, form=form, loss="poisson", max_iter=5).fit(np.full((8, 6), value, dtype)).history_
            ).all()


def test_scale_is_of_the_observed_elements():
    x = torch.tensor([[1.0, 3.0, torch.nan], [1.0, 3.0, 1e30]])
    data = standardize(x, torch.tensor([[True, True, False]] * 2), "l2", signed=True)
    assert data.offset == pytest.approx(2) and data.scale == pytest.approx(1) and data.count == 4


def test_same_random_state_same_bits():
    """And the global generator of torch is left alone; another seed gives another result."""
    x = smooth(20, 15)
    before = torch.random.get_rng_state()
    runs = [Fast(2, max_iter=8, random_state=s, stopping="holdout").fit(x).reconstruction_ for s in (3, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(runs[0], runs[1]) and not np.allclose(runs[0], runs[2])
    model = Fast(2, max_iter=8, random_state=3, stopping="holdout").fit(x).fit(x)
    assert np.array_equal(model.reconstruction_, runs[0])
    source = np.random.RandomState(0)
    one, two = (Fast(2, max_iter=2, random_state=source).fit(x).reconstruction_ for _ in range(2))
    assert not np.allclose(one, two)


def test_a_generator_per_mode_and_a_module_of_ones_own():
    class Line(nn.Module):
        """Every column is a straight line."""

        def __init__(self, n, rank):
            super().__init__()
            self.ends = nn.Parameter(torch.randn(2, rank))
            self.register_buffer("x", torch.linspace(0, 1, n)[:, None])

        def forward(self):
            return self.ends[0] * (1 - self.x) + self.ends[1] * self.x

    x = smooth(20, 15)
    model = DeepTensor(2, generator=[Line, "free"], max_iter=20, random_state=0).fit(x)
    bend = np.diff(model.factors_[0], 2, axis=0)
    assert np.abs(bend).max() < 1e-6 < np.abs(np.diff(model.factors_[1], 2, axis=0)).max()


@pytest.mark.parametrize("n, grid", ((2, None), (37, None), (35, (5, 7)), (72, (2, 36)), (210, (5, 6, 7))))
def test_conv_generator_makes_any_size(n, grid):
    module = ConvGenerator(n, 3, width=8, coarsest=4, grid=grid)
    out = module()
    assert out.shape == (n, 3)
    out.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_grid_has_its_last_axis_fastest():
    """A column of an (11, 40) grid is smooth along both axes: neighbours in the grid are neighbours in value."""
    torch.manual_seed(0)
    image = ConvGenerator(440, 1, width=16, coarsest=4, grid=(11, 40))()[:, 0].view(11, 40)
    steps = [image.diff(dim=d).square().mean() for d in (0, 1)]
    wrong = image.reshape(40, 11).diff(dim=0).square().mean()
    assert max(steps) < 0.5 * wrong


def test_conventions_of_scikit_learn(capfd):
    model = DeepTensor(np.int64(2), generator=SLIM, max_iter=2, loss="l1", random_state=0)
    other = clone(model).set_params(rank=3)
    assert other.get_params()["loss"] == "l1" and "rank=3" in repr(other)
    assert model.fit(smooth(9, 8), None) is model and not hasattr(model, "transform")
    assert np.array_equal(pickle.loads(pickle.dumps(model)).reconstruction_, model.reconstruction_)
    model.set_params(progress=True, max_iter=7).fit(smooth(9, 8))
    assert "DeepTensor" in capfd.readouterr().err


def test_without_tqdm_and_scikit_learn():
    """It imports and has its parameters; the progress bar is refused before any work."""
    code = """
import sys
for name in ("tqdm", "sklearn", "scipy"):
    sys.modules[name] = None
from sslkern.decomposition import DeepTensor
model = DeepTensor(1).set_params(max_iter=2)
print(model.get_params()["rank"], model)
model.set_params(progress=True).fit([[]])
"""
    done = python("-c", code)
    assert done.stdout.startswith("1 DeepTensor(rank=1"), done.stderr
    assert done.stderr.strip().endswith("ImportError: progress=True needs tqdm: pip install tqdm.")


X = smooth(9, 8)
BAD = (
    ({"rank": 0}, X, "rank must be an integer >= 1, got 0"),
    ({"max_iter": 0}, X, "max_iter must be an integer"),
    ({"patience": 1.5}, X, "patience must be an integer"),
    ({"form": "svd"}, X, "form must be one of 'pca', 'cp', 'nmf', got 'svd'"),
    ({"loss": "kl"}, X, "loss must be one of"),
    ({"averaging": 1.0}, X, "averaging must be below 1"),
    ({"averaging": -0.1}, X, "averaging must be a number >= 0"),
    ({"holdout": 1}, X, "holdout must be between 0 and 1"),
    ({"learning_rate": 0}, X, "learning_rate must be a finite number > 0"),
    ({"stopping": "early"}, X, "stopping must be one of 'holdout', 'discrepancy'"),
    ({"stopping": "discrepancy"}, X, "noise_std must be a finite number > 0, got None"),
    ({"stopping": "discrepancy", "loss": "l1"}, X, "stopping='discrepancy' needs loss='l2', got 'l1'"),
    ({"stopping": "holdout"}, [[1.0]], "X must have more observed elements"),
    ({"progress": "yes"}, X, "progress must be True or False"),
    ({"random_state": "a"}, X, "random_state must be None, an int"),
    ({"generator": "mlp"}, X, "generator must be 'conv', 'free' or a function"),
    ({"generator": nn.Linear(1, 1)}, X, "generator must be a function .* not a module"),
    ({"generator": ["conv"]}, X, "generator must have one entry per mode of X, 2, got 1"),
    ({"generator": ["conv", 3]}, X, r"generator\[1\] must be"),
    ({"generator": lambda n, rank: n}, X, "generator must return an nn.Module, got int"),
    ({"generator": lambda n, rank: ConvGenerator(n, 2 * rank)}, X, r"mode 0 must return a tensor of shape \(9, 2\)"),
    ({"generator": lambda n, rank: FIXED}, X, "modules with parameters"),
    ({}, X[0], r"X must be a matrix or a 3-way array .* got shape \(8,\)"),
    ({}, np.zeros((0, 3)), "at least one element"),
    ({}, X[None], r"X must be a matrix for form='pca', got shape \(1, 9, 8\): take form='cp'"),
    ({"form": "cp"}, X, "X must be a 3-way array for form='cp'"),
    ({}, X + 1j, "X must be an array of numbers, got complex128"),
    ({}, torch.eye(3).to_sparse(), "X must be a dense tensor"),
    ({}, [["a"]], "X must be an array of numbers"),
    ({}, np.full((3, 3), np.nan), "at least one observed element"),
    ({}, X + np.inf, "X must not contain infinity"),
    ({"loss": "poisson"}, -X, "X must not be negative for loss='poisson'"),
    ({"learning_rate": 1e300}, X, "the loss became nan at iteration 5: lower learning_rate"),
)  # fmt: skip
FIXED = nn.Identity()


@pytest.mark.parametrize("settings, x, message", BAD)
def test_one_sentence(settings, x, message):
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        DeepTensor(**{"rank": 2, "max_iter": 5, **settings}).fit(x)
    assert str(raised.value).count("\n") == 0


def test_one_sentence_about_the_rest():
    for mask, message in (
        (np.ones((2, 2), bool), "mask must have the shape of X"),
        (np.ones(X.shape), "array of bool"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            DeepTensor(2).fit(X, mask=mask)
    for settings, message in (({"n": 1}, "grid must"), ({"n": 6, "grid": (2, 2)}, "n = 6"), ({"width": 0}, "width")):
        with pytest.raises(ValueError, match=message):
            ConvGenerator(**{"n": 8, "rank": 2, **settings})
    with pytest.raises(ValueError, match="coarsest must be"):
        ConvGenerator(8, 2, coarsest=1)
    with pytest.raises(AttributeError, match="not fitted yet"):
        _ = DeepTensor(2).reconstruction_
    assert not hasattr(DeepTensor(2), "reconstruction_")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ("pca", "cp"))
def test_on_a_gpu(form):
    """The same start and nearly the same first iterations as on a CPU; tensors stay on their device."""
    x = smooth_volume() if form == "cp" else smooth(40, 30)
    expected = Fast(3, form=form, max_iter=10).fit(x)
    model = Fast(3, form=form, max_iter=10, stopping="holdout").fit(torch.tensor(x, device="cuda"))
    assert model.reconstruction_.is_cuda and model.factors_[0].is_cuda
    by_device = Fast(3, form=form, max_iter=10, device="cuda").fit(x)
    np.testing.assert_allclose(by_device.reconstruction_, expected.reconstruction_, atol=1e-6)


def test_the_example_at_its_smallest(tmp_path):
    figure = tmp_path / "figure.png"
    flags = ["--quick", "--iterations", "5", "--out", str(figure)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/deep_tensor.py"), *flags], capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.splitlines()[-1].startswith("PASS" if done.returncode == 0 else "FAIL")
    assert figure.stat().st_size > 10_000
