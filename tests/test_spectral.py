"""Spectral embeddings: the closed forms against descent, the traps of the theory, and eigenpairs of hard graphs."""

import time

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from spectral import OBJECTIVES, barlow_twins, cosines, dense, descend, hinge_vicreg, random_graph, start

from sslkern.decomposition import RelationGraph, _spectrum, optimal_embedding
from sslkern.ops import cross_correlation

LABELS = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, -1]


@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("seed", (0, 1))
def test_descent_reaches_the_closed_form(method, seed):
    graph = random_graph(seed=seed)
    g = 0.1 if method == "vicreg" else None
    best = optimal_embedding(graph, 4, method, invariance=g)

    def objective(z):
        return OBJECTIVES[method](z, graph, g)

    z, value = descend(objective, start(40, 4, seed=seed))
    closed = float(objective(best))
    assert abs(value - closed) <= 1e-6 * max(closed, 1e-6)
    if method == "barlow_twins":
        assert closed < 1e-20  # any 4 directions of the positive part of G do
    else:  # the same rows up to a rotation, hence up to the mean where the objective centres
        if method == "vicreg":
            z = z - z.mean(0)
        assert (z @ z.T - best @ best.T).norm() <= 1e-4 * (best @ best.T).norm()


@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("graph", (random_graph(12, 1), RelationGraph.from_labels(LABELS)), ids=("edges", "labels"))
def test_no_descent_goes_below_it_where_columns_die(method, graph):
    """More columns than are alive: disconnected graphs, directions above 1/g, few positive eigenvalues."""
    with pytest.warns(UserWarning) if method != "vicreg" else pytest.MonkeyPatch.context():
        best = optimal_embedding(graph, 10, method, invariance=0.6 if method == "vicreg" else None)
    closed = float(OBJECTIVES[method](best, graph, 0.6))
    assert (best.norm(dim=0) == 0).any()
    assert torch.linalg.matrix_rank(best) == (best.norm(dim=0) > 0).sum()
    for seed in range(3):
        _, value = descend(lambda z: OBJECTIVES[method](z, graph, 0.6), start(12, 10, seed=seed), steps=5)
        assert closed - 1e-9 <= value <= closed * (1 + 1e-3)


def test_columns_are_the_eigenvectors():
    graph = random_graph()
    g = dense(graph)
    values = torch.linalg.eigvalsh(g.sum(1).diag() - g)[1:6]
    z = optimal_embedding(graph, 5)
    assert torch.allclose(z.T @ z / 40, (1 - values / (2 * values[-1])).diag(), atol=1e-12)
    assert z.mean(0).abs().max() < 1e-14
    z = optimal_embedding(graph, 5, invariance=float(1 / values[1:3].mean()))
    assert (z.norm(dim=0) == 0).tolist() == [False, False, True, True, True]
    values = torch.linalg.eigvalsh(g).flip(0)[:5]
    z = optimal_embedding(graph, 5, "simclr")
    assert torch.allclose(z.T @ z, values.diag(), atol=1e-12)
    z = optimal_embedding(graph, 5, "barlow_twins")
    assert torch.allclose(z.T @ z, (1 / values).diag(), atol=1e-12)
    assert float(barlow_twins(z, graph)) < 1e-24


def test_signs_do_not_depend_on_the_start():
    graph = random_graph(700, 5)
    for method in OBJECTIVES:
        z = optimal_embedding(graph, 3, method)
        assert torch.equal(z, optimal_embedding(graph, 3, method))
        other = optimal_embedding(graph, 3, method, random_state=np.random.default_rng(1))
        assert torch.allclose(z, other, atol=1e-6 * float(z.abs().max()))
        assert (z.gather(0, z.abs().argmax(0)[None]) > 0).all()


def test_centring_the_relation_gives_another_simclr_embedding():
    """A trap: unlike VICReg's, this objective does not drop the constant direction."""
    graph = random_graph()
    g = dense(graph)
    h = torch.eye(40, dtype=torch.float64) - 1 / 40
    value, vector = torch.linalg.eigh(h @ g @ h)
    centred = vector[:, -3:] * value[-3:].sqrt()
    best = optimal_embedding(graph, 3, "simclr")
    assert cosines(best, centred).min() < 0.1
    objective = OBJECTIVES["simclr"]
    assert objective(centred, graph) > objective(best, graph) * 1.1


def test_the_hinge_has_another_minimum():
    """A trap: the closed form is that of the squared distance to I, and not of VICReg's hinge."""
    graph, g = random_graph(), 0.1
    best = optimal_embedding(graph, 4, invariance=g)
    z, value = descend(lambda z: hinge_vicreg(z, graph, g), best + 0.01 * start(40, 4))
    assert value < 0.95 * hinge_vicreg(best, graph, g)
    z = z - z.mean(0)
    assert (z @ z.T - best @ best.T).norm() > 0.1 * (best @ best.T).norm()


def test_normalised_barlow_twins_collapses():
    """A trap: with standardised columns the rank is at most that of the relation, here the contrasts of 3 classes, and
    no longer that of the positive part of G for columns of any length."""
    labels = torch.arange(24) % 3
    i, j = torch.where((labels[:, None] == labels) & ~torch.eye(24, dtype=torch.bool))

    def normalised(z):
        diagonal, offdiag = cross_correlation(z[i], z[j], eps=0.0)
        return (diagonal - 1).square().sum() + offdiag

    z, value = descend(normalised, start(24, 5))
    size = torch.linalg.svdvals(z - z.mean(0))
    assert size[1] > 0.1 * size[0] and size[2] < 1e-3 * size[0]
    assert value > 1  # 5 columns of rank 2 are correlated


def test_labels_are_the_edges_of_all_pairs():
    by_labels = RelationGraph.from_labels(LABELS)
    by_edges = RelationGraph.from_matrix(by_labels.to_scipy())
    for k in (1, 4, 7, 11):
        for solve in (_spectrum.smallest_of_laplacian, _spectrum.largest_of_relation):
            (value, vector), (same, other) = solve(by_labels, k, 0), solve(by_edges, k, 0)
            assert torch.allclose(value, same, atol=1e-12)
            assert torch.allclose(vector.T @ vector, torch.eye(vector.shape[1], dtype=torch.float64), atol=1e-12)
            inside = value < value[-1] - 1e-9 if solve is _spectrum.smallest_of_laplacian else value > value[-1] + 1e-9
            if inside.any():  # eigenspaces that are found in full
                assert cosines(vector[:, inside], other[:, inside]).min() > 1 - 1e-12


def check_pairs(graph, k, seed=0, bound=1e-8):
    """The pairs of a graph against LAPACK's on the whole matrix: all copies of all eigenvalues."""
    g = dense(graph)
    laplacian, eye = g.sum(1).diag() - g, torch.eye(k, dtype=torch.float64)
    value, vector = _spectrum.smallest_of_laplacian(graph, k, seed)
    scale = max(1.0, float(laplacian.diagonal().max()))
    assert (value - torch.linalg.eigvalsh(laplacian)[1 : k + 1]).abs().max() < bound * scale
    assert (laplacian @ vector - vector * value).abs().max() < bound * scale
    assert (vector.T @ vector - eye).abs().max() < bound and vector.sum(0).abs().max() < bound
    value, vector = _spectrum.largest_of_relation(graph, k, seed)
    expected = torch.linalg.eigvalsh(g).flip(0)[:k]
    expected = expected[expected > bound * scale]
    assert value.shape == expected.shape and (value - expected).abs().max() < bound * scale
    assert (g @ vector - vector * value).abs().max() < bound * scale
    assert (vector.T @ vector - eye[: value.numel(), : value.numel()]).abs().max() < bound


def cycle(n):
    return sp.csr_array((np.ones(n), (np.arange(n), (np.arange(n) + 1) % n)), shape=(n, n))


def torus(m):
    ring, eye = cycle(m) + cycle(m).T, sp.eye_array(m)
    return sp.kron(ring, eye) + sp.kron(eye, ring)


@pytest.mark.parametrize("dense_up_to", (512, 4))
def test_components_of_all_sizes(dense_up_to, monkeypatch):
    """Isolated samples, pairs, and components by LAPACK and ARPACK, in any order of the samples."""
    monkeypatch.setattr(_spectrum, "DENSE", dense_up_to)
    monkeypatch.setattr(_spectrum, "_BATCH", 50)
    parts = [random_graph(n, 3, seed=n).to_scipy() for n in (1, 60, 2, 25, 2, 60, 1, 7, 7)]
    order = np.random.default_rng(0).permutation(165)
    graph = RelationGraph.from_matrix(sp.csr_array(sp.block_diag(parts))[order][:, order])
    for k in (1, 5, 12, 30, 164):
        check_pairs(graph, k)


@pytest.mark.parametrize(
    "g",
    (
        torus(24),
        np.ones((560, 560)),
        np.kron(1 - np.eye(2), np.ones((280, 280))),
        sp.block_diag([torus(24), torus(24)]),
    ),
    ids=("torus", "complete", "bipartite", "two tori"),
)
@pytest.mark.parametrize("k", (3, 10))
def test_every_copy_of_a_multiple_eigenvalue_is_found(g, k):
    for seed in range(3):
        check_pairs(RelationGraph.from_matrix(g), k, seed)


def test_fifty_thousand_pairs():
    """One eigenvalue in 50,000 copies: neither a Krylov space nor a dense matrix."""
    i = torch.arange(50_000)
    for graph in (RelationGraph.from_edges(i, i + 50_000, 100_000), RelationGraph.from_views(50_000, 2)):
        start = time.perf_counter()
        z = optimal_embedding(graph, 4)
        assert torch.allclose(z.T @ z / 100_000, torch.eye(4, dtype=torch.float64)) and z.mean(0).abs().max() < 1e-12
        assert graph.dirichlet_energy(z) < 1e-15
        z = optimal_embedding(graph, 4, "simclr")
        assert torch.allclose(z.T @ z, torch.eye(4, dtype=torch.float64)) and torch.allclose(graph.matmul(z), z)
        assert time.perf_counter() - start < 60


def test_a_hundred_thousand_samples_and_a_million_edges():
    graph = random_graph(100_000, 10)
    start = time.perf_counter()
    value, vector = _spectrum.smallest_of_laplacian(graph, 2, 0)
    assert time.perf_counter() - start < 200
    assert (graph.laplacian(vector) - vector * value).abs().max() < 1e-7
    assert (vector.T @ vector - torch.eye(2)).abs().max() < 1e-10 and vector.sum(0).abs().max() < 1e-8


def test_numpy_in_numpy_out_and_tensors_for_tensors():
    g = dense(random_graph(8, 2))
    expected = optimal_embedding(g, 2)
    for given in (g.numpy(), g.tolist(), sp.csr_array(g.numpy())):
        z = optimal_embedding(given, 2)
        assert isinstance(z, np.ndarray) and z.dtype == np.float64 and np.allclose(z, expected)
    for given in (g, g.float(), RelationGraph.from_matrix(g)):
        z = optimal_embedding(given, 2)
        assert isinstance(z, torch.Tensor) and z.dtype == torch.float64 and torch.allclose(z, expected, atol=1e-5)
    assert isinstance(optimal_embedding([0, 0, 1], 1), np.ndarray)


def test_the_smallest_graphs():
    assert optimal_embedding([0, 0], 1).tolist() == [[pytest.approx(0.5**0.5)], [pytest.approx(-(0.5**0.5))]]
    assert np.allclose(optimal_embedding([0, 1], 1), [[1], [-1]])  # unrelated: the invariance costs nothing
    assert np.allclose(optimal_embedding([0, 0], 1, "simclr"), [[0.5**0.5]] * 2)
    assert np.allclose(optimal_embedding([0, 0], 1, "barlow_twins"), [[0.5**0.5]] * 2)
    with pytest.warns(UserWarning, match="only 0 positive eigenvalues, so the last 1 of 1 columns are 0"):
        assert optimal_embedding([0], 1, "simclr").tolist() == [[0]]


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    (
        ({"n_components": 0}, ValueError, "n_components must be an integer >= 1, got 0"),
        ({"n_components": 4}, ValueError, "n_components must be at most 3 for 4 samples, got 4"),
        ({"n_components": 5, "method": "simclr"}, ValueError, "n_components must be at most 4"),
        ({"method": "byol"}, ValueError, "method must be one of 'vicreg', 'simclr', 'barlow_twins'"),
        ({"invariance": -1}, ValueError, "invariance must be a number >= 0"),
        ({"invariance": np.nan}, ValueError, "invariance must be a number >= 0"),
        ({"invariance": 1.0, "method": "simclr"}, ValueError, "invariance must be None for method 'simclr'"),
        ({"random_state": "0"}, TypeError, "random_state must be None"),
        ({"graph": None}, ValueError, "graph must be"),
        ({"graph": np.ones((3, 2))}, ValueError, r"graph must be .* \(3, 3\), got shape \(3, 2\)"),
        ({"graph": [0.5, 1, 2, 3]}, ValueError, "graph must be integers or strings"),
        ({"graph": []}, ValueError, r"graph must be .* got shape \(0,\)"),
    ),
)
def test_a_wrong_argument_gets_one_sentence(settings, error, said):
    with pytest.raises(error, match=said):
        optimal_embedding(**{"graph": [0, 0, 1, 1], "n_components": 1} | settings)


def test_what_does_not_converge_is_said(monkeypatch):
    monkeypatch.setattr(_spectrum, "_RESTARTS", 1)
    with pytest.raises(RuntimeError, match="a component of 3000 samples did not converge in 1 restarts"):
        optimal_embedding(cycle(3000) + cycle(3000).T, 4)
