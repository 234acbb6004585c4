"""Extreme eigenpairs of a relation and of its Laplacian, one connected component at a time.

A relation of samples often has many components, and these share eigenvalues: Krylov methods miss copies of a multiple
eigenvalue, and the constants on components are known exactly. So components are solved on their own, by LAPACK if they
are small, in batches of one size, and by ARPACK otherwise. A relation of classes is solved in closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.generators import generator
from ._classes import Classes
from ._edges import Edges
from .graph import RelationGraph

DENSE = 512  # the largest component for which LAPACK is taken
_BATCH = 2**22  # numbers in the dense blocks that are solved together
_RESTARTS = 3000

Pairs = tuple[Tensor, Tensor]  # eigenvalues (k,) and orthonormal eigenvectors (N, k), float64 on the CPU


def smallest_of_laplacian(graph: RelationGraph, k: int, random_state: Any) -> Pairs:
    """The k < N smallest eigenpairs of L among the vectors orthogonal to 1, ascending. The contrasts of connected
    components come first, with eigenvalues of exactly 0, the largest components first."""
    label, size = _components(graph)
    order = size.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel())
    flat = min(k, size.numel() - 1)
    zeros = torch.zeros(flat, dtype=torch.float64), contrasts(rank[label], size[order], flat)
    if flat == k:
        return zeros
    if isinstance(graph.relation, Classes):
        rest = _within_classes(graph.relation, k - flat)
    else:
        rest = _of_components(graph, label, size, k - flat, True, random_state)
    return torch.cat((zeros[0], rest[0])), torch.cat((zeros[1], rest[1]), 1)


def largest_of_relation(graph: RelationGraph, k: int, random_state: Any) -> Pairs:
    """The largest eigenpairs of G that are positive, descending: k of them, or fewer if G has fewer."""
    label, size = _components(graph)
    if isinstance(graph.relation, Classes):
        value, kept = (size - 1).double().sort(descending=True, stable=True)
        kept = kept[:k]
        vector = (label[:, None] == kept) / size[kept].double().sqrt()
        value = value[:k]
    else:
        value, vector = _of_components(graph, label, size, k, False, random_state)
    real = value > value.amax().clamp_min(0) * graph.n * torch.finfo(torch.float64).eps if value.numel() else value > 0
    return value[real], vector[:, real]


def contrasts(block: Tensor, size: Tensor, k: int) -> Tensor:
    """k orthonormal vectors, orthogonal to 1, that are constant on blocks of samples.

    Vector m compares block m + 1 with the blocks 0 to m together. `block` is the block of each sample, as a position in
    `size`, the sizes of the blocks."""
    size = size[: k + 1].double()
    before = size.cumsum(0)[:-1]
    after = before + size[1:]
    low, high = (size[1:] / (before * after)).sqrt(), -(before / (size[1:] * after)).sqrt()
    column = torch.arange(k)
    zero = torch.zeros((), dtype=torch.float64)
    return torch.where(block[:, None] <= column, low, torch.where(block[:, None] == column + 1, high, zero))


def _components(graph: RelationGraph) -> tuple[Tensor, Tensor]:
    """The connected component of each sample, and the sizes of the components."""
    if isinstance(graph.relation, Classes):
        return graph.relation.label, graph.relation.size
    adjacency = graph.to_scipy()
    from scipy.sparse.csgraph import connected_components

    _, label = connected_components(adjacency, directed=False)
    label = torch.from_numpy(label.astype(np.int64))
    return label, torch.bincount(label)


def _within_classes(relation: Classes, k: int) -> Pairs:
    """The contrasts inside of the classes, whose eigenvalues are the sizes of the classes, the smallest first."""
    values, vectors = [], []
    order = relation.size.argsort(stable=True)
    for c in order[relation.size[order] > 1].tolist():
        count = min(k, int(relation.size[c]) - 1)
        member = (relation.label == c).nonzero()[:, 0]
        vector = torch.zeros(relation.n, count, dtype=torch.float64)
        vector[member] = contrasts(torch.arange(member.numel()), torch.ones(member.numel()), count)
        values.append(relation.size[c].double().expand(count))
        vectors.append(vector)
        k -= count
        if k == 0:
            break
    return torch.cat(values), torch.cat(vectors, 1)


def _of_components(
    graph: RelationGraph, label: Tensor, size: Tensor, k: int, laplacian: bool, random_state: Any
) -> Pairs:
    """The k smallest eigenpairs of L that are not constant on components, or the k largest of G."""
    member = label.argsort(stable=True)  # the samples, one component after another
    first = size.cumsum(0) - size
    large = (size > DENSE) & (size > 4 * k)
    found = []
    for s in torch.unique(size[~large & (size > 1)]).tolist():
        for some in (size == s).nonzero()[:, 0].split(max(1, _BATCH // s**2)):
            samples = member[first[some][:, None] + torch.arange(s)]
            value, vector = _dense_pairs(_blocks(graph, samples), k, laplacian)
            best = value.flatten().argsort(descending=not laplacian, stable=True)[:k]
            found.append((value.flatten()[best], samples[best // value.shape[1]], vector.mT.flatten(0, 1)[best]))
    for c in large.nonzero()[:, 0].tolist():
        samples = member[first[c] : first[c] + size[c]]
        value, vector = _krylov_pairs(graph.to_scipy(), samples, k, laplacian, random_state)
        found.append((value, samples.expand(value.numel(), -1), vector.T))
    return _merged(found, graph.n, k, laplacian)


def _blocks(graph: RelationGraph, samples: Tensor) -> Tensor:
    """G within each component of one size, (c, s, s). `samples`, (c, s), are those of each component."""
    edges = graph.relation
    assert isinstance(edges, Edges)
    c, s = samples.shape
    place = torch.full((graph.n,), -1)
    place[samples.flatten()] = torch.arange(c * s)
    here = place[edges.i] >= 0
    i, j, weight = place[edges.i[here]], place[edges.j[here]], edges.weight[here]
    block = weight.new_zeros(c, s, s)
    block[i // s, i % s, j % s] = block[i // s, j % s, i % s] = weight
    return block


def _merged(found: list[tuple[Tensor, Tensor, Tensor]], n: int, k: int, laplacian: bool) -> Pairs:
    """The best k of pairs from several components, each with values (m,), samples (m, s) and vectors (m, s)."""
    if not found:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(n, 0, dtype=torch.float64)
    value = torch.cat([part[0] for part in found])
    best = value.argsort(descending=not laplacian, stable=True)[:k]
    vectors = torch.zeros(n, best.numel(), dtype=torch.float64)
    each = [(samples, vector) for _, rows, columns in found for samples, vector in zip(rows, columns, strict=True)]
    for column, source in enumerate(best.tolist()):
        samples, vector = each[source]
        vectors[samples, column] = vector
    return value[best], vectors


def _dense_pairs(block: Tensor, k: int, laplacian: bool) -> Pairs:
    """The pairs of each component of one size, (c, m) and (c, s, m): m = min(k, s - 1) of L, or min(k, s) of G."""
    s = block.shape[-1]
    if not laplacian:
        value, vector = torch.linalg.eigh(block)
        return value[:, -k:].flip(1), vector[..., -k:].flip(2)
    degree = block.sum(-1)
    above = 4 * degree.amax(-1)[:, None, None] / s  # moves the constant above the spectrum, which ends at 2 max d
    value, vector = torch.linalg.eigh(degree.diag_embed() - block + above)
    count = min(k, s - 1)
    return value[:, :count].clamp_min(0), vector[..., :count]


def _krylov_pairs(g: Any, samples: Tensor, k: int, laplacian: bool, random_state: Any) -> Pairs:
    """The pairs of one large component by products alone: the largest of G, or of cI - L with c = 2 max d, which is not
    below the largest of L."""
    if samples.numel() < g.shape[0]:
        g = g[samples.numpy()][:, samples.numpy()]
    degree = g.sum(1)
    above = 2 * degree.max()

    def shifted(x: np.ndarray) -> np.ndarray:
        x = x - x.mean()
        y = (above - degree) * x + g @ x
        return y - y.mean()

    value, vector = _largest(shifted if laplacian else g.__matmul__, g.shape[0], k, above, random_state)
    return ((above - value).clamp_min(0) if laplacian else value), vector


def _largest(product: Callable[[np.ndarray], np.ndarray], n: int, k: int, scale: float, random_state: Any) -> Pairs:
    """The k largest eigenpairs of a symmetric operator of size `scale` that are positive, or fewer if it has fewer.

    A Krylov space holds one vector of each eigenspace, so ARPACK may miss copies of a multiple eigenvalue: it is asked
    again, in the complement of what was found, until that has nothing larger.
    """
    rng = generator(random_state)
    value, vector = np.zeros(0), np.zeros((n, 0))

    def ask(count: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        start = torch.randn(n, generator=rng, dtype=torch.float64).numpy()
        more, columns = _arpack(product, vector, count, start, tolerance)
        larger = more > 1e-10 * scale + (value[-1] if value.size == k else 0)
        return more[larger], columns[:, larger]

    while True:
        more, columns = ask(k, 1e-11)
        value, vector = np.concatenate((value, more)), np.concatenate((vector, columns), 1)
        order = np.argsort(-value, kind="stable")[:k]
        value, vector = value[order], vector[:, order]
        if more.size == 0 or ask(1, 1e-8)[0].size == 0:  # mostly, nothing was missed
            return torch.from_numpy(value), torch.from_numpy(vector)


def _arpack(
    product: Callable[[np.ndarray], np.ndarray], known: np.ndarray, k: int, start: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenpairs in the complement of the orthonormal vectors that are known."""
    from scipy.sparse import linalg

    def without(x: np.ndarray) -> np.ndarray:
        return x - known @ (known.T @ x)

    def deflated(x: np.ndarray) -> np.ndarray:
        return without(product(without(x.reshape(-1))))

    n = start.size
    operator = linalg.LinearOperator((n, n), deflated, dtype=np.float64)
    width = min(n, max(3 * k, 40))
    try:
        found = linalg.eigsh(operator, k, which="LA", v0=without(start), ncv=width, maxiter=_RESTARTS, tol=tolerance)
    except linalg.ArpackNoConvergence as error:
        raise RuntimeError(
            f"The eigenvalues of a component of {n} samples did not converge in {_RESTARTS} restarts: the graph is too "
            "close to a long chain, or too many of its eigenvalues are nearly equal."
        ) from error
    return found
