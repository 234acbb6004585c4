"""The objectives of the spectral embeddings, written with the package's ops, and their descent."""

from __future__ import annotations

import numpy as np
import torch

from sslkern.decomposition import RelationGraph
from sslkern.losses import spectral_contrastive_loss
from sslkern.ops import covariance


def vicreg(z, graph, g):
    """||Z'HZ/N - I||^2 + (2 g/N) Tr Z'LZ."""
    n = z.shape[0]
    variance, offdiag = covariance(z)
    biased = (n - 1) / n
    return (biased * variance - 1).square().sum() + biased**2 * offdiag + 2 * g / n * graph.dirichlet_energy(z)


def hinge_vicreg(z, graph, g):
    """VICReg as published: a hinge on the standard deviations and the squared off-diagonals."""
    variance, offdiag = covariance(z)
    return (1 - (variance + 1e-4).sqrt()).relu().sum() + offdiag + 2 * g / z.shape[0] * graph.dirichlet_energy(z)


def simclr(z, graph, g=None):
    """||ZZ' - G||^2 = ||ZZ'||^2 - 2 Tr Z'GZ + ||G||^2; the first term is that of the spectral contrastive loss."""
    n, mu = z.shape[0], 1e8  # no row is as long as sqrt(mu)
    square = z.square().sum(1)
    pairs = (mu * spectral_contrastive_loss(z, z, mu) + 2 * square.mean()) * n * (n - 1)  # i != j
    norm = float((graph.to_scipy().data ** 2).sum())
    return pairs + square.square().sum() - 2 * (z * graph.matmul(z)).sum() + norm


def barlow_twins(z, graph, g=None):
    """||Z'GZ - I||^2."""
    return (z.T @ graph.matmul(z) - torch.eye(z.shape[1], dtype=z.dtype)).square().sum()


OBJECTIVES = {"vicreg": vicreg, "simclr": simclr, "barlow_twins": barlow_twins}


def descend(objective, start, steps=40):
    """The argument and the value that L-BFGS reaches in float64."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=100, history_size=50, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = objective(x)
        value.backward()
        return value

    before = float("inf")
    for _ in range(steps):
        optimizer.step(closure)
        value = float(objective(x.detach()))
        if before - value <= 1e-12 * (1 + abs(value)):
            break
        before = value
    return x.detach(), float(objective(x.detach()))


def start(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_graph(n=40, degree=4, seed=0):
    rng = np.random.default_rng(seed)
    i, j = rng.integers(n, size=(2, degree * n))
    return RelationGraph.from_edges(i, j, n, rng.random(degree * n) + 0.1)


def dense(graph):
    return torch.from_numpy(graph.to_scipy().toarray())


def cosines(a, b):
    """The cosines of the principal angles of two column spaces."""
    return torch.linalg.svdvals(torch.linalg.qr(a)[0].T @ torch.linalg.qr(b)[0])
