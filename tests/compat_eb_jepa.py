"""The losses of EB-JEPA in plain torch, by their published formulas, and the calls that tests compare."""

import torch
import torch.nn.functional as F
from compat_checks import Case, rows_of_all
from ranks import normal

from bench.baselines import offdiag_sum


def HingeStdLoss(std_margin=1.0):
    return lambda x: F.relu(std_margin - (x.var(0) + 1e-4).sqrt()).mean()


def CovarianceLoss():
    def loss(x):
        z, d = x - x.mean(0), x.shape[1]
        return offdiag_sum(z.T @ z / (len(z) - 1)) / (d * (d - 1))

    return loss


def _rows(x):
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def VCLoss(std_coeff, cov_coeff, proj=None):
    def loss(x, actions=None):
        z = (proj or torch.nn.Identity())(_rows(x))
        std, cov = HingeStdLoss()(z), CovarianceLoss()(z)
        return std_coeff * std + cov_coeff * cov, std + cov, {"std_loss": std.item(), "cov_loss": cov.item()}

    return loss


def VICRegLoss(std_coeff=1.0, cov_coeff=1.0):
    def loss(z1, z2):
        std, cov = (sum(map(of, (z1, z2))) for of in (HingeStdLoss(), CovarianceLoss()))
        sim = F.mse_loss(z1, z2)
        total = sim + std_coeff * std + cov_coeff * cov
        return {"loss": total, "invariance_loss": sim, "var_loss": std, "cov_loss": cov}

    return loss


def sq_loss():
    return F.mse_loss


def square_cost_seq():
    return F.mse_loss


def SquareLossSeq(proj=None):
    return lambda state, predi: F.mse_loss(*((proj or torch.nn.Identity())(_rows(x)) for x in (state, predi)))


def TemporalSimilarityLoss():
    return lambda x: x.diff(dim=0).square().mean() if len(x) > 1 else 0 * x.sum()


def InverseDynamicsLoss(idm):
    def loss(x, actions):
        if len(x) <= 1 or actions is None:
            return torch.tensor(0.0)
        pairs = [(idm(x[t, b], x[t + 1, b]), actions[b, :, t]) for b in range(x.shape[1]) for t in range(len(x) - 1)]
        return F.mse_loss(*(torch.stack(side) for side in zip(*pairs, strict=True)))

    return loss


def VC_IDM_Sim_Regularizer(
    cov_coeff,
    std_coeff,
    sim_coeff_t,
    idm_coeff=0.0,
    idm=None,
    std_margin=1,
    first_t_only=True,
    projector=None,
    spatial_as_samples=False,
    sim_t_after_proj=False,
    idm_after_proj=False,
):
    def loss(x, actions=None):
        b, _, t, h, _ = x.shape
        plain = torch.stack([x[:, :, k].reshape(b, -1) for k in range(t)])
        z = (projector or torch.nn.Identity())(x.permute(0, 2, 3, 4, 1))
        mixed = torch.stack([z[:, :, k] for k in range(h)]).reshape(t, b, -1)
        sim = TemporalSimilarityLoss()(mixed if sim_t_after_proj else plain)
        moved = InverseDynamicsLoss(idm)(mixed if idm_after_proj else plain, actions if idm_coeff > 0 else None)
        z = z[:, :1] if first_t_only else z
        z = z.reshape(-1, z.shape[-1]) if spatial_as_samples else z.movedim(-1, 2).reshape(b * z.shape[1], -1)
        std, cov = HingeStdLoss(std_margin)(z), CovarianceLoss()(z)
        weighted = cov_coeff * cov + std_coeff * std + sim_coeff_t * sim + idm_coeff * moved
        terms = {"cov_loss": cov, "std_loss": std, "sim_loss_t": sim, "idm_loss": moved}
        return weighted, sum(terms.values()), {name: term.item() for name, term in terms.items()}

    return loss


def epps_pulley():
    def statistic(x, t_min=-3, t_max=3, n_points=10):
        t = torch.linspace(t_min, t_max, n_points, dtype=x.dtype)
        phi, angles = (-t.square() / 2).exp(), rows_of_all(x)[..., None] * t
        errors = (angles.cos().mean(0) - phi).square() + angles.sin().mean(0).square()
        return torch.trapezoid(errors * phi, t)

    return statistic


def BCS(num_slices=256, lmbd=10.0):
    """The first call, with directions in torch's default dtype."""

    def loss(z1, z2):
        a = torch.randn(z1.shape[1], num_slices, generator=torch.Generator().manual_seed(0))
        a = (a / a.norm(dim=0)).to(z1.dtype)
        bcs, invariance = sum(epps_pulley()(z @ a).mean() / 2 for z in (z1, z2)), F.mse_loss(z1, z2)
        return {"loss": invariance + lmbd * bcs, "bcs_loss": bcs, "invariance_loss": invariance}

    return loss


class Linear(torch.nn.Module):
    """A projector with fixed weights, in the dtype of its input."""

    def __init__(self, before, after):
        super().__init__()
        self.weight = normal(before, after, seed=5)

    def forward(self, x):
        return x @ self.weight.to(x.dtype)


class Moves(Linear):
    """A model of inverse dynamics."""

    def forward(self, now, then):
        return super().forward(now) - torch.tanh(super().forward(then))


FORMULAS = (HingeStdLoss, CovarianceLoss, VCLoss, VICRegLoss, SquareLossSeq, TemporalSimilarityLoss)
FORMULAS = {
    f.__name__: f
    for f in (*FORMULAS, sq_loss, square_cost_seq, InverseDynamicsLoss, VC_IDM_Sim_Regularizer, epps_pulley, BCS)
}


def of(module, case):
    """The loss of a case in a module."""
    loss = getattr(module, case.name)
    return loss if case.name in ("sq_loss", "square_cost_seq", "epps_pulley") else loss(*case.init)


def formula(case):
    return FORMULAS[case.name](*case.init)


VIDEO, ACTIONS = (4, 3, 2, 2, 3), (4, 5, 2)  # (B, C, T, H, W), (B, A, T)
SQUARE, LONG = (4, 3, 3, 2, 3), (4, 5, 3)
SWITCHES = [
    (first, proj, samples) for first in (True, False) for proj in (None, Linear(3, 5)) for samples in (True, False)
]
CASES = [
    Case("HingeStdLoss", (9, 4)),
    Case("HingeStdLoss", (5, 3, 2), init=(0.6,)),
    *(Case("CovarianceLoss", shape) for shape in ((9, 4), (5, 23), (2, 2))),
    Case("VCLoss", (3, 4, 2, 2, 3), init=(10, 5)),
    Case("VCLoss", (4, 9), init=(1.5, 0.5, Linear(9, 3))),
    Case("VCLoss", (3, 4, 1), init=(1.5, 0.5, Linear(4, 11))),
    *(Case("VICRegLoss", shape, shape, init=init) for shape, init in (((9, 4), ()), ((5, 23), (25.0, 2)))),
    Case("sq_loss", (3, 4), (3, 4), reduction="sum"),
    Case("square_cost_seq", (3, 4, 2), (3, 4, 2)),
    Case("SquareLossSeq", (3, 4, 2, 2), (3, 4, 2, 2), init=(Linear(4, 2),)),
    Case("TemporalSimilarityLoss", (4, 3, 5)),
    Case("InverseDynamicsLoss", (3, 4, 6), (4, 5, 3), init=(Moves(6, 5),)),
    *(
        Case("VC_IDM_Sim_Regularizer", VIDEO, ACTIONS, init=(3, 2, 0.7, 0.0, None, 1.5, first, proj, samples))
        for first, proj, samples in SWITCHES
    ),
    *(
        Case("VC_IDM_Sim_Regularizer", VIDEO, ACTIONS, init=(3, 2, 0.7, 0.4, Moves(size, 5), 1, *rest))
        for size, *rest in ((18, True, None, False, False, False), (18, False, None, True, True, True))
    ),
    *(
        Case("VC_IDM_Sim_Regularizer", VIDEO, ACTIONS, init=(3, 2, 0.7, 0.4, Moves(size, 5), 1, True, *rest))
        for size, *rest in ((30, Linear(3, 5), False, True, True), (18, Linear(3, 5), False, True, False))
    ),
    Case("VC_IDM_Sim_Regularizer", SQUARE, LONG, init=(1, 1, 2.0, 3.0, Moves(30, 5), 1, True, Linear(3, 5), 1, 1, 1)),
    Case("VC_IDM_Sim_Regularizer", (4, 3, 1, 2, 3), init=(3, 2, 0.7)),
]
SIGREG = [  # on several ranks too
    *(Case("epps_pulley", shape) for shape in ((9, 4), (5, 70), (1, 1))),
    Case("epps_pulley", (6, 3), t_min=-1.5, t_max=2.5, n_points=7),
    Case("epps_pulley", (6, 3), t_min=-2, t_max=2, n_points=5),
    *(Case("BCS", shape, shape, init=(20,)) for shape in ((9, 4), (5, 70), (1, 1))),
    Case("BCS", (6, 3), (6, 3), init=(5, 0.5)),
]
