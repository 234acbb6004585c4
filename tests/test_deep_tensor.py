"""DeepTensor: what it recovers, against decompositions without a prior; masks, stopping rules, units, and messages."""

import numpy as np
import pytest
import torch
from deep_tensors import SLIM, Fast, error, smooth, smooth_volume, svd
from torch import nn

from sslkern.decomposition import DeepTensor
from sslkern.decomposition._iterates import RunningAverage, truncate, unit_columns


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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

    from sslkern.core.generators import generator
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
