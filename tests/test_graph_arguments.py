"""Relation graphs: one sentence for a wrong argument, or for a package that is missing."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sslkern.decomposition import RelationGraph, as_graph, optimal_embedding


@pytest.mark.parametrize(
    ("call", "error", "said"),
    (
        (lambda: RelationGraph(3), TypeError, "made by its constructors"),
        (lambda: RelationGraph.from_edges([0], [1], 0), ValueError, "n must be an integer >= 1, got 0"),
        (lambda: RelationGraph.from_edges([0], [1], 2.0), ValueError, "n must be an integer >= 1"),
        (lambda: RelationGraph.from_edges([0], [2], 2), ValueError, r"j must be in \[0, 2\), got \[2, 2\]"),
        (lambda: RelationGraph.from_edges([-1], [1], 2), ValueError, r"i must be in \[0, 2\)"),
        (lambda: RelationGraph.from_edges([0, 1], [1], 2), ValueError, "same length, got 2 and 1"),
        (lambda: RelationGraph.from_edges([0.5], [1], 2), TypeError, "i must be integers, got float64"),
        (lambda: RelationGraph.from_edges([[0]], [1], 2), ValueError, "i must be one-dimensional"),
        (lambda: RelationGraph.from_edges(["a"], [1], 2), TypeError, "i must be an array of numbers"),
        (lambda: RelationGraph.from_edges([0], [1], 2, [-1]), ValueError, "weight must be finite and >= 0"),
        (lambda: RelationGraph.from_edges([0], [1], 2, [np.nan]), ValueError, "weight must be .* is NaN"),
        (lambda: RelationGraph.from_edges([0], [1], 2, [np.inf]), ValueError, "weight must be finite"),
        (lambda: RelationGraph.from_edges([0], [1], 2, [1, 2]), ValueError, "each of the 1 edges, got 2"),
        (lambda: RelationGraph.from_labels([]), ValueError, r"labels must have shape \(N,\)"),
        (lambda: RelationGraph.from_labels([[1]]), ValueError, r"got shape \(1, 1\)"),
        (lambda: RelationGraph.from_labels([0.5, 1]), ValueError, "not continuous"),
        (lambda: RelationGraph.from_labels([np.nan, 1]), ValueError, "not continuous numbers or NaN"),
        (lambda: RelationGraph.from_labels([1j]), TypeError, "labels must be integers or strings, got complex128"),
        (lambda: RelationGraph.from_labels(np.array(["a", 1], object)), TypeError, "mixture"),
        (lambda: RelationGraph.from_views(3, 0), ValueError, "views must be an integer >= 1"),
        (lambda: RelationGraph.from_neighbors([[0.0], [1]], 2), ValueError, "k must be below the number of rows"),
        (lambda: RelationGraph.from_neighbors([[0.0], [1]], True), ValueError, "k must be an integer >= 1"),
        (lambda: RelationGraph.from_neighbors([0.0, 1], 1), ValueError, r"x must have shape \(N, D\)"),
        (lambda: RelationGraph.from_neighbors([[np.nan], [1]], 1), ValueError, "x must be finite"),
        (lambda: RelationGraph.from_matrix(np.ones((2, 3))), ValueError, r"square matrix, got shape \(2, 3\)"),
        (lambda: RelationGraph.from_matrix([[0, 1], [2, 0]]), ValueError, "g must be symmetric"),
        (lambda: RelationGraph.from_matrix(sp.csr_array([[0, 1.0], [0, 0]])), ValueError, "g must be symmetric"),
        (lambda: RelationGraph.from_matrix([[0, -1], [-1, 0]]), ValueError, "g must be finite and >= 0"),
        (lambda: RelationGraph.from_matrix([[0, np.nan], [np.nan, 0]]), ValueError, "NaN"),
        (lambda: RelationGraph.from_matrix([[0, 1j], [1j, 0]]), TypeError, "array of numbers"),
        (lambda: RelationGraph.from_matrix("ab"), TypeError, "array of numbers"),
        (lambda: as_graph(None, 3), ValueError, r"graph must be a RelationGraph, labels of shape \(3,\).* got None"),
        (lambda: as_graph([0, 1], 3), ValueError, "graph must relate 3 samples, got 2"),
        (lambda: as_graph(RelationGraph.from_views(2, 2), 3, "y"), ValueError, "y must relate 3 samples, got 4"),
        (lambda: as_graph(np.ones((3, 1)), 3), ValueError, r"graph must be labels of shape \(3,\).*got shape \(3, 1\)"),
        (lambda: as_graph([0.5, 1, 2], 3, "y"), ValueError, "y must be integers or strings"),
        (lambda: as_graph([[0, 1], [2, 0]], 2, "y"), ValueError, "y must be symmetric"),
        (lambda: as_graph(3, 3), ValueError, r"graph must be labels .* got shape \(\)"),
        (lambda: RelationGraph.from_views(2, 2).matmul(np.ones((4, 1))), TypeError, "x must be a torch.Tensor"),
        (lambda: RelationGraph.from_views(2, 2).matmul(torch.ones(4)), ValueError, r"x must have shape \(N, D\)"),
        (lambda: RelationGraph.from_views(2, 2).laplacian(torch.ones(3, 1)), ValueError, "x must have 4 rows"),
        (lambda: RelationGraph.from_views(2, 2).dirichlet_energy(torch.ones(4, 1).long()), TypeError, "z must be"),
    ),
)  # fmt: skip
def test_a_wrong_argument_gets_one_sentence(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_without_scipy_a_method_that_needs_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    graph = RelationGraph.from_edges([0, 1], [1, 2], 3)
    with pytest.raises(ImportError, match="need SciPy: install scipy"):
        graph.to_scipy()
    with pytest.raises(ImportError, match="need SciPy: install scipy"):
        optimal_embedding(graph, 1)
    assert optimal_embedding([0, 0, 1, 1], 1).shape == (4, 1)  # classes need no solver


def test_without_scikit_learn():
    """Relations and the linear map work, and so does the message of an estimator that is not fitted."""
    code = """
import sys
sys.modules["sklearn"] = sys.modules["scipy"] = None
import numpy as np
from sslkern.decomposition import LinearVICReg, RelationGraph
x, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
assert LinearVICReg(2).fit(x, RelationGraph.from_neighbors(x, 3)).transform(x).shape == (30, 2)
assert LinearVICReg(2).fit_transform(x, y).shape == (30, 2)
try:
    LinearVICReg().transform(x)
except ValueError as error:
    assert "not fitted" in str(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
