"""Losses of two views: VICReg, Barlow Twins, BYOL, InfoNCE and NT-Xent."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core import checks
from ....core.dtypes import accumulation_dtype, without_autocast
from ....losses import info_nce_loss, nt_xent_loss, vicreg_loss
from ....ops.column_products import column_products
from ....ops.unit_rows import unit_rows
from .._cosines import NORMALIZE_EPS, mean_cosine
from .._views import check_views, joined, matched, matched_batch
from .utils import VCRegLoss


class VICRegLoss(nn.Module):
    """VICReg, as `sslkern.vicreg_loss`. The invariance term uses the rows of this process.

    Args:
        sim_coeff: the weight of the mean squared difference of the views.
        std_coeff, cov_coeff, epsilon: as in `VCRegLoss`, which is the attribute `vcreg_loss`.
    """

    def __init__(
        self, sim_coeff: float = 25, std_coeff: float = 25, cov_coeff: float = 1, epsilon: float = 1e-4
    ) -> None:
        super().__init__()
        self.sim_coeff = sim_coeff
        self.vcreg_loss = VCRegLoss(std_coeff, cov_coeff, epsilon)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """The loss of two views, both (N, D), N >= 2."""
        group, (x, y) = matched(2, z_i=z_i, z_j=z_j)
        each = self.vcreg_loss
        return vicreg_loss(  # type: ignore[return-value]
            x, y, self.sim_coeff, each.std_coeff, each.cov_coeff, eps=each.epsilon, group=group
        )


class BarlowTwinsLoss(nn.Module):
    """Barlow Twins of columns that are divided by their standard deviation plus 1e-5.

        Z_hat = (Z - mean) / (std + 1e-5), std unbiased, over the rows of this process
        C     = sum over all processes of Z_i_hat'Z_j_hat / N, N the number of all rows
        loss  = sum_j (C_jj - 1)^2 + lambd * sum_{j != k} C_jk^2

    No D x D matrix is formed if N < 0.75 D.

    Args:
        lambd: the weight of the off-diagonal elements.
    """

    def __init__(self, lambd: float = 5e-3) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """The loss of two views, both (N, D), N >= 2."""
        batch, (x, y) = matched_batch(2, z_i=z_i, z_j=z_j)
        n, dtype = batch.count(len(x)), accumulation_dtype(x)
        diagonal, offdiag = column_products(x.to(dtype), y.to(dtype), 1e-5, batch)
        return torch.add((diagonal - n).square().sum(), offdiag, alpha=self.lambd) / n**2


class BYOLLoss(nn.Module):
    """2 - 2 mean cos(online_pred, target_proj). Both arguments get a gradient, as in stable-pretraining."""

    def forward(self, online_pred: Tensor, target_proj: Tensor) -> Tensor:
        """The loss of predictions and targets, both (..., D); each (D,) is one vector."""
        return 2 - 2 * mean_cosine(NORMALIZE_EPS, online_pred, target_proj, ("online_pred", "target_proj"))


class InfoNCELoss(nn.Module):
    """The cross-entropy of finding the candidate of each anchor among all candidates of this process.

    It is `sslkern.info_nce_loss` with logits cos(anchor, candidate) / temperature.

    Args:
        temperature: a number other than 0.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        anchors: Tensor,
        candidates: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            anchors: (N, D). candidates: (M, D).
            targets: int64 (N,), the row of the candidate of each anchor.
            mask: None, or a bool tensor that broadcasts to (N, M) and is True for the pairs to leave out. With a mask,
                the N x M logits are formed.
            logit_scale: replaces the temperature, so logits are divided by it: a number, or a floating-point tensor
                with one element, which gets a gradient.
        """
        return self._compute(anchors, candidates, targets, mask, logit_scale)

    def _compute(
        self,
        anchors: Tensor,
        candidates: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
    ) -> Tensor:
        checks.matrix("anchors", anchors)
        checks.matrix("candidates", candidates)
        checks.beside("anchors", anchors, "candidates", candidates)
        if anchors.shape[1] != candidates.shape[1]:
            shapes = f"{tuple(anchors.shape)} and {tuple(candidates.shape)}"
            raise ValueError(f"anchors and candidates must have the same columns (D), got shapes {shapes}.")
        checks.indices("targets", targets, anchors, (len(anchors),))
        positives = None if len(anchors) <= len(candidates) and checks.in_order(targets) else targets
        if positives is not None:
            checks.below("targets", positives, len(candidates))
        scale = checks.setting("logit_scale", self._scale(logit_scale), anchors, zero=False)
        if mask is None:
            return info_nce_loss(anchors, candidates, scale, positives=positives)
        dtype = accumulation_dtype(anchors, candidates)
        x, y = (unit_rows(z, dtype, NORMALIZE_EPS) for z in (anchors, candidates))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError("mask must be None or a bool torch.Tensor that broadcasts to (N, M).")
        with without_autocast(x):
            logits = x @ y.mT / scale
            return F.cross_entropy(logits.masked_fill(mask, -torch.inf), targets)

    def _scale(self, logit_scale: Tensor | float | None) -> Tensor | float:
        return self.temperature if logit_scale is None else logit_scale


class NTXEntLoss(InfoNCELoss):
    """NT-Xent, as `sslkern.nt_xent_loss`, among the rows of all processes.

    Args:
        temperature: a number other than 0.
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__(temperature=temperature)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:  # type: ignore[override]
        """The loss of two views, both (N, D)."""
        group = joined(1, lambda least: check_views(least, z_i=z_i, z_j=z_j))
        return nt_xent_loss(z_i, z_j, self.temperature, group=group)
