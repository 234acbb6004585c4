"""`KernelSSL`: its closed forms are the minima of their objectives, and new samples follow the same function."""

import itertools

import numpy as np
import pytest
import scipy.sparse
import torch
from kernels import D, N, data, eye, kernel_of
from sklearn.svm import SVC

from sslkern.decomposition import KernelSSL, RelationGraph
from sslkern.metrics.bandwidth import median_bandwidth


def weighted(seed, n=N):
    """A graph with random edges and weights, connected or not."""
    random = np.random.default_rng(seed)
    i, j = random.integers(n, size=(2, 2 * n))
    return RelationGraph.from_edges(i, j, n, random.uniform(0.1, 2, 2 * n))


def dense(graph):
    return torch.from_numpy(graph.to_scipy().toarray())


def objective(model, g, kernel, coefficients, gram):
    """The objective of Z = kernel B, written with N x N matrices: G, and `gram`, which is k(S, S)."""
    z = kernel @ coefficients
    n, k = z.shape
    norm = model.ridge * (coefficients * (gram @ coefficients)).sum()
    if model.contrastive:
        return (z @ z.T - eye(n) - g).square().sum() + norm
    h, laplacian = eye(n) - 1 / n, g.sum(1).diag() - g
    return (z.T @ h @ z - eye(k)).square().sum() + model.invariance * (z * (laplacian @ z)).sum() + norm


def minimum(loss, rows, columns, starts=2):
    """The lowest value that LBFGS finds from random matrices (rows, columns)."""
    found = []
    for seed in range(starts):
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        w.requires_grad_()
        optimizer = torch.optim.LBFGS([w], 1, 1500, 2000, 1e-11, 1e-15, 20, "strong_wolfe")

        def closure(w=w, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(w)
            value.backward()
            return value

        optimizer.step(closure)
        found.append(float(loss(w.detach())))
    return min(found)


CASES = (
    {"invariance": 0.05, "ridge": 0.1},
    {"invariance": 0.3, "ridge": 1e-3, "n_components": 6},
    {"invariance": 0.0, "ridge": 0.5},
    {"invariance": 0.2, "ridge": 0.0, "kernel": "linear"},
    {"invariance": 0.05, "ridge": 0.1, "kernel": "cosine"},
    {"invariance": 0.05, "ridge": 0.1, "n_landmarks": 7},
    {"ridge": 0.1, "contrastive": True},
    {"ridge": 1.0, "contrastive": True, "n_components": 6},
    {"ridge": 0.0, "contrastive": True, "kernel": "linear"},
    {"ridge": 0.5, "contrastive": True, "n_landmarks": 7},
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()))
@pytest.mark.parametrize("relation", ("labels", "weighted"))
def test_closed_form_is_the_minimum(case, relation):
    """LBFGS does not get below it, and reaches it to 1e-7 relative."""
    x, y = data()
    graph = RelationGraph.from_labels(y) if relation == "labels" else weighted(1)
    model = KernelSSL(**{"n_components": 3, "random_state": 0, **case}).fit(x, graph)
    s = model.support_
    kernel, gram = kernel_of(model.kernel, x, s, model.gamma_), kernel_of(model.kernel, s, s, model.gamma_)
    reached = float(objective(model, dense(graph), kernel, torch.from_numpy(model.dual_coef_), gram))
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-12 * values[-1]
    basis = vectors[:, kept] * values[kept].rsqrt()
    g = dense(graph)
    lowest = minimum(lambda w: objective(model, g, kernel, basis @ w, gram), int(kept.sum()), model.n_components)
    assert reached <= lowest * (1 + 1e-10)
    assert reached == pytest.approx(lowest, rel=1e-7)


@pytest.mark.parametrize("contrastive", (False, True))
@pytest.mark.parametrize("n_components", (1, 3, 39))
def test_without_a_ridge_it_is_the_papers_matrix(contrastive, n_components):
    """ZZ' = (H - beta L/2)_{K,+} or (I + G)_{K,+}, for a kernel of full rank and a graph without equal eigenvalues."""
    x, _ = data(2)
    graph = weighted(2)
    model = KernelSSL(n_components, gamma=3.0, invariance=0.1, ridge=0.0, contrastive=contrastive).fit(x, graph)
    g = dense(graph)
    target = eye(N) + g if contrastive else eye(N) - 1 / N - 0.05 * (g.sum(1).diag() - g)
    values, vectors = torch.linalg.eigh(target)
    values = torch.cat([values.new_zeros(N - n_components), values[-n_components:].clamp_min(0)])
    z = torch.from_numpy(model.embedding_)
    z = z if contrastive else z - z.mean(0)
    assert torch.allclose(z @ z.T, vectors * values @ vectors.T, rtol=0, atol=1e-8)
    assert np.allclose(model.eigenvalues_, values.flip(0)[:n_components], rtol=0, atol=1e-8)
    assert not contrastive or n_components < 39 or (model.eigenvalues_ == 0).any()


def test_induced_kernel_is_the_papers():
    """k*(x, x') = k_{x,s} K^-1 ZZ' K^-1 k_{s,x'}, for new samples too."""
    x, y = data()
    new, other = data(1, 7)[0], data(2, 4)[0]
    model = KernelSSL(3, gamma=2.0).fit(x, y)
    inverse = torch.linalg.inv(kernel_of("rbf", x, x, 2.0))
    z = torch.from_numpy(model.embedding_)
    middle = inverse @ z @ z.T @ inverse
    expected = kernel_of("rbf", new, x, 2.0) @ middle @ kernel_of("rbf", x, other, 2.0)
    assert np.allclose(model.induced_kernel(new, other), expected, rtol=1e-6, atol=1e-9)
    assert np.array_equal(model.induced_kernel(new), model.induced_kernel(new, new))


@pytest.mark.parametrize("kernel", ("rbf", "linear", "cosine"))
@pytest.mark.parametrize("contrastive", (False, True))
@pytest.mark.parametrize("n_landmarks", (None, 9, N, 10 * N))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_transform_of_the_training_samples_is_their_embedding(kernel, contrastive, n_landmarks, dtype):
    x, y = data()
    settings = {"invariance": 0.01, "contrastive": contrastive, "n_landmarks": n_landmarks, "random_state": 1}
    model = KernelSSL(3, kernel=kernel, **settings)
    z = model.fit_transform(x.astype(dtype), y)
    assert z.dtype == dtype and z.shape == (N, 3) and z.any()
    atol = 1e-10 if dtype == np.float64 else 1e-6
    assert np.allclose(model.transform(x.astype(dtype)), z, rtol=0, atol=atol)
    sizes = ((z if contrastive else z - z.mean(0)).astype(float) ** 2).sum(0)
    assert np.allclose(sizes, model.eigenvalues_, rtol=1e-4, atol=1e-6) and (np.diff(model.eigenvalues_) <= 0).all()


def test_landmarks_that_are_all_samples_or_span_all_functions_change_nothing():
    x, y = data()
    whole = KernelSSL(3, invariance=0.1).fit(x, y)
    assert np.array_equal(KernelSSL(3, invariance=0.1, n_landmarks=N).fit(x, y).embedding_, whole.embedding_)
    line = KernelSSL(2, kernel="linear", invariance=0.01).fit(x, y)
    few = KernelSSL(2, kernel="linear", invariance=0.01, n_landmarks=5, random_state=3).fit(x, y)
    assert few.support_.shape == (5, D)
    assert np.allclose(few.embedding_, line.embedding_, atol=1e-10)
    again = KernelSSL(2, kernel="linear", invariance=0.01, n_landmarks=5, random_state=3).fit(x, y)
    assert np.array_equal(again.dual_coef_, few.dual_coef_)
    other = KernelSSL(2, n_landmarks=5, random_state=4).fit(x, y)
    assert not np.array_equal(other.support_, few.support_)


def test_more_landmarks_lower_the_objective():
    """Sets of landmarks that grow give spaces of functions that grow."""
    x, y = data()
    graph = RelationGraph.from_labels(y)
    reached = []
    for m in (3, 10, 25, None):
        model = KernelSSL(3, invariance=0.02, ridge=0.05, n_landmarks=m, random_state=0).fit(x, graph)
        s = model.support_
        kernel, gram = (kernel_of("rbf", a, s, model.gamma_) for a in (x, s))
        reached.append(float(objective(model, dense(graph), kernel, torch.from_numpy(model.dual_coef_), gram)))
    assert all(a > b for a, b in itertools.pairwise(reached)), reached


def test_kinds_of_arrays_agree():
    x, y = data()
    model = KernelSSL(3, invariance=0.02).fit(x, y)
    assert isinstance(model.embedding_, np.ndarray) and isinstance(model.support_, np.ndarray)
    tensor = KernelSSL(3, invariance=0.02).fit(torch.from_numpy(x), torch.from_numpy(y))
    assert isinstance(tensor.embedding_, torch.Tensor) and isinstance(tensor.dual_coef_, torch.Tensor)
    assert np.array_equal(tensor.embedding_.numpy(), model.embedding_)
    assert isinstance(tensor.transform(torch.from_numpy(x)), torch.Tensor)
    assert isinstance(tensor.transform(x), np.ndarray) and isinstance(
        model.transform(torch.from_numpy(x)), torch.Tensor
    )
    assert isinstance(tensor.induced_kernel(torch.from_numpy(x), x[:2]), torch.Tensor)
    assert np.array_equal(KernelSSL(3, invariance=0.02).fit(x.tolist(), y.tolist()).embedding_, model.embedding_)
    single = KernelSSL(3, invariance=0.02).fit(x.astype(np.float32), y)
    assert np.allclose(single.embedding_, model.embedding_, atol=1e-4)
    half = KernelSSL(3, invariance=0.02).fit(torch.from_numpy(x).bfloat16(), y)
    assert half.embedding_.dtype == torch.float32
    assert np.allclose(half.transform(x), model.transform(x), atol=0.1)


@pytest.mark.parametrize("contrastive", (False, True))
def test_kinds_of_relations_agree(contrastive):
    x, y = data()
    graph = RelationGraph.from_labels(y)
    matrix = graph.to_scipy()
    kinds = (graph, y, y.astype(str), matrix, matrix.toarray(), scipy.sparse.coo_matrix(matrix), dense(graph))
    found = [KernelSSL(3, invariance=0.02, contrastive=contrastive).fit(x, kind).embedding_ for kind in kinds]
    for z in found[1:]:
        assert np.allclose(z @ z.T, found[0] @ found[0].T, atol=1e-9)


def test_gamma_is_that_of_svc():
    x, y = data()
    for gamma in ("scale", "auto", 0.7):
        assert KernelSSL(gamma=gamma).fit(x, y).gamma_ == pytest.approx(SVC(gamma=gamma).fit(x, y)._gamma, rel=1e-12)
    same = np.ones((N, D))
    assert KernelSSL(contrastive=True).fit(same, y).gamma_ == SVC().fit(same, y)._gamma


def spirals(n, seed, turns=1.5, noise=0.02):
    """Two intertwined spirals in the unit disc, (n, 2), and the spiral of each point."""
    random = np.random.default_rng(seed)
    radius, y = np.sqrt(random.uniform(0.02, 1, n)), np.arange(n) % 2
    angle = 2 * np.pi * turns * radius + np.pi * y
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return x + noise * random.normal(size=x.shape), y


def nearest(kernel, own, labels):
    """The label of the nearest labelled sample, by the kernel's distance. `kernel` is (N, labelled), `own` its diagonal
    at the labelled samples."""
    return labels[(2 * kernel - own).argmax(1)]


@pytest.mark.parametrize("seed", range(3))
def test_two_spirals_with_one_label_each(seed):
    """The induced kernel separates them from one label per class, and the RBF kernel does not. Nor does the induced
    kernel if its bandwidth is the median distance, which spans both spirals: the embedding is then zero."""
    x, y = spirals(300, seed)
    new, truth = spirals(1000, seed + 100)
    random = np.random.default_rng(seed)
    model = KernelSSL(2).fit(x, y)
    with pytest.warns(UserWarning, match="The embedding is zero"):
        blind = KernelSSL(2, gamma=float(0.5 / median_bandwidth(torch.from_numpy(x)) ** 2)).fit(x, y)
    scores = {"induced": [], "rbf": [], "median": []}
    for _ in range(20):
        rows = np.array([random.choice(np.flatnonzero(y == label)) for label in (0, 1)])
        labelled, labels = x[rows], y[rows]
        for name, fitted in (("induced", model), ("median", blind)):
            own = np.diag(fitted.induced_kernel(labelled))
            scores[name].append((nearest(fitted.induced_kernel(new, labelled), own, labels) == truth).mean())
        rbf = kernel_of("rbf", new, labelled, model.gamma_).numpy()
        scores["rbf"].append((nearest(rbf, 1.0, labels) == truth).mean())
    assert np.median(scores["induced"]) > 0.98 and np.min(scores["induced"]) > 0.95
    assert np.median(scores["rbf"]) < 0.7
    assert np.median(scores["median"]) == 0.5
