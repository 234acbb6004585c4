"""The embeddings that minimise self-supervised objectives, in closed form: eigenvectors of a relation of samples."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..core import checks
from ..core.generators import generator
from ._base import Array, column_signs
from ._read import as_size
from ._spectrum import largest_of_relation, smallest_of_laplacian
from .graph import RelationGraph, as_graph

Method = Literal["vicreg", "simclr", "barlow_twins"]
_METHODS = get_args(Method)


def optimal_embedding(
    graph: Any,
    n_components: int,
    method: Method = "vicreg",
    invariance: float | None = None,
    random_state: Any = 0,
) -> Array:
    r"""The embedding Z of N samples, (N, K), that minimises a self-supervised objective on a relation of the samples.

    G is the relation, d its degrees, L = diag(d) - G its Laplacian, and H = I - 11'/N. The objectives and minimisers:

        vicreg         ||Z'HZ/N - I||^2 + (2 g/N) Tr Z'LZ      Z = sqrt(N) U_K diag(1 - g lambda)_+^(1/2)
        simclr         ||ZZ' - G||^2                           Z = P_K diag(nu)_+^(1/2)
        barlow_twins   ||Z'GZ - I||^2                          Z = P_K diag(nu)^(-1/2)

    lambda and U_K are the K smallest eigenvalues of L and its eigenvectors among the vectors orthogonal to 1: Laplacian
    eigenmaps. nu and P_K are the K largest eigenvalues of G and its eigenvectors: classical scaling of G, which is not
    centred, and kernel canonical correlation analysis. A minimiser is unique up to a rotation of its columns, if the
    next eigenvalue differs from the last of the K; that of Barlow Twins is one of many, because any K positive
    eigenvalues reach 0.

    "vicreg" is VICReg with the squared distance of the covariance to I in place of the hinge and the off-diagonals, and
    g is the ratio of the coefficient of the invariance to that of this distance; "simclr" is a quadratic surrogate of
    its loss. The hinge on the standard deviations and the softmax have no such closed forms, and Barlow Twins with
    normalised columns has others.

    If G has fewer than K positive eigenvalues, the remaining columns of "simclr" and "barlow_twins" are 0, with a
    warning. They are then still minimisers: the minimum of Barlow Twins is the number of these columns.

    The work is a few hundred products with L or G for large connected components, by ARPACK, and more for graphs that
    are close to a long chain. Components of at most 512 samples are solved by LAPACK in batches, and relations from
    labels or views without an eigenvalue solver. It runs on the CPU in float64 and needs SciPy if the relation has
    edges. scikit-learn's `SpectralEmbedding`, which uses the normalised Laplacian, gives the same subspace if all
    degrees are equal. It factorises the Laplacian: that is faster for samples on a surface or a curve, and much slower
    for neighbours in many dimensions.

    Args:
        graph: what `as_graph` accepts: a `RelationGraph`, an adjacency matrix (N, N) or labels (N,).
        n_components: K, an integer >= 1, at most N - 1 for "vicreg" and N for the others.
        method: one of the three names above.
        invariance: g >= 0, used by "vicreg" only. Directions with lambda >= 1/g are 0. None for 1/(2 lambda_K), or 1 if
            lambda_K = 0: the last column then keeps half of the variance of a column with lambda = 0.
        random_state: the start of ARPACK: an int, a NumPy or torch generator, or None for a new one at each call.

    Returns:
        Z, float64. It is a tensor if `graph` is a tensor (on its device) or a `RelationGraph` (on the CPU), and
        otherwise a NumPy array. In every column, the first of the entries that are largest in size is positive.

    Raises:
        TypeError or ValueError: an argument is invalid. ImportError: SciPy is missing. RuntimeError: ARPACK did not
        converge.

    Source: Balestriero and LeCun, Contrastive and non-contrastive self-supervised learning recover global and local
    spectral embedding methods (2205.11508).
    """
    checks.one_of("method", method, _METHODS)
    k = as_size("n_components", n_components)
    if invariance is not None and method != "vicreg":
        raise ValueError(f"invariance must be None for method {method!r}, which has no such term, got {invariance!r}.")
    if invariance is not None:
        invariance = checks.non_negative("invariance", invariance)
    generator(random_state)  # checked before any work
    given = graph if isinstance(graph, RelationGraph | Tensor) or hasattr(graph, "tocoo") else np.asarray(graph)
    shape = (given.n,) if isinstance(given, RelationGraph) else tuple(given.shape)
    if len(shape) not in (1, 2) or shape[0] == 0:
        raise ValueError(f"graph must be a RelationGraph, labels (N,) or a matrix (N, N), got shape {shape}.")
    n = shape[0]
    relation = as_graph(given, n)
    if k > n - (method == "vicreg"):
        raise ValueError(f"n_components must be at most {n - (method == 'vicreg')} for {n} samples, got {k}.")
    z = _minimiser(relation, k, method, invariance, random_state)
    if isinstance(graph, Tensor):
        return z.to(graph.device)
    return z if isinstance(graph, RelationGraph) else z.numpy()


def _minimiser(graph: RelationGraph, k: int, method: str, invariance: float | None, random_state: Any) -> Tensor:
    if method == "vicreg":
        value, vector = smallest_of_laplacian(graph, k, random_state)
        return column_signs(vector) * vector * (graph.n * kept(value, invariance)).sqrt()
    value, vector = largest_of_relation(graph, k, random_state)
    missing = k - value.numel()
    if missing:
        warnings.warn(
            f"The relation has only {value.numel()} positive eigenvalues, so the last {missing} of {k} columns are 0.",
            stacklevel=3,
        )
    z = column_signs(vector) * vector * (value.sqrt() if method == "simclr" else value.rsqrt())
    return torch.cat((z, z.new_zeros(graph.n, missing)), 1)


def kept(value: Tensor, invariance: float | None) -> Tensor:
    """(1 - g lambda)_+, the variance that each direction keeps, for ascending eigenvalues. The default of g is
    1/(2 lambda_K), or 1 if lambda_K = 0."""
    return (1 - default_invariance(value, invariance) * value).clamp_min(0)


def default_invariance(value: Tensor, invariance: float | None) -> float:
    if invariance is not None:
        return float(invariance)
    last = float(value[-1]) if value.numel() else 0.0
    chosen = 1 / (2 * last) if last > 0 else 1.0
    return chosen if math.isfinite(chosen) else 1.0
