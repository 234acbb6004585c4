"""The losses of solo-learn in plain torch, by their published formulas, and the calls that tests compare."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from compat_checks import Case, rank, rows_of_all, size

from bench.baselines import offdiag_sum
from bench.gathered import raw_sum_


def _hinge(z):
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def _covariance(z):
    z = z - z.mean(0)
    return offdiag_sum(z.T @ z / (len(z) - 1)) / z.shape[1]


def vicreg_loss_func(z1, z2, sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=1.0):
    invariance, views = F.mse_loss(z1, z2), [rows_of_all(z) for z in (z1, z2)]
    loss = sim_loss_weight * invariance + var_loss_weight * sum(map(_hinge, views))
    return loss + cov_loss_weight * sum(map(_covariance, views))


def vibcreg_loss_func(z1, z2, sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=200.0):
    invariance, views = F.mse_loss(z1, z2), [rows_of_all(z) for z in (z1, z2)]
    loss = sim_loss_weight * invariance + var_loss_weight * sum(map(_hinge, views))
    unit = [F.normalize(z - z.mean(0), dim=0) for z in views]
    return loss + cov_loss_weight * sum(offdiag_sum(z.T @ z) / z.shape[1] ** 2 for z in unit)


def barlow_loss_func(z1, z2, lamb=5e-3, scale_loss=0.025):
    x, y = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    c = x.T @ y / len(z1)
    if dist.is_initialized():
        c = raw_sum_(c) / size()
    return scale_loss * ((c.diagonal() - 1).square().sum() + lamb * offdiag_sum(c))


def simclr_loss_func(z, indexes, temperature=0.1):
    z = F.normalize(z, dim=-1)
    logits = z @ rows_of_all(z).T / temperature
    every = rows_of_all(indexes.double())
    same, n = indexes[:, None].double() == every, len(z)
    own = torch.zeros_like(same)
    own[torch.arange(n), rank() * n + torch.arange(n)] = True
    positives = logits.masked_fill(~same | own, -torch.inf).logsumexp(1)
    return (logits.masked_fill(own, -torch.inf).logsumexp(1) - positives).mean()


def nnclr_loss_func(nn, p, temperature=0.1):
    logits = F.normalize(nn, dim=-1) @ rows_of_all(F.normalize(p, dim=-1)).T / temperature
    return F.cross_entropy(logits, rank() * len(nn) + torch.arange(len(nn)))


def mocov2plus_loss_func(query, key, queue, temperature=0.1):
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1) / temperature
    return (logits.logsumexp(1) - logits[:, 0]).mean()


def mocov3_loss_func(query, key, temperature=0.2):
    key = F.normalize(key, dim=1)
    keys = rows_of_all(key.detach()) if dist.is_initialized() else key
    logits = F.normalize(query, dim=1) @ keys.T / temperature
    return 2 * temperature * F.cross_entropy(logits, rank() * len(query) + torch.arange(len(query)))


def byol_loss_func(p, z, simplified=True):
    if simplified:
        return 2 - 2 * F.cosine_similarity(p, z.detach(), dim=-1).mean()
    return 2 - 2 * (F.normalize(p, dim=-1) * F.normalize(z.detach(), dim=-1)).sum(1).mean()


def simsiam_loss_func(p, z, simplified=True):
    return byol_loss_func(p, z, simplified) / 2 - 1


def wmse_loss_func(z1, z2, simplified=True):
    if simplified:
        return byol_loss_func(z1, z2)
    return 2 - 2 * (F.normalize(z1, dim=-1) * F.normalize(z2, dim=-1)).sum(-1).mean()


def ressl_loss_func(q, k, queue, temperature_q=0.1, temperature_k=0.04):
    target = (k.detach() @ queue.detach().T / temperature_k).softmax(1)
    return F.cross_entropy(q @ queue.T / temperature_q, target)


def swav_loss_func(preds, assignments, temperature=0.1):
    pairs = [(a, p) for v, a in enumerate(assignments) for w, p in enumerate(preds) if v != w]
    return sum(F.cross_entropy(p / temperature, a) for a, p in pairs) / len(pairs)


FORMULAS = {name: f for name, f in globals().items() if name.endswith("_loss_func")}
HOME = {name: f"solo.losses.{name.removesuffix('_loss_func')}" for name in FORMULAS}


def _labelled(labels):
    """Rows with labels that are shifted on other ranks, so that some are shared by ranks and some are not."""
    return lambda z: (z, torch.tensor(labels, dtype=torch.int64) + rank())


def _crops(number):
    return lambda *x: (list(x[:number]), [a.softmax(1) for a in x[number:]])


def _of_label_dtype(dtype):
    return lambda z: (z, torch.tensor([3, 7, 3, 7, 0, 0]).to(dtype))


def _unit(q, k, queue):
    return F.normalize(q, dim=1), F.normalize(k, dim=1), F.normalize(queue, dim=int(queue.shape[1] == q.shape[1]))


BANKS = ((9, 4, 31), (1, 3, 2), (4, 9, 6))  # rows, columns, and rows of the queue
VIEWS = ("vicreg_loss_func", "vibcreg_loss_func", "barlow_loss_func")
CASES = [
    *(Case(name, shape, shape) for name in VIEWS for shape in ((9, 4), (5, 23), (2, 1))),
    Case("vicreg_loss_func", (8, 6), (8, 6), sim_loss_weight=3, var_loss_weight=1.5, cov_loss_weight=0.5),
    Case("vibcreg_loss_func", (8, 6), (8, 6), sim_loss_weight=3, var_loss_weight=1.5, cov_loss_weight=7.0),
    Case("barlow_loss_func", (8, 6), (8, 6), lamb=0.3, scale_loss=2.0),
    Case("simclr_loss_func", (8, 5), make=_labelled([0, 1, 2, 3, 0, 1, 2, 3])),
    Case("simclr_loss_func", (9, 5), make=_labelled([-5, 10**15, 3, -5, 10**15, 3, 3, -5, 3]), temperature=0.5),
    Case("simclr_loss_func", (2, 1), make=_labelled([4, 4]), temperature=-0.7),
    *(Case("simclr_loss_func", (6, 3), make=_of_label_dtype(d)) for d in (torch.int32, torch.uint8, torch.float32)),
    *(Case("nnclr_loss_func", shape, shape) for shape in ((9, 4), (1, 3), (4, 9))),
    Case("nnclr_loss_func", (6, 4), (6, 4), temperature=0.7),
    *(Case("mocov2plus_loss_func", (n, d), (n, d), (d, k), make=_unit) for n, d, k in BANKS),
    Case("mocov2plus_loss_func", (6, 4), (6, 4), (4, 20), fixed=(1, 2), temperature=1.7),
    *(Case("mocov3_loss_func", shape, shape) for shape in ((9, 4), (1, 3), (4, 9))),
    Case("mocov3_loss_func", (6, 4), (6, 4), fixed=(1,), temperature=0.7),
    *(
        Case(name, shape, shape, simplified=simplified)
        for name in ("byol_loss_func", "simsiam_loss_func", "wmse_loss_func")
        for shape in ((9, 4), (1, 1), (3, 4, 5))
        for simplified in (True, False)
    ),
    Case("byol_loss_func", (3, 1, 5), (4, 5)),
    *(Case("ressl_loss_func", (n, d), (n, d), (k, d), make=_unit, fixed=(1, 2)) for n, d, k in BANKS),
    Case("ressl_loss_func", (6, 4), (6, 4), (20, 4), fixed=(1,), temperature_q=0.9, temperature_k=0.5),
    Case("swav_loss_func", (3, 5, 7), (2, 5, 7), fixed=(1,)),
    Case("swav_loss_func", *[(5, 7)] * 4, make=_crops(2), fixed=(2, 3)),
    Case("swav_loss_func", *[(5, 7)] * 7, make=_crops(5), fixed=(5, 6), temperature=0.6),
]
