"""The whitening layers of solo-learn in plain torch, by their published formulas, and the calls that tests compare."""

import torch
from ranks import close, normal

CASES = [  # name, shape, settings
    ("Whitening2d", (9, 4), {}),
    ("Whitening2d", (40, 4), {}),
    ("Whitening2d", (3, 5), {"eps": 0.1}),
    ("Whitening2d", (9, 1), {}),
    ("IterNorm", (9, 4), {}),
    ("IterNorm", (9, 4), {"num_groups": 1}),
    ("IterNorm", (9, 6), {"num_channels": 4, "T": 3}),
    ("IterNorm", (3, 8), {"num_groups": 1, "T": 1, "affine": False}),
    ("IterNorm", (5, 8, 2, 3), {"num_groups": 2, "dim": 4, "eps": 0.1, "momentum": 0.3}),
    ("IterNorm", (5, 6, 7), {"num_groups": 4, "dim": 3, "momentum": 1.0}),
]


class Whitening2d(torch.nn.Module):
    def __init__(self, output_dim, eps=0.0):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        covariance = x.T.cov()
        covariance = (1 - self.eps) * covariance + self.eps * torch.eye(x.shape[1], dtype=x.dtype)
        return (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T


class IterNorm(torch.nn.Module):
    def __init__(self, c, num_groups=64, num_channels=None, T=5, dim=2, eps=1e-5, momentum=0.1, affine=True):
        super().__init__()
        width = num_channels or -(-c // num_groups)
        while c % width:
            width //= 2
        self.T, self.eps, self.momentum, self.width = T, eps, momentum, width
        if affine:
            self.weight = torch.nn.Parameter(torch.ones(1, c, *[1] * (dim - 2)))
            self.bias = torch.nn.Parameter(torch.zeros(1, c, *[1] * (dim - 2)))
        self.affine = affine
        self.register_buffer("running_mean", torch.zeros(c // width, width, 1))
        self.register_buffer("running_wm", torch.eye(width).repeat(c // width, 1, 1))

    def forward(self, x):
        rows = x.movedim(1, -1).flatten(0, -2)
        parts = [self._whiten(k, part) for k, part in enumerate(rows.split(self.width, 1))]
        y = torch.cat(parts, 1).unflatten(0, (len(x), *x.shape[2:])).movedim(-1, 1)
        return y * self.weight + self.bias if self.affine else y

    def _whiten(self, k, x):
        if not self.training:
            return (x - self.running_mean[k, :, 0]) @ self.running_wm[k].T
        eye = torch.eye(self.width, dtype=x.dtype)
        covariance = (
            x.T.cov(correction=0) + self.eps * eye if self.width > 1 else x.var(0, correction=0)[None] + self.eps
        )
        trace, p = covariance.trace(), eye
        for _ in range(self.T):
            p = 1.5 * p - 0.5 * torch.linalg.matrix_power(p, 3) @ covariance / trace
        w = p / trace.sqrt()
        for buffer, new in ((self.running_mean, x.mean(0)[:, None]), (self.running_wm, w)):
            buffer[k] = self.momentum * new.detach() + (1 - self.momentum) * buffer[k]
        return (x - x.mean(0)) @ w


def assert_equal(ours, theirs, case, dtype, tolerance):
    """Two steps of training, and evaluation, of the same state."""
    name, shape, settings = case
    layers = [getattr(module, name)(shape[1], **settings).to(dtype) for module in (ours, theirs)]
    for parameter in layers[0].parameters():
        parameter.data = normal(*parameter.shape, dtype=dtype)
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    layers[1].load_state_dict(layers[0].state_dict())
    weights = normal(*shape, seed=9, dtype=dtype)
    for step in range(2):
        found = []
        for layer in layers:
            x = normal(*shape, seed=step, dtype=dtype).requires_grad_()
            y = layer(x)
            found.append((y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])))
        for k, (f, e) in enumerate(zip(*found, strict=True)):
            close(f, e, tolerance, (case, dtype, step, k), scale=1.0)
        for (key, f), e in zip(layers[0].state_dict().items(), layers[1].state_dict().values(), strict=True):
            assert f.shape == e.shape, (case, key)
            close(f, e, tolerance, (case, dtype, step, key), scale=1.0)
    f, e = (layer.eval()(normal(*shape, seed=5, dtype=dtype)) for layer in layers)
    close(f, e, tolerance, (case, dtype, "evaluation"))
