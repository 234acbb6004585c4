"""Accuracy by class and strength: SciPy's paired test, corrections, false discoveries, planted classes that pay."""

import numpy as np
import pytest
import torch
from scipy import stats

from sslkern.analysis import per_class_accuracy, per_class_effect

NAN = float("nan")
STRENGTHS = (0.0, 1.0, 3.0, 10.0)


def accuracies(runs=6, classes=5, seed=0, spread=0.02):
    """Runs with a level of their own, and a mean that rises with the strength."""
    random = np.random.default_rng(seed)
    level = 0.6 + 0.05 * random.normal(size=(runs, 1, 1))
    rise = 0.03 * np.arange(len(STRENGTHS))[:, None]
    return level + rise + spread * random.normal(size=(runs, len(STRENGTHS), classes))


def counted(runs, classes, images, share, random):
    """Accuracies of classes with this many images, which no strength changes."""
    chance = np.clip(random.beta(20 * share, 20 * (1 - share), classes), 0, 1)
    return random.binomial(images, chance, (runs, len(STRENGTHS), classes)) / images


def interval(values, alpha):
    """Student's interval by SciPy."""
    return stats.t.interval(1 - alpha, len(values) - 1, values.mean(), stats.sem(values))


@pytest.mark.parametrize("alpha", (0.05, 0.2))
def test_means_intervals_and_paired_tests_are_those_of_scipy(alpha):
    a = accuracies()
    a[:, :, 2] -= 0.08 * np.arange(4)
    result = per_class_effect(a, STRENGTHS, alpha=alpha)
    mean = a.mean(2)
    assert (result.baseline, result.strength, result.best_strength) == (0.0, 10.0, 10.0)
    np.testing.assert_allclose(result.mean, mean.mean(0), rtol=0, atol=1e-14)
    for s in range(4):
        np.testing.assert_allclose(result.mean_intervals[s], interval(mean[:, s], alpha), rtol=0, atol=1e-13)
    for c in range(5):
        change = a[:, 3, c] - a[:, 0, c]
        np.testing.assert_allclose(result.class_means[:, c], a[:, :, c].mean(0), rtol=0, atol=1e-14)
        np.testing.assert_allclose(result.class_intervals[1, c], interval(a[:, 1, c], alpha), rtol=0, atol=1e-13)
        np.testing.assert_allclose(result.change_intervals[c], interval(change, alpha), rtol=0, atol=1e-13)
        assert result.changes[c] == pytest.approx(change.mean(), abs=1e-14)
        assert result.p_values[c] == pytest.approx(stats.ttest_rel(a[:, 3, c], a[:, 0, c]).pvalue, rel=1e-10)
    change = mean[:, 3] - mean[:, 0]
    assert result.mean_change == pytest.approx(change.mean(), abs=1e-14)
    assert result.mean_p_value == pytest.approx(stats.ttest_1samp(change, 0).pvalue, rel=1e-10)
    np.testing.assert_allclose(result.mean_change_interval, interval(change, alpha), rtol=0, atol=1e-13)
    assert result.best_per_class.tolist() == [10.0, 10.0, 0.0, 10.0, 10.0]
    assert result.classes_that_pay == result.losers == ("2",)


def test_corrections_by_hand():
    """Benjamini and Hochberg: C/k p_(k), monotone from the largest; Holm: (C - k + 1) p_(k), from the smallest."""
    a = accuracies(classes=4, spread=0.04, seed=3)
    p = per_class_effect(a, STRENGTHS).p_values
    first, second, third, fourth = np.sort(p)
    bh, holm = (4 * first, 2 * second, 4 / 3 * third, fourth), (4 * first, 3 * second, 2 * third, fourth)
    by_hand = {"bh": [min(bh[k:]) for k in range(4)], "holm": [max(holm[: k + 1]) for k in range(4)]}
    for correction, expected in by_hand.items():
        found = per_class_effect(a, STRENGTHS, correction=correction)
        np.testing.assert_allclose(found.corrected_p_values[p.argsort()], np.minimum(expected, 1), rtol=1e-12)
        assert found.correction == correction and (found.p_values == p).all()


@pytest.mark.parametrize("runs, images, correction", ((3, 10, "bh"), (5, 10, "bh"), (5, 300, "bh"), (10, 20, "holm")))
def test_false_discoveries_are_as_rare_as_promised(runs, images, correction):
    """Without an effect, every finding is false: an experiment has one with a probability of at most alpha, also where
    accuracies are shares of few images, and also at the strength that is best on the mean."""
    random = np.random.default_rng(runs + images)
    found = {None: 0, 10.0: 0}
    for _ in range(150):
        a = counted(runs, 30, images, 0.8, random)
        for strength in found:
            result = per_class_effect(a, STRENGTHS, strength=strength, correction=correction)
            found[strength] += bool((result.falls | result.rises).any())
    for count in found.values():
        assert stats.binomtest(count, 150, 0.05, "greater").pvalue > 1e-3, found


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_a_plain_t_test_finds_classes_where_nothing_is():
    """Why equal changes get the p-value of signs: with 3 runs of 10 images, SciPy's test says 0 for some of them."""
    random = np.random.default_rng(0)
    false = 0
    for _ in range(40):
        a = counted(3, 30, 10, 0.8, random)
        with np.errstate(all="ignore"):
            plain = stats.ttest_rel(np.round(10 * a[:, 3]), np.round(10 * a[:, 0])).pvalue
        false += bool((stats.false_discovery_control(np.nan_to_num(plain, nan=1.0)) <= 0.05).any())
        assert not per_class_effect(a, STRENGTHS, strength=10.0).falls.any()
    assert false > 10


@pytest.mark.parametrize("classes", (2, 10, 1000))
def test_planted_classes_are_found(classes):
    """Those that fall by 10 points while the mean rises, and hardly any others: at most twice alpha of the findings."""
    a = accuracies(runs=10, classes=classes)
    paying = np.arange(classes) % 20 == 1
    a[:, :, paying] -= np.array([0, 0.05, 0.1, 0.19])[:, None]
    names = [f"class {c}" for c in range(classes)]
    result = per_class_effect(a, STRENGTHS, class_names=names, strength=10.0)
    assert result.falls[paying].all() and result.falls.sum() <= 1.1 * paying.sum() + 1
    assert set(result.losers) >= {names[c] for c in np.flatnonzero(paying)}
    assert result.classes_that_pay == (result.losers if classes > 2 else ())
    assert result.rises[~paying].mean() > 0.9 or classes == 2
    if classes == 2:  # where the mean falls, nobody pays for it
        assert result.mean_change < 0 and result.best_strength != 10.0


@pytest.mark.parametrize("runs", (2, 5, 8))
def test_equal_changes(runs):
    """No variance: 1 for no change, also up to rounding, and the exact test of the signs for others."""
    a = np.repeat(np.repeat(np.random.default_rng(0).uniform(0.3, 0.6, (runs, 1, 3)), 2, 1), 1, 2)
    a[:, 1, 0] += 0.1 + 0.2  # equal up to rounding
    a[:, 1, 1] = a[:, 0, 1] + 1e-16 * np.arange(runs)
    a[:, 1, 2] -= 0.1
    result = per_class_effect(a, (0, 1))
    sign = stats.binomtest(runs, runs, 0.5).pvalue
    np.testing.assert_allclose(result.p_values, [sign, 1, sign])
    np.testing.assert_allclose(result.change_intervals, np.outer([0.3, 0, -0.1], [1, 1]), atol=1e-12)
    assert result.losers == (("2",) if runs == 8 else ())


def test_a_class_without_samples_in_a_run():
    """It is left out of that run, in its own figures and in the mean; with one run or none, it is not tested."""
    a = accuracies()
    a[2, :, 0], a[1:, :, 3], a[:, :, 4] = NAN, NAN, NAN
    result = per_class_effect(a, STRENGTHS)
    rest = np.delete(a[:, :, 0], 2, 0)
    assert result.p_values[0] == pytest.approx(stats.ttest_rel(rest[:, 3], rest[:, 0]).pvalue, rel=1e-10)
    np.testing.assert_allclose(result.class_intervals[1, 0], interval(rest[:, 1], 0.05), atol=1e-13)
    np.testing.assert_allclose(result.mean, np.nanmean(a, 2).mean(0), atol=1e-14)
    assert np.isnan(result.p_values[3:]).all() and np.isnan(result.corrected_p_values[3:]).all()
    assert np.isnan(result.regrets).tolist() == [False] * 3 + [True] * 2
    assert result.changes[3] == a[0, 3, 3] - a[0, 0, 3] and np.isnan(result.changes[4])
    assert np.isnan(result.best_per_class).tolist() == [False] * 4 + [True]
    alone = per_class_effect(a[:, :, :3], STRENGTHS)
    np.testing.assert_allclose(result.corrected_p_values[:3], alone.corrected_p_values, rtol=1e-12)
    assert result.table().splitlines()[-1].split()[:3] == ["4", "-", "-"] and "nan" not in result.table()
    assert not (result.falls | result.rises)[3:].any()


def test_the_mean_with_weights():
    """Of class counts: the accuracy over samples."""
    random = np.random.default_rng(0)
    labels = random.choice(4, 300, p=[0.7, 0.1, 0.1, 0.1])
    predictions = np.where(random.random((3, 2, 300)) < 0.8, labels, 0)
    a = per_class_accuracy(predictions, labels)
    result = per_class_effect(a, (0, 1), class_weights=np.bincount(labels))
    np.testing.assert_allclose(result.mean, (predictions == labels).mean((0, 2)), atol=1e-14)
    equal = per_class_effect(a, (0, 1), class_weights=torch.full((4,), 3))
    np.testing.assert_allclose(equal.mean, a.mean((0, 2)), atol=1e-14)


def test_strengths_in_any_order_and_chosen_ones():
    a = accuracies()
    truth = per_class_effect(a, STRENGTHS, baseline=3.0, strength=1.0)
    order = [2, 0, 3, 1]
    for runs in (a[:, order], torch.from_numpy(a[:, order]), a[:, order].tolist()):
        found = per_class_effect(runs, np.array(STRENGTHS)[order], baseline=3.0, strength=1.0)
        assert found.table() == truth.table() and found.strengths.tolist() == list(STRENGTHS)
        assert (found.p_values == truth.p_values).all()
    np.testing.assert_allclose(truth.changes, (a[:, 1] - a[:, 2]).mean(0), atol=1e-14)
    assert (truth.baseline, truth.strength, truth.best_strength) == (3.0, 1.0, 10.0)
    percent = per_class_effect(100 * a, STRENGTHS)
    np.testing.assert_allclose(percent.p_values, per_class_effect(a, STRENGTHS).p_values, rtol=1e-9)


def test_regrets_are_measured_on_runs_that_did_not_choose():
    """By loops; a class without a preference has none on average, though its best strength looks better."""
    a = accuracies(runs=7, spread=0.06)
    a[:, :, 1] -= 0.1 * np.arange(4)
    result = per_class_effect(a, STRENGTHS)
    for c in range(5):
        found = []
        for r in range(7):
            others = np.delete(a, r, 0)
            shared, own = others.mean((0, 2)).argmax(), others[:, :, c].mean(0).argmax()
            found.append(a[r, own, c] - a[r, shared, c])
        assert result.regrets[c] == pytest.approx(np.mean(found), abs=1e-13)
        np.testing.assert_allclose(result.regret_intervals[c], interval(np.array(found), 0.05), atol=1e-12)
    assert result.better_elsewhere == ("1",)
    random = np.random.default_rng(1)
    none = per_class_effect(0.7 + 0.1 * random.normal(size=(10, 4, 400)), STRENGTHS)
    best = none.class_means.max(0) - none.class_means[none.strengths == none.best_strength][0]
    assert best.mean() > 0.02 > 0.006 > abs(none.regrets.mean())


def test_splits_that_overlap_have_wider_intervals():
    """Nadeau and Bengio: 1/R + n_test/n_train in place of 1/R."""
    a = accuracies()
    plain, wide = (per_class_effect(a, STRENGTHS, test_to_train=ratio) for ratio in (0, 0.5))
    factor = np.sqrt((1 / 6 + 0.5) * 6)
    np.testing.assert_allclose(np.ptp(wide.change_intervals, 1), factor * np.ptp(plain.change_intervals, 1), rtol=1e-10)
    t = stats.t.isf(plain.p_values / 2, 5) / factor
    np.testing.assert_allclose(wide.p_values, 2 * stats.t.sf(t, 5), rtol=1e-8)
