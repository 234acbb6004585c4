"""lightly's DirectCLR loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._peers import shown
from .ntx_ent_loss import NTXentLoss


class DirectCLRLoss(NTXentLoss):
    """lightly's `DirectCLRLoss`: `NTXentLoss` of the first `loss_dim` features of the views.

    Views with more than two dimensions are flattened to (N, D) first. The bank of `memory_bank_size` has rows of
    `loss_dim` features, or of D if that is less. All other arguments are those of `NTXentLoss`.

    Source: Jing et al., Understanding Dimensional Collapse in Contrastive Self-supervised Learning (2110.09348).
    """

    def __init__(
        self,
        loss_dim: int = 64,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, memory_bank_size, gather_distributed)
        self.loss_dim = loss_dim

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        for name, out in (("out0", out0), ("out1", out1)):
            if not isinstance(out, Tensor) or out.dim() < 2:
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise TypeError(f"{name} must be a torch.Tensor of shape (N, D, ...), got {got}.")
        return super().forward(*(out.flatten(start_dim=1)[:, : self.loss_dim] for out in (out0, out1)))

    def extra_repr(self) -> str:
        return f"{shown(self, 'loss_dim')}, {super().extra_repr()}"
