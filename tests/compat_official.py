"""The losses of the official scripts of VICReg and Barlow Twins in plain torch, and the calls that tests compare."""

import torch.distributed as dist
import torch.nn.functional as F
from compat_checks import Case, rows_of_all, size

from bench.baselines import offdiag_sum
from bench.gathered import raw_sum_, synced_standardised


def vicreg_loss(x, y, batch_size=None, num_features=None, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0):
    loss = sim_coeff * F.mse_loss(x, y)
    for z in (x, y):
        z = rows_of_all(z)
        z = z - z.mean(0)
        loss = loss + std_coeff * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        off = offdiag_sum(z.T @ z / ((batch_size or len(z)) - 1))
        loss = loss + cov_coeff * off / (num_features or z.shape[1])
    return loss


def barlow_twins_loss(z1, z2, batch_size=None, lambd=0.0051, sync=True):
    if dist.is_initialized() and sync:
        x, y = synced_standardised(z1), synced_standardised(z2)
    else:
        x, y = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    c = x.T @ y / (batch_size or len(x) * size())
    c = raw_sum_(c) if dist.is_initialized() else c
    return (c.diagonal() - 1).square().sum() + lambd * offdiag_sum(c)


FORMULAS = {"vicreg": vicreg_loss, "barlowtwins": barlow_twins_loss}
CASES = [
    *(Case(name, shape, shape) for name in FORMULAS for shape in ((9, 4), (5, 23), (3, 1))),
    Case("vicreg", (8, 6), (8, 6), batch_size=64, num_features=12, sim_coeff=3, std_coeff=1.5, cov_coeff=0.5),
    Case("vicreg", (5, 23), (5, 23), batch_size=7),
    Case("barlowtwins", (8, 6), (8, 6), batch_size=64, lambd=0.3),
    Case("barlowtwins", (5, 23), (5, 23), batch_size=7, sync=False),
]
