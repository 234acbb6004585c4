"""Accuracies from predictions, tables, plots and messages of the effect on each class."""

import re
import sys

import matplotlib
import numpy as np
import pytest
import torch

from sslkern.analysis import PerClassEffect, per_class_accuracy, per_class_effect

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAN, INF = float("nan"), float("inf")
INTEGERS = "must be integers, the numbers of classes"
A = np.random.default_rng(0).uniform(0.4, 0.6, (4, 3, 5))
STRENGTHS = (0, 1, 2)


def test_accuracies_from_predictions():
    """By loops; labels of all runs, of each run, and of each prediction; classes that are never predicted or seen."""
    random = np.random.default_rng(0)
    predictions, labels = random.integers(0, 6, (3, 2, 40)), random.integers(0, 4, (3, 40))
    for truth, each in (
        (labels[0], [0, 0, 0]),
        (labels[:, None], [0, 1, 2]),
        (np.repeat(labels[:, None], 2, 1), [0, 1, 2]),
    ):
        found = per_class_accuracy(predictions, truth, 5)
        assert found.shape == (3, 2, 5) and found.dtype == np.float64 and np.isnan(found[..., 4]).all()
        for r in range(3):
            for s in range(2):
                for c in range(4):
                    rows = labels[each[r]] == c
                    assert found[r, s, c] == (predictions[r, s][rows] == c).mean()
    assert per_class_accuracy(predictions, labels[0]).shape == (3, 2, 4)
    assert per_class_accuracy([0, 1, 1], [0, 1, 0]).tolist() == [0.5, 1.0]
    tensor = per_class_accuracy(torch.from_numpy(predictions).int(), labels[0])
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64
    assert np.array_equal(tensor.numpy(), per_class_accuracy(predictions, labels[0].astype(np.uint8)))
    empty = per_class_accuracy(np.zeros((0, 2, 3), int), [0, 1, 1])
    assert empty.shape == (0, 2, 2)


@pytest.mark.parametrize(
    "arguments, error, sentence",
    (
        (([0.0, 1.0], [0, 1]), TypeError, f"predictions {INTEGERS}, got float64."),
        ((torch.ones(2, 3), [0, 1]), TypeError, f"predictions {INTEGERS}, got float32."),
        (([0, 1], ["a", "b"]), TypeError, f"labels {INTEGERS}, got <U1."),
        (([], []), TypeError, "predictions must be integers"),
        ((np.zeros((2, 0), int), np.zeros(0, int)), ValueError, "predictions must have shape (..., N) with N >= 1"),
        (([0, 1], [0, 1, 2]), ValueError, "labels must have shape (2,), or one that broadcasts"),
        (([0, 1], [[0, 1]]), ValueError, "labels must have shape (2,), or one that broadcasts"),
        ((np.zeros((2, 3, 4), int), np.zeros((2, 4), int)), ValueError, "predictions, (2, 3, 4), got (2, 4)."),
        (([0, 1], [0, -1]), ValueError, "labels must be in [0, 1), got [-1, 0]."),
        (([0, 1], [0, 2], 2), ValueError, "labels must be in [0, 2), got [0, 2]."),
        (([0, 1], [0, 1], 0), ValueError, "n_classes must be an integer >= 1, got 0."),
    ),
    ids=str,
)  # fmt: skip
def test_messages_of_accuracies(arguments, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        per_class_accuracy(*arguments)


def with_nan(place):
    a = A.copy()
    a[place] = NAN
    return a


@pytest.mark.parametrize(
    "runs, strengths, options, error, sentence",
    (
        (A[:1], STRENGTHS, {}, ValueError, "accuracies must have at least 2 runs to estimate a spread, got 1."),
        (A[0], STRENGTHS, {}, ValueError, "accuracies must have shape (R, 3, C), as strengths has, got (3, 5)."),
        (A, (0, 1), {}, ValueError, "accuracies must have shape (R, 2, C), as strengths has, got (4, 3, 5)."),
        (A[:, :, :0], STRENGTHS, {}, ValueError, "accuracies must have shape (R, 3, C)"),
        (A * INF, STRENGTHS, {}, ValueError, "accuracies must be finite, or NaN at every strength of a run"),
        (with_nan((1, 2, 3)), STRENGTHS, {}, ValueError, "but they are NaN at some strengths only."),
        (with_nan(slice(1, None)), STRENGTHS, {}, ValueError, "accuracies must have samples of a class with a weight"),
        (A.astype(str), STRENGTHS, {}, TypeError, "accuracies must be an array of numbers, got <U"),
        ([[[1.0], [1.0, 2]]], STRENGTHS, {}, ValueError, "accuracies must be an array, got lists of different"),
        (torch.ones(3).to_sparse(), STRENGTHS, {}, TypeError, "accuracies must be dense, got layout torch.sparse_coo."),
        (A, (0,), {}, ValueError, "strengths must have shape (S,) with S >= 2, got (1,)."),
        (A, (0, 1, 1), {}, ValueError, "strengths must be finite and distinct, got [0.0, 1.0, 1.0]."),
        (A, (0, 1, NAN), {}, ValueError, "strengths must be finite and distinct"),
        (A, "abc", {}, TypeError, "strengths must be an array of numbers"),
        (A, STRENGTHS, {"baseline": 0.5}, ValueError, "baseline must be one of the strengths, 0, 1, 2, got 0.5."),
        (A, STRENGTHS, {"strength": "1"}, ValueError, "strength must be one of the strengths, 0, 1, 2, got '1'."),
        (A, STRENGTHS, {"class_names": ["a"]}, ValueError, "class_names must be 5 names, got ['a']."),
        (A, STRENGTHS, {"class_names": "abcde"}, ValueError, "class_names must be 5 names, got 'abcde'."),
        (A, STRENGTHS, {"class_weights": [1, 1]}, ValueError, "class_weights must be 5 finite numbers >= 0"),
        (A, STRENGTHS, {"class_weights": [-1] * 5}, ValueError, "class_weights must be 5 finite numbers >= 0"),
        (A, STRENGTHS, {"class_weights": [0] * 5}, ValueError, "accuracies must have samples of a class with a weight"),
        (A, STRENGTHS, {"alpha": 1}, ValueError, "alpha must be a number between 0 and 1, got 1."),
        (A, STRENGTHS, {"correction": "by"}, ValueError, "correction must be one of 'bh', 'holm', got 'by'."),
        (A, STRENGTHS, {"test_to_train": -1}, ValueError, "test_to_train must be a number >= 0, got -1."),
    ),
    ids=str,
)  # fmt: skip
def test_messages(runs, strengths, options, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        per_class_effect(runs, strengths, **options)


def test_it_says_that_scipy_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="per_class_effect needs SciPy: pip install scipy"):
        per_class_effect(A, STRENGTHS)


def many(classes, paying):
    random = np.random.default_rng(0)
    a = random.uniform(0.4, 0.9, classes) + 0.01 * random.normal(size=(8, 4, classes)) + 0.02 * np.arange(4)[:, None]
    a[:, :, :paying] -= 0.1 * np.arange(4)[:, None]
    return per_class_effect(a, (0, 1e-4, 1e-2, 1), class_names=[f"name {c}" for c in range(classes)])


@pytest.mark.parametrize("classes, paying", ((5, 1), (21, 2), (1000, 30)))
def test_a_table_of_many_classes_stays_short(classes, paying):
    result = many(classes, paying)
    assert isinstance(result, PerClassEffect)
    lines = result.table().splitlines()
    assert len(lines) <= 5 + 4 + 20 + 1
    shown = [line for line in lines if line.startswith("name ")]
    assert len(shown) == min(classes, 20) and shown[0].startswith(result.losers[0])
    assert sum(line.endswith("falls") for line in shown) == min(paying, 10)
    assert ("left out" in lines[-1]) == (classes > 20)
    if classes > 20:
        assert lines[-1] == f"{classes - 20} classes between them are left out; {paying} fall in all"
    assert len(result.table(classes=4).splitlines()) == 5 + 4 + 5 and len(result.losers) == paying


@pytest.mark.parametrize("classes, paying", ((5, 0), (12, 2), (1000, 30)))
def test_a_plot_names_the_classes_that_fall(classes, paying):
    result = many(classes, paying)
    figure, ax = plt.subplots()
    assert result.plot(ax, xlabel="weight decay") is ax
    named = [text.get_text() for text in ax.texts]
    assert sorted(named) == sorted(result.losers[:8]) and len(named) == min(paying, 8)
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert ("22 more, not named" in legend) == (paying == 30)
    assert f"{classes - paying} {'other ' if paying else ''}classes" in legend
    bold = max(ax.lines, key=lambda line: line.get_linewidth())
    assert bold.get_label() == "mean" and bold.get_ydata().tolist() == result.mean.tolist()
    assert ax.get_xscale() == "symlog" and ax.get_xlabel() == "weight decay"
    figure.canvas.draw()
    heights = sorted(text.xy[1] for text in ax.texts)
    assert all(np.diff(heights) > 0.05 * np.ptp(ax.get_ylim())) or paying < 2
    plt.close(figure)


def test_other_plots():
    """Logarithmic, linear, with chosen classes, with a class that is missing, and of the caller's choice of axes."""
    a = with_nan((slice(None), slice(None), 2))
    assert per_class_effect(a, (0.1, 1, 100)).plot().get_xscale() == "log"
    assert per_class_effect(a, (-1, 1, 100)).plot().get_xscale() == "linear"
    result = per_class_effect(a, STRENGTHS, strength=1)
    ax = result.plot(highlight=["4", "2"])
    assert {text.get_text() for text in ax.texts} == {"4", "2"} and ax.get_xscale() == "linear"
    assert "compared: 1" in [text.get_text() for text in ax.get_legend().get_texts()] or result.best_strength == 1
    assert [text.get_text() for text in result.plot(highlight="4").texts] == ["4"]
    with pytest.raises(ValueError, match="highlight must have names of classes, got 'x'"):
        result.plot(highlight=["x"])
    plt.close("all")
