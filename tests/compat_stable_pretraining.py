"""The losses of stable-pretraining in plain torch, by their published formulas, and the calls that tests compare."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from compat_checks import Case, rank, rows_of_all, size

from bench.baselines import offdiag_sum
from bench.gathered import reduced_sum


def VCRegLoss(std_coeff=25, cov_coeff=1, epsilon=1e-4):
    def loss(z_i):
        z = rows_of_all(z_i)
        hinge = F.relu(1 - (z.var(0) + epsilon).sqrt()).mean() / 2
        z = z - z.mean(0)
        return std_coeff * hinge + cov_coeff * offdiag_sum(z.T @ z / (len(z) - 1)) / z.shape[1]

    return loss


def VICRegLoss(sim_coeff=25, std_coeff=25, cov_coeff=1, epsilon=1e-4):
    each = VCRegLoss(std_coeff, cov_coeff, epsilon)
    return lambda z_i, z_j: sim_coeff * F.mse_loss(z_i, z_j) + each(z_i) + each(z_j)


def BarlowTwinsLoss(lambd=5e-3):
    def loss(z_i, z_j):
        x, y = ((z - z.mean(0)) / (z.std(0) + 1e-5) for z in (z_i, z_j))
        c = x.T @ y / (len(x) * size())
        c = reduced_sum(c) if dist.is_initialized() else c
        return (c.diagonal() - 1).square().sum() + lambd * offdiag_sum(c)

    return loss


def InfoNCELoss(temperature=0.07):
    def loss(anchors, candidates, targets, mask=None, logit_scale=None):
        logits = F.normalize(anchors, dim=-1) @ F.normalize(candidates, dim=-1).T
        logits = logits / (temperature if logit_scale is None else logit_scale)
        return F.cross_entropy(logits if mask is None else logits.masked_fill(mask, -torch.inf), targets)

    return loss


def NTXEntLoss(temperature=0.5):
    def loss(z_i, z_j):
        rows = torch.cat([z_i, z_j])
        n, every = len(rows), rows_of_all(rows)
        own = rank() * n + torch.arange(n)
        mask = F.one_hot(own, len(every)).bool()
        return InfoNCELoss(temperature)(rows, every, rank() * n + torch.arange(n).roll(n // 2), mask)

    return loss


def CLIPLoss(temperature=0.07):
    def loss(feats_i, feats_j, logit_scale=None):
        own = rank() * len(feats_i) + torch.arange(len(feats_i))
        ways = ((feats_i, rows_of_all(feats_j)), (feats_j, rows_of_all(feats_i)))
        return sum(InfoNCELoss(temperature)(q, k, own, logit_scale=logit_scale) for q, k in ways) / 2

    return loss


def BYOLLoss():
    return lambda p, z: 2 - 2 * (F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(-1).mean()


def NegativeCosineSimilarity():
    return lambda z_i, z_j: -F.cosine_similarity(z_i, z_j, dim=1).mean()


def EppsPulley(t_max=3.0, n_points=17):
    def loss(x):
        """The rows of all ranks in the empirical characteristic function."""
        t = torch.linspace(0, t_max, n_points, dtype=x.dtype)
        phi, rows = (-t.square() / 2).exp(), rows_of_all(x)
        angles = rows[..., None] * t
        errors = (angles.cos().mean(0) - phi).square() + angles.sin().mean(0).square()
        return 2 * len(rows) * torch.trapezoid(errors * phi, t)

    return loss


def SlicedEppsPulley(num_slices=1024, t_max=3.0, n_points=17):
    """The first call, with directions in torch's default dtype."""

    def loss(x):
        a = torch.randn(x.shape[-1], num_slices, generator=torch.Generator().manual_seed(0))
        return EppsPulley(t_max, n_points)(x @ (a / a.norm(dim=0)).to(x.dtype)).mean()

    return loss


def of(module, case):
    """The loss of a case in a module, or in the formulas above."""
    return getattr(module, case.name)(*case.init)


def _to(*targets, masked=None):
    """Anchors and candidates, and perhaps a logit scale, with targets and a mask."""

    def make(anchors, candidates, scale=None):
        mask = None
        if masked is not None:
            mask = torch.zeros(len(anchors), len(candidates), dtype=torch.bool)
            mask[masked] = True
        return anchors, candidates, torch.tensor(targets), mask, scale

    return make


ROWS = ((0, 1, 1), (0, 3, 4))  # the pairs that a mask leaves out
CASES = [
    *(Case("VCRegLoss", shape) for shape in ((9, 4), (5, 23), (2, 1))),
    Case("VCRegLoss", (8, 6), init=(3, 0.5, 0.1)),
    *(Case("VICRegLoss", shape, shape) for shape in ((9, 4), (5, 23), (2, 1))),
    Case("VICRegLoss", (8, 6), (8, 6), init=(3, 1.5, 0.5, 0.1)),
    *(Case("BarlowTwinsLoss", shape, shape) for shape in ((9, 4), (5, 23), (31, 4), (2, 1))),
    Case("BarlowTwinsLoss", (8, 6), (8, 6), init=(0.3,)),
    *(Case("NTXEntLoss", shape, shape) for shape in ((9, 4), (2, 1), (4, 9))),
    Case("NTXEntLoss", (6, 4), (6, 4), init=(0.07,)),
    *(Case("CLIPLoss", shape, shape) for shape in ((9, 4), (2, 1), (4, 9))),
    Case("CLIPLoss", (6, 4), (6, 4), init=(0.9,)),
    Case("CLIPLoss", (6, 4), (6, 4), logit_scale=2),
    Case("CLIPLoss", (6, 4), (6, 4), (), alone=(2,), make=lambda x, y, s: (x, y, s.abs() + 0.2)),
    Case("InfoNCELoss", (3, 4), (7, 4), make=_to(6, 0, 6)),
    Case("InfoNCELoss", (3, 4), (7, 4), make=_to(6, 0, 2, masked=ROWS), init=(0.3,)),
    Case("InfoNCELoss", (3, 4), (7, 4), (), make=_to(6, 0, 2), alone=(2,)),
    Case("InfoNCELoss", (3, 4), (7, 4), (), make=_to(6, 0, 2, masked=ROWS), alone=(2,)),
    *(Case("BYOLLoss", shape, shape) for shape in ((9, 4), (1, 1), (3, 4, 5))),
    *(Case("NegativeCosineSimilarity", shape, shape) for shape in ((9, 4), (1, 1), (3, 4, 5), (2, 3, 2, 2))),
    *(Case("EppsPulley", shape) for shape in ((9, 4), (5, 70), (7,), (3, 4, 5), (1, 1))),
    Case("EppsPulley", (6, 3), init=(2.5, 5)),
]
SLICED = [
    *(Case("SlicedEppsPulley", shape, init=(20,)) for shape in ((9, 4), (5, 70), (3, 4, 5), (1, 1))),
    Case("SlicedEppsPulley", (6, 3), init=(5, 2.5, 5)),
]
