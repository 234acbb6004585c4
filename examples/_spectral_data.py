"""The objectives of examples/spectral_embedding.py, their descent, and small helpers of its tables."""

import time

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from sslkern.ops import covariance

METHODS = {"vicreg": "VICReg, relaxed", "simclr": "SimCLR surrogate", "barlow_twins": "Barlow Twins surrogate"}
NEIGHBORS = 10  # of the graphs
INVARIANCE = 2.0  # g of the relaxed VICReg objective


def objective(method, graph):
    """The function of Z that the closed form of a method minimises, in O(edges K + N K^2) work."""
    n, norm = graph.n, float((graph.to_scipy().data ** 2).sum())

    def vicreg(z):  # ||Z'HZ/N - I||^2 + (2 g/N) Tr Z'LZ
        variance, offdiag = covariance(z)
        scale = (n - 1) / n
        distance = (scale * variance - 1).square().sum() + scale**2 * offdiag
        return distance + 2 * INVARIANCE / n * graph.dirichlet_energy(z)

    def simclr(z):  # ||ZZ' - G||^2
        return (z.T @ z).square().sum() - 2 * (z * graph.matmul(z)).sum() + norm

    def barlow_twins(z):  # ||Z'GZ - I||^2
        return (z.T @ graph.matmul(z) - torch.eye(z.shape[1], dtype=z.dtype)).square().sum()

    return {"vicreg": vicreg, "simclr": simclr, "barlow_twins": barlow_twins}[method]


def descend(function, shape, seed, steps):
    """L-BFGS in float64 from random Z: Z, and the value after every 10 iterations, until 10 gain less than 1e-12."""
    z = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=10, history_size=50, tolerance_grad=0, tolerance_change=0,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = function(z)
        value.backward()
        return value

    values = []
    for _ in range(steps):
        optimizer.step(closure)
        values.append(float(function(z.detach())))
        if len(values) > 1 and values[-2] - values[-1] <= 1e-12 * (1 + values[-1]):
            break
    return z.detach(), values


def rotated(z, target):
    """z after the rotation that brings it closest to the target."""
    u, _, vt = torch.linalg.svd(z.T @ target)
    return z @ (u @ vt)


def cosine(a, b):
    """The smallest cosine of the principal angles of two centred embeddings."""
    q, r = (np.linalg.qr(np.asarray(x) - np.asarray(x).mean(0))[0] for x in (a, b))
    return np.linalg.svd(q.T @ r)[1].min()


def timed(call):
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def accuracy(train, test, train_y, test_y):
    """Of a classifier by 5 nearest neighbours."""
    return KNeighborsClassifier(5).fit(train, train_y).score(test, test_y)


def spread(values):
    """Median and range, as text."""
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
