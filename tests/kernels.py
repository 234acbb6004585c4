"""Samples and kernels for the tests of `KernelSSL`."""

import numpy as np
import torch

N, D = 40, 3


def data(seed=0, n=N, d=D):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, d)), np.arange(n) % 5


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def kernel_of(name, x, s, gamma):
    """k(x, s) in plain torch."""
    x, s = torch.as_tensor(x).double(), torch.as_tensor(s).double()
    if name == "rbf":
        return (-gamma * (x[:, None] - s).square().sum(-1)).exp()
    if name == "cosine":
        x, s = x / x.norm(dim=1, keepdim=True), s / s.norm(dim=1, keepdim=True)
    return x @ s.T
