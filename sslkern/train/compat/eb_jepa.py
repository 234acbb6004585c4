"""The losses of EB-JEPA (`eb_jepa.losses`), with its names, arguments, values and gradients.

    from sslkern.train.compat.eb_jepa import VCLoss  # before: from eb_jepa.losses import VCLoss

As there, only `epps_pulley` and `BCS` communicate: they average over all processes whenever torch.distributed is
initialised. What differs is this:

- Losses are computed and returned in float32, or in float64 for float64 tensors, also under autocast and in half
  precision, where those of EB-JEPA may overflow.
- A loss with a standard deviation and a covariance term computes both at once, without a D x D matrix if N is
  sufficiently smaller than D.
- `epps_pulley` and `BCS` do not form the angles, 10 for each projection.
- The covariance term of one column, D = 1, is 0. EB-JEPA gives NaN.
- Invalid input raises TypeError or ValueError with one sentence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core import checks
from ...core.dtypes import FLOATS, accumulation_dtype, short
from ...core.ranks import ALONE
from ...ops.covariance import covariance_of
from ._bcs import BCS, epps_pulley
from ._peers import promoted
from ._views import check_views

__all__ = [
    "BCS",
    "CovarianceLoss",
    "HingeStdLoss",
    "InverseDynamicsLoss",
    "SquareLossSeq",
    "TemporalSimilarityLoss",
    "VCLoss",
    "VC_IDM_Sim_Regularizer",
    "VICRegLoss",
    "epps_pulley",
    "sq_loss",
    "square_cost_seq",
]

EPS = 1e-4  # is added to the variance
Terms = tuple[Tensor, Tensor, dict[str, float]]


def sq_loss(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """The mean squared difference of two tensors, or with the `reduction` "sum" or "none" of torch's `mse_loss`."""
    x, y = _floating("x", x), _floating("y", y)
    x, y = promoted(x, y)
    return F.mse_loss(x, y, reduction=reduction)


def _floating(name: str, x: Tensor) -> Tensor:
    """`x` in float32 or float64, in which squares of half precision do not overflow."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        kind = short(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a float32, float64, bfloat16 or float16 torch.Tensor, got {kind}.")
    return x.to(accumulation_dtype(x))


def square_cost_seq(state: Tensor, predi: Tensor) -> Tensor:
    """The mean squared difference of a state and its prediction."""
    return sq_loss(state, predi)


def _samples(x: Tensor) -> Tensor:
    """(B, D, ...) as rows (B * ..., D)."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ValueError(f"x must be a torch.Tensor of shape (B, D, ...), got {checks.got(x)}.")
    return x.transpose(0, 1).flatten(1).transpose(0, 1)


class SquareLossSeq(nn.Module):
    """The mean squared difference of projected states and predictions, (B, D, ...), projected as rows (B * ..., D)."""

    def __init__(self, proj: nn.Module | None = None) -> None:
        super().__init__()
        self.proj = nn.Identity() if proj is None else proj

    def forward(self, state: Tensor, predi: Tensor) -> Tensor:
        return square_cost_seq(self.proj(_samples(state)), self.proj(_samples(predi)))


def _hinge(variance: Tensor, margin: float) -> Tensor:
    return (margin - (variance + EPS).sqrt()).relu().mean()


def _std_and_covariance(x: Tensor, margin: float, name: str = "x") -> tuple[Tensor, Tensor]:
    """The terms of `HingeStdLoss` and `CovarianceLoss` of the rows x (N, D), N >= 2, from one covariance."""
    checks.matrix(name, x, 2)
    variance, offdiag = covariance_of(x, "plugin", "auto", ALONE)
    d = x.shape[1]
    return _hinge(variance, margin), offdiag / max(d * (d - 1), 1)


class HingeStdLoss(nn.Module):
    """mean_j max(0, std_margin - sqrt(var_j + 1e-4)), with the unbiased variances of the columns.

    Args:
        std_margin: the standard deviation from which the loss is 0.
    """

    def __init__(self, std_margin: float = 1.0) -> None:
        super().__init__()
        self.std_margin = std_margin

    def forward(self, x: Tensor) -> Tensor:
        """The loss of x, (N, ...), N >= 2."""
        rows = _floating("x", x)
        if rows.dim() < 1 or rows.shape[0] < 2 or rows.numel() == 0:
            raise ValueError(f"x must have shape (N, ...), N >= 2, and not be empty, got shape {tuple(x.shape)}.")
        return _hinge(rows.var(0), self.std_margin)


class CovarianceLoss(nn.Module):
    """The mean of the D (D - 1) squared off-diagonal covariances of the columns."""

    def forward(self, x: Tensor) -> Tensor:
        """The loss of the rows x, (N, D), N >= 2."""
        return _std_and_covariance(x, 1.0)[1]


class VCLoss(nn.Module):
    """The standard deviation and covariance terms of projected features.

    Args:
        std_coeff, cov_coeff: the weights of `HingeStdLoss` and of `CovarianceLoss`.
        proj: a projector of rows (N, D), or None.
    """

    def __init__(self, std_coeff: float, cov_coeff: float, proj: nn.Module | None = None) -> None:
        super().__init__()
        self.std_coeff, self.cov_coeff = std_coeff, cov_coeff
        self.proj = nn.Identity() if proj is None else proj
        self.std_loss_fn = HingeStdLoss(std_margin=1.0)
        self.cov_loss_fn = CovarianceLoss()

    def forward(self, x: Tensor, actions: object = None) -> Terms:
        """The loss of x, (B, D, ...), its unweighted terms added up, and the terms as floats.

        Every position of every sample is a row. `actions` has no effect. The floats are read in one host sync.
        """
        std, cov = _std_and_covariance(self.proj(_samples(x)), self.std_loss_fn.std_margin)
        loss = self.std_coeff * std + self.cov_coeff * cov
        return loss, std + cov, _numbers(std_loss=std, cov_loss=cov)


def _numbers(**terms: Tensor) -> dict[str, float]:
    values = torch.stack([term.detach().double() for term in terms.values()]).tolist()
    return dict(zip(terms, values, strict=True))


class TemporalSimilarityLoss(nn.Module):
    """The mean squared difference of successive steps. It is 0 for one step."""

    def forward(self, x: Tensor) -> Tensor:
        """The loss of x, (T, ...)."""
        if x.shape[0] <= 1:
            return torch.tensor(0.0, device=x.device)
        return sq_loss(x[1:], x[:-1])


class InverseDynamicsLoss(nn.Module):
    """The mean squared error of the actions that a model predicts from successive states.

    Args:
        idm: a model that maps two batches of states, both (B (T - 1), D), to actions (B (T - 1), A).
    """

    def __init__(self, idm: nn.Module) -> None:
        super().__init__()
        self.idm = idm

    def forward(self, x: Tensor, actions: Tensor | None) -> Tensor:
        """The loss of states x, (T, B, D), and actions, (B, A, T). It is 0 for one step or without actions."""
        if x.shape[0] <= 1 or actions is None:
            return torch.tensor(0.0, device=x.device)
        states = x.transpose(0, 1)
        now, then = (part.reshape(-1, x.shape[2]) for part in (states[:, :-1], states[:, 1:]))
        return sq_loss(self.idm(now, then), actions.transpose(1, 2)[:, :-1].reshape(-1, actions.shape[1]))


class VC_IDM_Sim_Regularizer(nn.Module):
    """Standard deviation, covariance, temporal similarity and inverse dynamics of features (B, C, T, H, W).

    Args:
        cov_coeff, std_coeff, sim_coeff_t, idm_coeff: the weights of `CovarianceLoss`, `HingeStdLoss`,
            `TemporalSimilarityLoss` and `InverseDynamicsLoss`.
        idm: the model of `InverseDynamicsLoss`, or None.
        std_margin: the margin of `HingeStdLoss`.
        first_t_only: whether the first two terms use only the first step.
        projector: a projector of rows (B T H W, C), or None.
        spatial_as_samples: whether positions are rows, (B T H W, C), in the first two terms. Otherwise they are
            features, (B T, C H W).
        sim_t_after_proj, idm_after_proj: whether the other two terms use projected features. As in EB-JEPA, these are
            the features (H, B, T, W, C) reshaped to (T, B, ...), in which steps and positions are mixed.
    """

    def __init__(
        self,
        cov_coeff: float,
        std_coeff: float,
        sim_coeff_t: float,
        idm_coeff: float = 0.0,
        idm: nn.Module | None = None,
        std_margin: float = 1,
        first_t_only: bool = True,
        projector: nn.Module | None = None,
        spatial_as_samples: bool = False,
        sim_t_after_proj: bool = False,
        idm_after_proj: bool = False,
    ) -> None:
        super().__init__()
        self.cov_coeff, self.std_coeff, self.sim_coeff_t, self.idm_coeff = cov_coeff, std_coeff, sim_coeff_t, idm_coeff
        self.first_t_only = first_t_only
        self.projector = nn.Identity() if projector is None else projector
        self.spatial_as_samples = spatial_as_samples
        self.sim_t_after_proj, self.idm_after_proj = sim_t_after_proj, idm_after_proj
        self.std_loss_fn = HingeStdLoss(std_margin=std_margin)
        self.cov_loss_fn = CovarianceLoss()
        self.sim_loss_fn = TemporalSimilarityLoss()
        self.idm_loss_fn = InverseDynamicsLoss(idm) if idm is not None else None

    def forward(self, x: Tensor, actions: Tensor | None = None) -> Terms:
        """The loss of x, (B, C, T, H, W), its unweighted terms added up, and the terms as floats.

        The floats are read in one host sync. `actions`, (B, A, T), are needed for inverse dynamics.
        """
        if not isinstance(x, Tensor) or x.dim() != 5:
            raise ValueError(f"x must be a torch.Tensor of shape (B, C, T, H, W), got {checks.got(x)}.")
        b, c, t, h, w = x.shape
        rows = self.projector(x.permute(0, 2, 3, 4, 1).reshape(-1, c))
        projected = rows.view(b, t, h, w, -1)
        sim = self._similarity(x, projected)
        idm = torch.tensor(0.0, device=x.device)
        if self.idm_coeff > 0 and self.idm_loss_fn is not None and actions is not None:
            idm = self.idm_loss_fn(_mixed(projected) if self.idm_after_proj else _steps(x), actions)
        std, cov = _std_and_covariance(self._rows(projected), self.std_loss_fn.std_margin)
        weighted = self.cov_coeff * cov + self.std_coeff * std + self.sim_coeff_t * sim + self.idm_coeff * idm
        return weighted, cov + std + sim + idm, _numbers(cov_loss=cov, std_loss=std, sim_loss_t=sim, idm_loss=idm)

    def _similarity(self, x: Tensor, projected: Tensor) -> Tensor:
        # without the projector, the order of the features has no effect, so x need not be copied
        return self.sim_loss_fn(_mixed(projected) if self.sim_t_after_proj else x.movedim(2, 0))

    def _rows(self, projected: Tensor) -> Tensor:
        """The samples of the standard deviation and the covariance."""
        z = projected[:, :1] if self.first_t_only else projected
        if self.spatial_as_samples:
            return z.flatten(0, 3)
        return z.permute(0, 1, 4, 2, 3).flatten(2).flatten(0, 1)


def _steps(x: Tensor) -> Tensor:
    """(B, C, T, H, W) as (T, B, C H W)."""
    return x.permute(2, 0, 1, 3, 4).flatten(2)


def _mixed(projected: Tensor) -> Tensor:
    """(B, T, H, W, C) in EB-JEPA's order, as (T, B, ...)."""
    b, t = projected.shape[:2]
    return projected.permute(2, 0, 1, 3, 4).reshape(t, b, -1)


class VICRegLoss(nn.Module):
    """VICReg of two views: their mean squared difference, and both terms of both views.

    Args:
        std_coeff, cov_coeff: the weights of `HingeStdLoss` and of `CovarianceLoss`. That of the difference is 1.
    """

    def __init__(self, std_coeff: float = 1.0, cov_coeff: float = 1.0) -> None:
        super().__init__()
        self.std_coeff, self.cov_coeff = std_coeff, cov_coeff
        self.std_loss_fn = HingeStdLoss(std_margin=1.0)
        self.cov_loss_fn = CovarianceLoss()

    def forward(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """The tensors "loss", "invariance_loss", "var_loss" and "cov_loss" of two views (N, D), N >= 2. Each of them
        has its gradient."""
        check_views(2, z1=z1, z2=z2)
        margin = self.std_loss_fn.std_margin
        (std1, cov1), (std2, cov2) = (_std_and_covariance(z, margin) for z in (z1, z2))
        invariance, variance, covariance = sq_loss(z1, z2), std1 + std2, cov1 + cov2
        loss = invariance + self.std_coeff * variance + self.cov_coeff * covariance
        return {"loss": loss, "invariance_loss": invariance, "var_loss": variance, "cov_loss": covariance}
