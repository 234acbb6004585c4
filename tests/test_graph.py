"""Relation graphs: products against the dense matrix, the constructors against each other, and large graphs."""

import itertools
import pickle
import time

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from memory import allocated

from sslkern.decomposition import RelationGraph, as_graph
from sslkern.decomposition import graph as graph_module

LABELS = [2, 0, 2, -1, 5, 0, 2, 5, -1, 7]


def random_edges(n, count, seed=0):
    rng = np.random.default_rng(seed)
    i, j = rng.integers(n, size=(2, count))
    return i, j, rng.random(count)


def dense_of(i, j, n, weight):
    """The matrix of an edge list, entry by entry."""
    g = torch.zeros(n, n, dtype=torch.float64)
    for a, b, w in zip(i, j, weight, strict=True):
        if a != b:
            g[a, b] += w
            g[b, a] += w
    return g


def dense_of_labels(labels):
    labels = np.asarray(labels)
    same = (labels[:, None] == labels) & (labels != -1)[:, None]
    return torch.from_numpy(same & ~np.eye(len(labels), dtype=bool)).double()


def graphs():
    """(name, graph, dense G) of each kind of relation."""
    i, j, weight = random_edges(10, 30)
    yield "edges", RelationGraph.from_edges(i, j, 10, weight), dense_of(i, j, 10, weight)
    yield "labels", RelationGraph.from_labels(LABELS), dense_of_labels(LABELS)
    yield "none", RelationGraph.from_edges([], [], 10), torch.zeros(10, 10, dtype=torch.float64)
    yield "views", RelationGraph.from_views(2, 5), dense_of_labels([0, 1] * 5)


EACH = pytest.mark.parametrize(("graph", "g"), [row[1:] for row in graphs()], ids=[row[0] for row in graphs()])


@EACH
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("p", (1, 3))
def test_products_are_those_of_the_dense_matrix(graph, g, dtype, p):
    x = torch.randn(10, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    laplacian = g.sum(1).diag() - g
    wide, bound = x.double(), 64 * torch.finfo(out).eps
    for found, expected in (
        (graph.matmul(x), g @ wide),
        (graph.laplacian(x), laplacian @ wide),
        (graph.dirichlet_energy(x), (wide * (laplacian @ wide)).sum()),
        (graph.degrees(x), g.sum(1)),
    ):
        assert found.dtype == out
        assert (found - expected).abs().max() <= bound * max(1, expected.abs().max())
    assert np.allclose(graph.to_scipy().toarray(), g, rtol=1e-15, atol=0)
    assert graph.to_scipy().has_canonical_format and graph.degrees().dtype == torch.float64


@EACH
def test_derivatives(graph, g):
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    for function in (graph.matmul, graph.laplacian, graph.dirichlet_energy):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@EACH
def test_any_strides_and_no_change_of_the_input(graph, g):
    whole = torch.randn(3, 20, dtype=torch.float64)
    x = whole.t()[::2]
    before = x.clone()
    assert torch.allclose(graph.matmul(x), g @ x)
    assert torch.equal(graph.dirichlet_energy(x), graph.dirichlet_energy(x.contiguous()))
    assert torch.equal(x, before)
    row = torch.randn(1, 3).expand(10, 3)
    assert graph.dirichlet_energy(row) <= 1e-10 and graph.laplacian(row).abs().max() <= 1e-5


def test_energy_does_not_cancel():
    """Related samples that are close, far from 0 and far from the others: <z, L z> has no digit left in float32."""
    i = torch.arange(0, 100, 2)
    z = torch.randn(50, 4, dtype=torch.float64).mul(1e3).repeat_interleave(2, 0) + 1e3
    z = (z + 1e-2 * torch.randn(100, 4)).float()
    for graph in (RelationGraph.from_edges(i, i + 1, 100), RelationGraph.from_labels(torch.arange(100) // 2)):
        exact = (z[i].double() - z[i + 1].double()).square().sum()
        assert abs(graph.dirichlet_energy(z) / exact - 1) < 1e-5
        naive = (graph.degrees(z)[:, None] * z.square()).sum() - (z * graph.matmul(z)).sum()
        assert abs(naive / exact - 1) > 1e-2


def test_large_classes_are_summed_exactly():
    z = torch.rand(200_000, 1) + 1000
    labels = torch.arange(200_000) % 2
    graph, wide = RelationGraph.from_labels(labels), z.double()
    exact = torch.stack([wide[labels == c].sum() for c in (0, 1)])[labels, None] - wide
    assert (graph.matmul(z) - exact).abs().max() <= exact.max() * 2e-7
    energy = sum(100_000**2 * wide[labels == c].var(correction=0) for c in (0, 1))
    assert abs(graph.dirichlet_energy(z) / energy - 1) < 1e-6


def test_labels_are_the_edges_of_all_pairs():
    pairs = [(a, b) for a, b in itertools.combinations(range(10), 2) if LABELS[a] == LABELS[b] != -1]
    edges, labels = RelationGraph.from_edges(*zip(*pairs, strict=True), 10), RelationGraph.from_labels(LABELS)
    x = torch.randn(10, 4, dtype=torch.float64)
    for name in ("matmul", "laplacian", "dirichlet_energy"):
        assert torch.allclose(getattr(edges, name)(x), getattr(labels, name)(x), rtol=1e-13, atol=1e-13)
    assert torch.equal(edges.degrees(), labels.degrees())
    assert (edges.to_scipy() != labels.to_scipy()).nnz == 0


@pytest.mark.parametrize(
    "labels",
    (
        np.array(LABELS), torch.tensor(LABELS), np.array(LABELS, np.float32), torch.tensor(LABELS).to(torch.bfloat16),
        torch.tensor(LABELS).int(),
    ),
)  # fmt: skip
def test_labels_of_any_kind(labels):
    assert np.array_equal(RelationGraph.from_labels(labels).to_scipy().toarray(), dense_of_labels(LABELS))


def test_what_counts_as_unlabelled():
    def g(labels, **settings):
        return RelationGraph.from_labels(labels, **settings).to_scipy().toarray()

    two = np.kron(np.eye(2), 1 - np.eye(2))
    assert np.array_equal(g([-1, -1, 0, 0]), np.kron(np.diag([0, 1]), 1 - np.eye(2)))
    assert np.array_equal(g([-1, -1, 1, 1]), two)  # -1 and 1 are two classes
    assert np.array_equal(g([-1, -1, 0, 0], unlabelled=None), two)
    assert np.array_equal(g([-1, -1, 1, 1], unlabelled=1), np.kron(np.diag([1, 0]), 1 - np.eye(2)))
    for strings in (["a", "a", "b", "b"], np.array(["a", "a", "b", "b"], object), [True, True, False, False]):
        assert np.array_equal(g(strings), two)
    assert np.array_equal(g(["a", "a", "", ""], unlabelled=""), np.kron(np.diag([1, 0]), 1 - np.eye(2)))


def test_views_are_stacked_view_by_view():
    i = torch.arange(4)
    expected = dense_of([*i, *i, *(i + 4)], [*(i + 4), *(i + 8), *(i + 8)], 12, [1] * 12)
    assert np.array_equal(RelationGraph.from_views(4, 3).to_scipy().toarray(), expected)
    assert RelationGraph.from_views(np.int64(4), 1).to_scipy().nnz == 0


def test_edges_are_merged():
    """Both directions add up, so do duplicates; self-loops and weights of 0 are no edges; the order is no matter."""
    graph = RelationGraph.from_edges([0, 1, 0, 2, 3], [1, 0, 1, 2, 1], 4, [1, 2, 0.5, 9, 0])
    assert np.array_equal(graph.to_scipy().toarray(), dense_of([0], [1], 4, [3.5]))
    assert repr(graph) == "RelationGraph(n=4, edges=1)"
    assert repr(RelationGraph.from_labels(LABELS)) == "RelationGraph(n=10, classes=3)"
    with_tensors = RelationGraph.from_edges(torch.tensor([1], dtype=torch.int32), np.array([0]), 4, torch.tensor([3.5]))
    assert (with_tensors.to_scipy() != graph.to_scipy()).nnz == 0


@pytest.mark.parametrize("with_sklearn", (True, False))
@pytest.mark.parametrize("kind", (np.asarray, torch.as_tensor, lambda x: x.tolist(), lambda x: x.astype(np.float32)))
def test_neighbors(with_sklearn, kind, monkeypatch):
    if not with_sklearn:
        monkeypatch.setattr(graph_module, "NearestNeighbors", None)
        monkeypatch.setattr(graph_module, "GATHERED", 8)  # some rows at a time
    x = np.random.default_rng(0).normal(size=(40, 3))
    near = np.argsort(np.linalg.norm(x[:, None] - x, axis=2) + np.diag([np.inf] * 40), 1)[:, :4]
    a = np.zeros((40, 40))
    np.put_along_axis(a, near, 1, 1)
    assert np.array_equal(RelationGraph.from_neighbors(kind(x), 4).to_scipy().toarray(), (a + a.T) / 2)


@pytest.mark.parametrize("with_sklearn", (True, False))
def test_duplicates_are_neighbors_and_a_row_is_none_of_itself(with_sklearn, monkeypatch):
    if not with_sklearn:
        monkeypatch.setattr(graph_module, "NearestNeighbors", None)
    graph = RelationGraph.from_neighbors(np.ones((6, 2)), 2)
    assert graph.degrees().sum() == 12 and graph.to_scipy().diagonal().max() == 0
    assert RelationGraph.from_neighbors([[0], [1]], 1).to_scipy().toarray().tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    "kind",
    (
        np.asarray, torch.as_tensor, lambda g: g.tolist(), sp.csr_array, sp.coo_matrix, sp.dok_array,
        lambda g: torch.as_tensor(g).to_sparse(), lambda g: torch.as_tensor(g).to_sparse_csc(),
        lambda g: torch.as_tensor(g).float(), lambda g: np.asfortranarray(g).astype(">f8"),
    ),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Sparse")
def test_matrices_of_any_kind(kind):
    i, j, weight = random_edges(10, 30)
    g = dense_of(i, j, 10, weight).numpy()
    given = kind(g + np.diag(np.arange(10.0)))
    found = RelationGraph.from_matrix(given).to_scipy().toarray()
    assert np.allclose(found, g, rtol=1e-6, atol=0)
    assert np.array_equal(as_graph(given, 10).to_scipy().toarray(), found)


def test_as_graph_takes_what_users_have():
    graph = RelationGraph.from_labels(LABELS)
    assert as_graph(graph, 10) is graph
    for labels in (LABELS, np.array(LABELS), torch.tensor(LABELS)):
        assert (as_graph(labels, 10).to_scipy() != graph.to_scipy()).nnz == 0
    assert (as_graph(graph.to_scipy(), 10).to_scipy() != graph.to_scipy()).nnz == 0


def test_nan_stays_nan():
    x = torch.ones(4, 2)
    x[0, 0] = torch.nan
    for graph in (RelationGraph.from_views(2, 2), RelationGraph.from_edges([0, 1], [2, 3], 4)):
        assert graph.dirichlet_energy(x).isnan() and graph.matmul(x)[2, 0].isnan() and graph.laplacian(x)[2, 0].isnan()
        assert graph.matmul(x)[:, 1].isfinite().all()


@EACH
def test_a_pickle_has_no_copies_and_the_same_bits(graph, g):
    x = torch.randn(10, 2)
    before = len(pickle.dumps(graph))
    product, energy = graph.matmul(x), graph.dirichlet_energy(x)
    copy = pickle.loads(pickle.dumps(graph))
    assert len(pickle.dumps(graph)) == before
    assert torch.equal(copy.matmul(x), product) and torch.equal(copy.dirichlet_energy(x), energy)


def test_a_million_edges_in_seconds_and_without_their_square():
    """100,000 nodes: the dense matrix would take 80 GB, and the differences of all edges at once 256 MB."""
    i, j, weight = random_edges(100_000, 1_000_000)
    z = torch.randn(100_000, 32, requires_grad=True)
    start = time.perf_counter()
    peak, _ = allocated(lambda: RelationGraph.from_edges(i, j, 100_000, weight))
    assert peak < 200e6
    graph = RelationGraph.from_edges(i, j, 100_000, weight)
    graph.matmul(z), graph.laplacian(z), graph.dirichlet_energy(z)  # keeps its copies
    peak, _ = allocated(lambda: graph.dirichlet_energy(z).backward())
    assert time.perf_counter() - start < 30
    assert peak < 60e6  # a few times z, and chunks of 4 MB
    a, b = z.detach().double()[i], z.detach().double()[j]
    assert abs(graph.dirichlet_energy(z) / ((a - b).square().sum(1) * torch.as_tensor(weight)).sum() - 1) < 1e-5


def test_a_hundred_thousand_labels_have_no_edges():
    labels = torch.arange(100_000) % 10  # 5e8 pairs
    z = torch.randn(100_000, 8)
    peak, _ = allocated(lambda: RelationGraph.from_labels(labels).dirichlet_energy(z))
    assert peak < 40e6
