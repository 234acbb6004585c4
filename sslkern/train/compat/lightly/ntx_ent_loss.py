"""lightly's NT-Xent loss, with or without a memory bank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ....core import checks
from ....core.dtypes import accumulation_dtype
from ....losses import nt_xent_loss
from ....ops.unit_rows import unit_rows
from .._peers import check_gather, shown, world
from .memory_bank import MemoryBankModule


class NTXentLoss(nn.Module):
    """lightly's `NTXentLoss`: `sslkern.losses.nt_xent_loss` for views of shape (N, D), N >= 1.

    Without a memory bank, every row is compared with the other 2N - 1 rows of the batch. With one, the positive of a
    row of `out0` is the same row of `out1`, and its negatives are the rows of the bank, as they are. The bank then gets
    the normalised rows of `out1`, if `out0` requires a gradient. The gradient is computed together with the loss, so
    the bank is neither copied nor kept for the backward.

    Args:
        temperature: a number of at least 1e-8 in magnitude; it may be negative, or a tensor of one element.
        memory_bank_size: 0, (n, dim), or n; see `MemoryBankModule`.
        gather_distributed: compare with the rows of all processes, if torch.distributed is initialised. With a memory
            bank, put the rows of all processes into it.

    Attributes:
        memory_bank: the `MemoryBankModule`, or a module of the user's in its place.
        cross_entropy: as in lightly. It may not be replaced by one with another reduction, weight or label smoothing.
        eps: the least temperature, 1e-8.

    Raises:
        ValueError: the temperature is too small; torch has no distributed package and `gather_distributed` is True; or
        the shapes of the views, or of their rows and the bank, do not fit.

    Sources: Chen et al., SimCLR (2002.05709); He et al., MoCo (1911.05722) for the bank.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean")
        self.eps = 1e-8
        if abs(temperature) < self.eps:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        check_gather(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        _check_plain(self.cross_entropy)
        bank = self.memory_bank
        own = type(bank).forward is not MemoryBankModule.forward
        if not own and bank.size[0] == 0:
            return nt_xent_loss(out0, out1, self.temperature, group=world(self.gather_distributed))
        checks.matrix("out0", out0)
        checks.matrix("out1", out1)
        checks.same_shape("out0", out0, "out1", out1)
        dtype = accumulation_dtype(out0, out1)
        x, y = unit_rows(out0, dtype), unit_rows(out1, dtype)
        if own:
            return self._with_own_bank(x, y)
        rows = bank._rows_for(out1).to(x.device)
        loss = nt_xent_loss(x, y, self.temperature, negatives=rows, normalize=False)
        if x.requires_grad:
            bank._dequeue_and_enqueue(y)
        return loss

    def _with_own_bank(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss with a bank of the user's, which has another `forward` and returns what is its own to keep."""
        y, columns = self.memory_bank(y, update=x.requires_grad)
        if columns is None:
            return nt_xent_loss(x, y, self.temperature, normalize=False, group=world(self.gather_distributed))
        return nt_xent_loss(x, y, self.temperature, negatives=columns.to(x.device).T, normalize=False)

    def extra_repr(self) -> str:
        return shown(self, "temperature", "gather_distributed")


def _check_plain(cross_entropy: nn.Module) -> None:
    """The loss is computed without `cross_entropy`, which lightly calls with logits."""
    plain = type(cross_entropy) is nn.CrossEntropyLoss and cross_entropy.reduction == "mean"
    if (
        not plain
        or cross_entropy.weight is not None
        or cross_entropy.label_smoothing
        or cross_entropy.ignore_index >= 0
    ):
        raise ValueError(f"cross_entropy must be lightly's, CrossEntropyLoss(reduction='mean'), got {cross_entropy}.")
