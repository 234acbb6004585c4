"""Networks, and covariance operators by autograd and by K itself, for the tests of covariance operators."""

import torch
from torch import nn

from sslkern.losses import simple_contrastive_loss


def relu_net(bias=False, last_bias=True, seed=0):
    """Layers "0", "2" and "4"; the bias of the last one may stay."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8, bias=bias),
        nn.ReLU(),
        nn.Linear(8, 7, bias=bias),
        nn.LeakyReLU(0.2),
        nn.Linear(7, 4, bias=last_bias),
    ).double()


class Residual(nn.Module):
    """A stem of any kind, a convolution, a residual block with a functional ReLU, pooling; no biases after the stem but
    the last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU(), nn.Dropout(0.5))
        self.entry = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.inner = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.entry(self.stem(x))
        x = x + self.inner(torch.relu(x))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def residual_net():
    torch.manual_seed(1)
    net = Residual().double()
    net(torch.randn(9, 1, 4, 4, dtype=torch.float64))  # statistics that are not those of the start
    return net


def views_of(v, n, *shape, seed=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, n, *shape, generator=generator, dtype=torch.float64)
    return (shared + 0.5 * torch.randn(v, n, *shape, generator=generator, dtype=torch.float64)).to(dtype)


def contrastive(f, beta=0.0, pairs="all"):
    """The library's loss, averaged over pairs of views."""
    losses = [
        simple_contrastive_loss(a, b, beta)
        for i, a in enumerate(f)
        for j, b in enumerate(f)
        if pairs == "all" or i != j
    ]
    return torch.stack(losses).mean()


def byol(f, predict, batch_norm=True, pairs="all"):
    """BYOL's loss of outputs that are not normalised, with a centring layer; all pairs of views in loops."""
    if batch_norm:
        f = f - f.mean((0, 1))
    losses = [
        (predict(a) - b.detach()).square().sum(-1).mean() / 2
        for i, a in enumerate(f)
        for j, b in enumerate(f)
        if pairs == "all" or i != j
    ]
    return torch.stack(losses).mean()


def descent(net, weight, views, loss):
    """The negative gradient by autograd, in evaluation mode."""
    training = net.training
    f = torch.stack([net.eval()(x).flatten(1) for x in views])
    net.train(training)
    return -torch.autograd.grad(loss(f), weight)[0]


def jacobians(net, name, views):
    """K', (V, N, D, n), row by row."""
    net.eval()
    weight = dict(net.named_parameters())[name].detach()

    def outputs(w, x):
        return torch.func.functional_call(net, {name: w}, (x[None],)).flatten()

    rows = [torch.func.jacrev(outputs)(weight, x).flatten(1) for x in views.flatten(0, 1)]
    return torch.stack(rows).detach().unflatten(0, views.shape[:2])


def covariance_of(k):
    """Cov_i with denominator N - 1 of (N, D, n): the sum over outputs too."""
    c = k - k.mean(0)
    return torch.einsum("idm,idn->mn", c, c) / (len(k) - 1)


def within_of(k, metric=None):
    """mean_i Var_views of (V, N, D, n), with a (D, D) matrix between."""
    c = k - k.mean(0)
    metric = torch.eye(k.shape[2], dtype=k.dtype) if metric is None else metric
    return torch.einsum("vidm,de,vien->mn", c, metric, c) / (k.shape[0] * k.shape[1])
