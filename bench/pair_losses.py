"""Cases of losses of pairs of rows: the published formula, and the smart version in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkern import losses

from .case import Case, Loss
from .variants import by_reference, compiled

SHAPES = ((64, 64), (256, 256), (256, 2048), (1024, 128))
REGIONS = 16  # of an image, in DetCon; its rows are regions


def cosine_published(p: Tensor, z: Tensor) -> Tensor:
    return -F.cosine_similarity(p, z, dim=1, eps=1e-8).mean()


def cosine_smart(p: Tensor, z: Tensor) -> Tensor:
    """Each sum in one pass."""
    lengths = [torch.linalg.vector_norm(x, dim=1).clamp_min(1e-8) for x in (p, z)]
    return -((p * z).sum(1) / (lengths[0] * lengths[1])).mean()


def koleo_published(z: Tensor) -> Tensor:
    x = F.normalize(z, dim=-1, eps=1e-8)
    products = x @ x.T
    nearest = x[products.fill_diagonal_(-2).argmax(1)]
    return -(F.pairwise_distance(x, nearest, 2, 1e-8) + 1e-8).log().mean()


def koleo_smart(z: Tensor) -> Tensor:
    """No graph of the products, and a gather that adds up its gradients by rows."""
    x = F.normalize(z, dim=-1, eps=1e-8)
    with torch.no_grad():
        index = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -(torch.linalg.vector_norm(x - x.index_select(0, index) + 1e-8, dim=1) + 1e-8).log().mean()


def uniformity_published(a: Tensor, b: Tensor, t: float = 2.0) -> Tensor:
    x, y = F.normalize(a), F.normalize(b)
    potentials = [torch.pdist(z).square().mul(-t).exp().mean().log() for z in (x, y)]
    return (x - y).norm(dim=1).square().mean() + sum(potentials) / 2


def uniformity_smart(a: Tensor, b: Tensor, t: float = 2.0) -> Tensor:
    """Distances from products of rows of unit length."""
    x, y = F.normalize(a), F.normalize(b)
    n = len(x)
    constant = x.new_tensor(-2 * t)
    sums = [torch.addmm(constant, z, z.T, alpha=2 * t).exp().sum() - n for z in (x, y)]
    return (x - y).square().sum(1).mean() + sum((s / (n * (n - 1))).log() for s in sums) / 2


def macl_published(a: Tensor, b: Tensor, temperature: float = 0.1, alpha: float = 0.5) -> Tensor:
    n, z = len(a), F.normalize(torch.cat([a, b]), dim=-1)
    s = z @ z.T
    own, other = torch.arange(2 * n, device=z.device), torch.arange(2 * n, device=z.device).roll(n)
    t = temperature * (1 + alpha * s[own, other].detach().mean())
    logs = (s / t).fill_diagonal_(-torch.inf).log_softmax(1)[own, other]
    return -(logs / (1 - logs.detach().exp() + 1e-8)).mean()


def macl_smart(a: Tensor, b: Tensor, temperature: float = 0.1, alpha: float = 0.5) -> Tensor:
    """The positives from the rows, and no log-softmax of the matrix."""
    z = F.normalize(torch.cat([a, b]), dim=-1)
    positive = (z[: len(a)] * z[len(a) :]).sum(1)
    t = temperature * (1 + alpha * positive.detach().mean())
    logs = positive.repeat(2) / t - (z @ z.T / t).fill_diagonal_(-torch.inf).logsumexp(1)
    return -(logs / (1 - logs.detach().exp() + 1e-8)).mean()


def alignment_published(s: Tensor, t: Tensor) -> Tensor:
    grams = [z @ z.mT for z in (s, t)]
    k, m = (g - g.mean(-1, keepdim=True) - g.mean(-2, keepdim=True) + g.mean((-2, -1), keepdim=True) for g in grams)
    sums = [(p * q).sum((-2, -1)) for p, q in ((k, m), (k, k), (m, m))]
    return (1 - sums[0] / (sums[1].clamp_min(1e-6).sqrt() * sums[2].clamp_min(1e-6).sqrt())).mean()


def alignment_smart(s: Tensor, t: Tensor) -> Tensor:
    """Centred tokens, and the products of the smaller side."""
    s, t = (z - z.mean(-2, keepdim=True) for z in (s, t))
    if 2 * s.shape[-2] < 3 * s.shape[-1]:
        k, m = s @ s.mT, t @ t.mT
        sums = [(k * m).sum((-2, -1)), k.square().sum((-2, -1)), m.square().sum((-2, -1))]
    else:
        sums = [(p.mT @ q).square().sum((-2, -1)) for p, q in ((s, t), (s, s), (t, t))]
    return (1 - sums[0] * (sums[1] * sums[2]).rsqrt()).mean()


def gram_published(s: Tensor, t: Tensor) -> Tensor:
    s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    return F.mse_loss(s @ s.mT, t @ t.mT)


def gram_smart(s: Tensor, t: Tensor) -> Tensor:
    """One product of differences and sums."""
    s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    half = (s + t) @ (s - t).mT
    return ((half + half.mT) / 2).square().mean()


def _regions(z: Tensor) -> tuple[Tensor, Tensor]:
    """The regions of each image, and their ids, which are all different."""
    regions = z.view(-1, REGIONS, z.shape[1])
    return regions, torch.arange(REGIONS, device=z.device).expand(regions.shape[:2])


def detcon_published(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """With the similarities of all regions of all images, (B, M, B, M)."""
    (x, ids), (y, _) = _regions(F.normalize(a, dim=-1)), _regions(F.normalize(b, dim=-1))
    images = torch.eye(len(x), device=a.device)[:, None, :, None]
    alike = (ids[:, :, None] == ids[:, None, :]).to(a)[:, :, None] * images
    loss = a.new_zeros(())
    for own, other in ((x, y), (y, x)):
        across = torch.einsum("abk,uvk->abuv", own, other) / temperature
        within = torch.einsum("abk,uvk->abuv", own, own) / temperature - 1e9 * alike
        logs = torch.cat([across, within], 2).flatten(2).log_softmax(-1)
        labels = torch.cat([alike, 0 * alike], 2).flatten(2)
        loss = loss - (labels / labels.sum(-1, keepdim=True) * logs).sum(-1).mean()
    return loss


def detcon_smart(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """Each pair of regions once: for ids that are all different, it is NT-Xent over the regions."""
    z, n = F.normalize(torch.cat([a, b]), dim=-1), len(a)
    positive = (z[:n] * z[n:]).sum(1).repeat(2) / temperature
    return 2 * ((z @ z.T / temperature).fill_diagonal_(-torch.inf).logsumexp(1) - positive).mean()


def _cosine(p: Tensor, z: Tensor) -> Tensor:
    return losses.negative_cosine_loss(p, z, detach=False)


def _detcon(a: Tensor, b: Tensor) -> Tensor:
    (x, ids), (y, _) = _regions(a), _regions(b)
    return losses.detcon_loss(x, y, ids, ids)


def _of_images(loss: Loss) -> Loss:
    """A loss of tokens (B, N, D) for a single image, whose teacher has no gradient."""
    return lambda s, t: loss(s[None], t[None].detach()) + 0 * t[0, 0]


CASES: dict[str, tuple[int, Loss, Loss, Loss]] = {
    "negative cosine": (2, cosine_published, cosine_smart, _cosine),
    "koleo": (1, koleo_published, koleo_smart, losses.koleo_loss),
    "alignment and uniformity": (2, uniformity_published, uniformity_smart, losses.alignment_uniformity_loss),
    "macl": (2, macl_published, macl_smart, losses.macl_loss),
    "kernel alignment": (
        2,
        _of_images(alignment_published),
        _of_images(alignment_smart),
        _of_images(losses.kernel_alignment_loss),
    ),
    "gram anchoring": (2, _of_images(gram_published), _of_images(gram_smart), _of_images(losses.gram_anchoring_loss)),
    "detcon": (2, detcon_published, detcon_smart, _detcon),
}
PAIR_LOSSES = tuple((what, shape) for what in CASES for shape in SHAPES)


def pair_loss_case(what: str, shape: tuple[int, int], device: str) -> Case:
    """A loss of (rows, columns) of each view; of a student and a teacher, the rows are tokens of one image."""
    n, d = shape
    count, published, smart, ours = CASES[what]
    generator = torch.Generator().manual_seed(n + d)
    shared = torch.randn(n, d, generator=generator)
    views = [(shared + torch.randn(n, d, generator=generator)).to(device).requires_grad_() for _ in range(count)]
    implementations = {
        "published": published,
        "published, compiled": compiled(published),
        "three-line": smart,
        "sslkern": ours,
    }
    return Case("pair_losses", shape, lambda: views, implementations, by_reference(ours), note=what, huge=())
