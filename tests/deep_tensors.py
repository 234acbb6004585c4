"""Data and quick estimators for the tests of `DeepTensor`."""

from functools import partial

import numpy as np

from sslkern.decomposition import ConvGenerator, DeepTensor

SLIM = partial(ConvGenerator, width=16, coarsest=8)
Fast = partial(DeepTensor, generator=SLIM, max_iter=120, random_state=0)


def smooth(n, p, rank=2):
    """A matrix of this rank with smooth factors, between 0 and 1."""
    i, j = np.linspace(0, 3, n)[:, None], np.linspace(0, 2, p)[:, None]
    u, v = (np.hstack([np.sin(x * (k + 1)) + 1 for k in range(rank)]) for x in (i, j))
    x = u @ v.T
    return x / x.max()


def smooth_volume(shape=(24, 17, 9)):
    first, second, third = (np.linspace(0, 1, n) for n in shape)
    return np.einsum("i,j,l->ijl", np.exp(-first), 1 + second, np.cos(third)) + np.einsum(
        "i,j,l->ijl", np.sin(5 * first), np.cos(4 * second), 1 + third**2
    )


def error(model, truth):
    return float(np.sqrt(np.square(model.reconstruction_ - truth).mean()) / np.std(truth))


def svd(x, rank):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]
