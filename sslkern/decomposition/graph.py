"""Which samples are views of the same thing: a relation graph, and its products without an N x N matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from ..core import checks
from ..core.dtypes import accumulation_dtype
from ._classes import Classes
from ._edges import GATHERED, Edges
from ._read import as_edge_weights, as_indices, as_labels, as_rows, as_size, symmetric_entries

try:
    from sklearn.neighbors import NearestNeighbors
except ImportError:
    NearestNeighbors = None


class RelationGraph:
    r"""A relation between n samples: a symmetric matrix G of weights >= 0 with a zero diagonal, and its Laplacian.

        G_ij       how strongly samples i and j are known to be views of the same thing; 0 if nothing is known
        d_i        sum_j G_ij, the degree
        L          diag(d) - G, the Laplacian: Tr Z'LZ = (1/2) sum_ij G_ij |z_i - z_j|^2

    An instance is made by one of the constructors `from_edges`, `from_labels`, `from_views`, `from_neighbors` and
    `from_matrix`. It holds the edges, or the label of each sample if all samples of a class are related. It holds no
    N x N matrix: products cost O(edges P) or O(N P) for P columns. A relation of a sample with itself has no effect on
    L and is dropped by all constructors.

    The relation is kept on the CPU in float64. The methods accept tensors on any device, and keep a copy of the
    relation there, in the dtype of the tensor, from the first call on. float16 and bfloat16 tensors are converted to
    float32, and their results are float32. On a CUDA device, the last bits of a sparse product may differ from call to
    call.

    Attributes:
        n: the number of samples.
        relation: the edges or the classes.

    Source: Balestriero and LeCun, Contrastive and non-contrastive self-supervised learning recover global and local
    spectral embedding methods (2205.11508).
    """

    n: int

    def __init__(self, relation: Edges | Classes) -> None:
        if not isinstance(relation, Edges | Classes):
            raise TypeError("RelationGraph is made by its constructors from_edges, from_labels, from_matrix, ...")
        self.relation = relation
        self.n = relation.n

    @classmethod
    def from_edges(cls, i: Any, j: Any, n: int, weight: Any = None) -> RelationGraph:
        """The relation with G_ij = G_ji = the sum of the weights of all edges between samples i and j.

        An edge may be given in either direction. An edge that is given twice, or in both directions, has twice the
        weight. Edges from a sample to itself are dropped.

        Args:
            i, j: the two ends of each edge, (E,), integers in [0, n), E >= 0: an array, a tensor or a list.
            n: the number of samples, >= 1.
            weight: (E,), finite numbers >= 0; None for 1.
        """
        n = as_size("n", n)
        i, j = as_indices("i", i, n), as_indices("j", j, n)
        if i.shape != j.shape:
            raise ValueError(f"i and j must have the same length, got {i.numel()} and {j.numel()}.")
        return cls(Edges.merged(i, j, as_edge_weights(weight, i.numel()), n))

    @classmethod
    def from_labels(cls, labels: Any, unlabelled: int | str | None = "auto") -> RelationGraph:
        """The relation of all pairs with the same label, with weight 1, computed from sums over classes.

        Args:
            labels: (N,), integers, floats without a fraction, booleans or strings: an array, a tensor or a list.
            unlabelled: the label of samples that are related to no other sample. None if there is none. "auto" stands
                for -1, as in scikit-learn, unless the labels are -1 and 1 alone: these are two classes.
        """
        return cls(Classes(*as_labels(labels, unlabelled)))

    @classmethod
    def from_views(cls, n: int, views: int) -> RelationGraph:
        """The relation of n samples with `views` views each, stacked view by view: rows i, n + i, 2 n + i, ... are the
        views of sample i, and related by pairs with weight 1. The graph has n * views nodes. For rows in another order
        use `from_labels` with the number of the sample of each row."""
        n, views = as_size("n", n), as_size("views", views)
        return cls(Classes(torch.arange(n).repeat(views), n))

    @classmethod
    def from_neighbors(cls, x: Any, k: int) -> RelationGraph:
        """The relation G = (A + A')/2, where A_ij = 1 if j is one of the k nearest neighbours of i.

        The weight is 1 if both are neighbours of each other, and 1/2 if one is. A row is not a neighbour of itself, but
        it may be one of its duplicates.

        Neighbours are found by scikit-learn, if it is installed and x is on the CPU, and otherwise from all distances,
        some rows at a time.

        Args:
            x: the samples, (N, D), finite: an array, a tensor or a list. Distances are Euclidean.
            k: the number of neighbours, 1 <= k < N.
        """
        rows, k = as_rows(x), as_size("k", k)
        n = rows.shape[0]
        if k >= n:
            raise ValueError(
                f"k must be below the number of rows of x, got k = {k} and x of shape {tuple(rows.shape)}."
            )
        if NearestNeighbors is not None and rows.device.type == "cpu":
            found = NearestNeighbors(n_neighbors=k).fit(rows.numpy()).kneighbors(return_distance=False)
            near = torch.from_numpy(found.astype(np.int64))
        else:
            near = _neighbors(rows, k).cpu()
        half = torch.full((n * k,), 0.5, dtype=torch.float64)
        return cls(Edges.merged(torch.arange(n).repeat_interleave(k), near.flatten(), half, n))

    @classmethod
    def from_matrix(cls, g: Any) -> RelationGraph:
        """The relation of an adjacency matrix (N, N): a SciPy sparse matrix, a sparse or dense tensor, or an array. It
        must be finite, >= 0 and symmetric up to rounding. Its diagonal is dropped."""
        return cls(Edges.merged(*symmetric_entries("g", g)))

    def __repr__(self) -> str:
        return f"RelationGraph(n={self.n}, {self.relation!r})"

    def degrees(self, like: Tensor | None = None) -> Tensor:
        """The degrees d = G 1, (N,), in the dtype of the results for `like` and on its device; float64 on the CPU if
        `like` is None."""
        degrees = self.relation.degrees()
        return degrees if like is None else degrees.to(like.device, accumulation_dtype(like))

    def matmul(self, x: Tensor) -> Tensor:
        """G x for x of shape (N, P), differentiable."""
        return _Symmetric.apply(self._checked("x", x), self.relation.matmul)

    def laplacian(self, x: Tensor) -> Tensor:
        """L x for x of shape (N, P), differentiable. A column with NaN or inf becomes NaN if the graph has edges."""
        return _Symmetric.apply(self._checked("x", x), self.relation.laplacian)

    def dirichlet_energy(self, z: Tensor) -> Tensor:
        """Tr Z'LZ = (1/2) sum_ij G_ij |z_i - z_j|^2, a scalar >= 0 in units of z^2, for z of shape (N, P).

        It is differentiable, and its gradient 2 L Z is differentiable too. The sum of squares is computed from the
        differences, so it does not cancel where related samples are close: in O(edges P) work, with 2^20 numbers at
        a time.
        """
        return _Energy.apply(self._checked("z", z), self.relation)

    def to_scipy(self) -> Any:
        """G as a `scipy.sparse.csr_array` in float64. If it was made from labels or views, it has n_c (n_c - 1) entries
        for each class of n_c samples."""
        try:
            from scipy.sparse import csr_array
        except ImportError as error:
            raise ImportError(
                "A relation as a sparse matrix, and its eigenvectors, need SciPy: install scipy."
            ) from error
        starts, columns, weight = (part.numpy() for part in self.relation.csr())
        if max(columns.size, self.n) < 2**31:  # what SciPy's own functions expect
            starts, columns = starts.astype(np.int32), columns.astype(np.int32)
        return csr_array((weight, columns, starts), shape=(self.n, self.n))

    def _checked(self, name: str, x: Tensor) -> Tensor:
        checks.matrix(name, x)
        if x.shape[0] != self.n:
            raise ValueError(f"{name} must have {self.n} rows, one for each sample, got shape {tuple(x.shape)}.")
        return x.to(accumulation_dtype(x)).contiguous()


class _Symmetric(Function):
    """A product with a symmetric matrix, which `product` computes; also its own derivative."""

    @staticmethod
    def forward(ctx, x, product):
        ctx.product = product
        return product(x)

    @staticmethod
    def backward(ctx, grad):
        return _Symmetric.apply(grad.contiguous(), ctx.product), None


class _Energy(Function):
    @staticmethod
    def forward(ctx, z, relation):
        ctx.relation = relation
        ctx.save_for_backward(z)
        return relation.energy(z)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return 2 * grad * _Symmetric.apply(z, ctx.relation.laplacian), None


def _neighbors(x: Tensor, k: int) -> Tensor:
    """The k nearest rows of every row, itself excluded, (N, k)."""
    step = max(1, 16 * GATHERED // x.shape[0])
    found = []
    for start in range(0, x.shape[0], step):
        some = x[start : start + step]
        distance = torch.cdist(some, x, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(some.shape[0], device=x.device)
        distance[own, start + own] = torch.inf
        found.append(distance.topk(k, largest=False).indices)
    return torch.cat(found)


def as_graph(graph: Any, n: int, name: str = "graph") -> RelationGraph:
    """A relation of n samples from what users have: a `RelationGraph`; an adjacency matrix of shape (n, n), as
    `from_matrix` accepts it; or labels of shape (n,), as `from_labels` accepts them. `name` is the argument in errors.

    Raises:
        TypeError or ValueError: `graph` is None, has another number of samples, or is refused by the constructor.
    """
    if graph is None:
        raise ValueError(
            f"{name} must be a RelationGraph, labels of shape ({n},) or a matrix of shape ({n}, {n}), got None."
        )
    if isinstance(graph, RelationGraph):
        made = graph
    else:
        sparse = hasattr(graph, "tocoo") or isinstance(graph, Tensor)
        given = graph if sparse else np.asarray(graph)
        shape = tuple(given.shape)
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape != (n, n)):
            raise ValueError(
                f"{name} must be labels of shape ({n},) or a matrix of shape ({n}, {n}), got shape {shape}."
            )
        made = RelationGraph(
            Classes(*as_labels(given, "auto", name))
            if len(shape) == 1
            else Edges.merged(*symmetric_entries(name, given))
        )
    if made.n != n:
        raise ValueError(f"{name} must relate {n} samples, got {made.n}.")
    return made
