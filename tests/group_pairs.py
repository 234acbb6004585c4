"""Losses of all pairs, and HSIC, in the settings of a `group`, with their rows."""

from functools import partial

import torch
import torch.distributed as dist
from ranks import normal

from sslkern import metrics
from sslkern.core.ranks import peers_of
from sslkern.losses import (
    alignment_uniformity_loss,
    byol_loss,
    coding_rate_loss,
    detcon_loss,
    dino_loss,
    frossl_loss,
    gram_anchoring_loss,
    ibot_patch_loss,
    info_nce_loss,
    kernel_alignment_loss,
    koleo_loss,
    lejepa_loss,
    macl_loss,
    mmcr_loss,
    msn_loss,
    negative_cosine_loss,
    nt_xent_loss,
    sigmoid_loss,
    sigreg_loss,
    simple_contrastive_loss,
    spectral_contrastive_loss,
    swav_loss,
    tico_loss,
    vibcreg_loss,
    whitening_mse_loss,
)
from sslkern.losses import supervised_contrastive_loss as supervised

ROWS, COLUMNS = 13, 5


def rows(number, n=ROWS, d=COLUMNS):
    """Views that resemble each other."""
    return [normal(n, d) + 0.3 * normal(n, d, seed=1 + k) for k in range(number)]


def three(a, b, c, group, **settings):
    return nt_xent_loss(a, b, 0.3, others=[c], group=group, **settings)


def to_bank(a, b, group, **settings):
    return nt_xent_loss(a, b, 0.3, negatives=normal(7, a.shape[1], dtype=a.dtype), group=group, **settings)


def labelled(z, labels, group, **settings):
    return supervised(z, labels, temperature=0.3, group=group, **settings)


def targeted(p, z, group):
    """BYOL, whose targets have no gradient, with a gradient of zeros."""
    return byol_loss(p, z, group=group) + 0 * z.sum()


def stateful(a, b, group):
    """TiCo with a covariance so far."""
    state = normal(7, a.shape[1], dtype=a.dtype)
    return tico_loss(a, b, state.T @ state / 7, group=group)


SPECTRA = {
    "whitening": (partial(whitening_mse_loss, eps=0.1), rows(2)),
    "whitening, groups together": (partial(whitening_mse_loss, eps=0.1, groups=5, together=True), rows(2)),
    "whitening, zca": (partial(whitening_mse_loss, method="zca", eps=0.3), rows(2)),
    "whitening, zca by rows": (partial(whitening_mse_loss, method="zca", eps=0.3), rows(2, d=20)),
    "whitening, iterative by rows": (partial(whitening_mse_loss, method="iterative", together=True), rows(2, d=30)),
    "vibcreg by rows": (vibcreg_loss, rows(2, d=20)),
    "vibcreg by columns": (vibcreg_loss, rows(2)),
    "tico": (stateful, rows(2)),
    "tico by rows": (tico_loss, rows(2, d=20)),
    "frossl by rows": (frossl_loss, rows(2, d=20)),
    "frossl by columns": (frossl_loss, rows(2)),
    "coding rate by rows": (coding_rate_loss, rows(2, d=20)),
    "coding rate by columns": (coding_rate_loss, rows(2)),
    "mmcr by rows": (mmcr_loss, rows(2, d=20)),
    "mmcr by columns": (mmcr_loss, rows(2)),
}


def regions(a, b, *rest, group, **settings):
    """DetCon: two ids of masks, of which the first view of some images lacks one."""
    *targets, first, second = rest
    return detcon_loss(a, b, first, second, 0.3, targets=targets or None, group=group, **settings)


def fixed(loss, s, t, group, **settings):
    """A loss whose teacher has no gradient, with a gradient of zeros."""
    return loss(s, t, group=group, **settings) + 0 * t.sum()


def slices(z):
    return normal(z.shape[-1], 7)


def sliced(z, group):
    return sigreg_loss(z, directions=slices(z), group=group)


def over_all_directions(z, group):
    """For enough columns."""
    return sigreg_loss(torch.cat((z, 2 - z, z / 2, z.sin()), -1), num_slices=None, group=group)


def sliced_views(a, b, c, group):
    """Two global views and a local one."""
    return lejepa_loss(torch.stack((a, b)), c[None], 0.3, directions=slices(a), group=group)


def drawn(z, group):
    """The directions of the first rank, whatever the others draw."""
    torch.manual_seed(5 if peers_of(group) is None else 5 + dist.get_rank())
    return sigreg_loss(z.double(), num_slices=4, group=group)


def head(x, seed=0):
    """Prototypes that all ranks have, the same in every dtype."""
    return normal(7, x.shape[1], seed=seed, dtype=torch.bfloat16).to(x.dtype)


def to_codes(a, b, c, group, w=None):
    return swav_loss([a, b, c], head(a) if w is None else w, 0.8, epsilon=0.5, group=group)


def taught(a, b, c, group, w=None):
    """DINO, whose teacher has no gradient, with a gradient of zeros."""
    heads = head(a) if w is None else w, head(c, 1)
    return dino_loss([a, b], [c], *heads, temperature=0.8, teacher_temperature=0.4, group=group) + 0 * c.sum()


def of_patches(a, b, group, w=None):
    heads, mask = (head(a) if w is None else w, head(b, 1)), torch.ones(len(a), 1, dtype=torch.bool)
    return ibot_patch_loss(a, b, *heads, mask, temperature=0.8, group=group) + 0 * b.sum()


def masked(a, b, c, group, w=None, **settings):
    return msn_loss([a, b], c, head(a) if w is None else w, 0.3, group=group, **settings) + 0 * c.sum()


LABELS = torch.tensor([7, -3, 7, 10**15, -3, 5, 7, -3, -3, 7, 7, -3, 1])
IMAGES = [normal(ROWS, 3, 4, seed=k) for k in range(4)]
MASKS = [(torch.arange(3 * ROWS) ** 2 // 3 % (2 + k)).view(ROWS, 3) * 10**12 for k in (0, 1)]
LOSSES = {
    "nt_xent": (partial(nt_xent_loss, temperature=0.3), rows(2)),
    "nt_xent, 3 views": (three, rows(3)),
    "nt_xent, 3 views inside": (partial(three, inside=True), rows(3)),
    "nt_xent, decoupled": (partial(nt_xent_loss, temperature=0.3, decoupled=True), rows(2)),
    "nt_xent, 3 views decoupled inside": (partial(three, decoupled=True, inside=True), rows(3)),
    "nt_xent, bank": (to_bank, rows(2)),
    "nt_xent, decoupled bank": (partial(to_bank, decoupled=True), rows(2)),
    "info_nce": (partial(info_nce_loss, temperature=0.3), rows(2)),
    "info_nce, symmetric": (partial(info_nce_loss, temperature=0.3, symmetric=True), rows(2)),
    "info_nce, symmetric, as they are": (
        partial(info_nce_loss, scale=0.4, symmetric=True, normalize=False),
        rows(2),
    ),
    "supervised": (labelled, [*rows(1), LABELS]),
    "supervised, inside": (partial(labelled, inside=True), [*rows(1), LABELS]),
    "supervised, no positives": (labelled, [*rows(1), torch.arange(ROWS)]),
    "supervised, inside, no positives": (partial(labelled, inside=True), [*rows(1), torch.arange(ROWS)]),
    "sigmoid": (sigmoid_loss, rows(2)),
    "sigmoid, warm": (partial(sigmoid_loss, scale=-3.0, bias=2.0), rows(2)),
    "spectral by rows": (partial(spectral_contrastive_loss, mu=2.0), rows(2, d=8)),
    "spectral by columns": (partial(spectral_contrastive_loss, mu=2.0), rows(2)),
    "simple": (simple_contrastive_loss, rows(2)),
    "simple, beta": (partial(simple_contrastive_loss, beta=0.7), rows(2)),
    "byol": (targeted, rows(2)),
    "negative cosine": (partial(negative_cosine_loss, detach=False), rows(2)),
    "alignment and uniformity": (partial(alignment_uniformity_loss, t=3.0, lam=0.7), rows(2)),
    "alignment and uniformity, powers": (partial(alignment_uniformity_loss, alpha=1.5), rows(2)),
    "macl": (partial(macl_loss, temperature=0.3), rows(2)),
    "detcon": (regions, [*IMAGES[:2], *MASKS]),
    "detcon, targets": (regions, [*IMAGES, *MASKS]),
    "kernel alignment": (partial(fixed, kernel_alignment_loss), [normal(ROWS, 4, 3), normal(ROWS, 4, 3, seed=1)]),
    "gram anchoring": (partial(fixed, gram_anchoring_loss), [normal(ROWS, 4, 3), normal(ROWS, 4, 3, seed=1)]),
    "koleo": (koleo_loss, rows(1)),
    "sigreg": (sliced, rows(1)),
    "sigreg, drawn": (drawn, rows(1)),
    "sigreg, all directions": (over_all_directions, rows(1)),
    "lejepa": (sliced_views, rows(3)),
    "swav": (to_codes, rows(3)),
    "dino": (taught, rows(3)),
    "ibot": (of_patches, rows(2)),
    "msn": (masked, rows(3)),
    "msn, equal": (partial(masked, iterations=2, entropy=0.0), rows(3)),
    "hsic": (metrics.hsic, [normal(ROWS, 3), normal(ROWS, 4)]),
    "hsic, unbiased": (partial(metrics.hsic, estimator="unbiased"), [normal(ROWS, 3), normal(ROWS, 4)]),
    "hsic, bandwidths": (partial(metrics.hsic, bandwidth=(0.7, None)), [normal(ROWS, 3), normal(ROWS, 4)]),
    "hsic, linear": (partial(metrics.hsic, kernel="linear"), [normal(ROWS, 3), normal(ROWS, 4)]),
    "hsic, linear by rows": (partial(metrics.hsic, kernel="linear"), [normal(ROWS, 30), normal(ROWS, 40)]),
    "hsic, linear unbiased": (
        partial(metrics.hsic, kernel="linear", estimator="unbiased"),
        [normal(ROWS, 3), normal(ROWS, 4)],
    ),
    "hsic, linear unbiased by rows": (
        partial(metrics.hsic, kernel="linear", estimator="unbiased"),
        [normal(ROWS, 30), normal(ROWS, 40)],
    ),
    "cka": (metrics.cka, [normal(ROWS, 3), normal(ROWS, 4)]),
    "cka, unbiased": (partial(metrics.cka, estimator="unbiased"), [normal(ROWS, 3), normal(ROWS, 4)]),
    "cka by rows": (metrics.cka, [normal(ROWS, 30), normal(ROWS, 40)]),
    "dhsic": (metrics.dhsic, [normal(ROWS, 3), normal(ROWS, 4), normal(ROWS, 1)]),
    "dhsic, bandwidths": (partial(metrics.dhsic, bandwidth=(0.7, 1.3)), [normal(ROWS, 3), normal(ROWS, 4)]),
}


def no_rows(rows):
    """Divisions with ranks that have none."""
    none = [0] * (dist.get_world_size() - 1)
    return ([*none, rows], [rows, *none])


def value_and_grad(loss, inputs, group):
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    value = loss(*leaves, group=group)
    return [value.detach(), *torch.autograd.grad(value, [x for x in leaves if x.is_floating_point()])]
