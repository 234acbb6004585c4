"""lightly's memory bank: a queue of the rows of earlier batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....core import checks, collectives, ranks
from ....core.ranks import JointBatch
from .._peers import shown, world

NO_DIMENSION = (
    "Memory bank size {0} has no feature dimension, so the bank takes it from the first batch: size=({0}, dim) sets "
    "it, and lightly 1.6 accepts nothing else."
)


class MemoryBankModule(nn.Module):
    """lightly's `MemoryBankModule`: the last rows that were given to it, at first random directions.

    Args:
        size: (n, dim) for n rows, or 0 for no bank. A number n without dim takes dim from the first batch, with a
            UserWarning.
        gather_distributed: put in the rows of all processes, in the order of their ranks, if torch.distributed is
            initialised. All banks then get the same rows.
        feature_dim_first: return the bank as (dim, n) instead of (n, dim).

    The buffers `bank` (n, dim) and `bank_ptr` (1,), the next row to overwrite, are not in the state dict. A batch that
    reaches the end of the bank is cut off there, and the next one starts at row 0.

    Raises:
        ValueError: a size is negative, or has other than two entries.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        size: int | Sequence[int] = 65536,
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
    ) -> None:
        super().__init__()
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if any(x < 0 for x in sizes):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        if len(sizes) != 2 and not (isinstance(size, int) or sizes == (0,)):
            raise ValueError(f"Illegal memory bank size {size}, it must be (n, dim), or 0 for no bank.")
        self.size = sizes
        self.gather_distributed, self.feature_dim_first = gather_distributed, feature_dim_first
        self.register_buffer("bank", torch.empty(sizes), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)
        if len(sizes) == 2:
            self._init_memory_bank(sizes)
        elif sizes[0] > 0:
            warnings.warn(NO_DIMENSION.format(size), UserWarning, stacklevel=2)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return `output`, and a copy of the bank, or None if there is none. `labels` are not used.

        With `update`, the rows of `output` (B, dim) are put into the bank after it was copied.
        """
        if self.size[0] == 0:
            return output, None
        bank = self._rows_for(output).clone()
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank.transpose(0, -1) if self.feature_dim_first else bank

    def extra_repr(self) -> str:
        return shown(self, "size", "gather_distributed", "feature_dim_first")

    def _rows_for(self, output: Tensor) -> Tensor:
        """The bank itself, which the next update overwrites. A bank without a dimension takes that of `output`."""
        if self.bank.dim() == 1:
            checks.matrix("output", output)
            self._init_memory_bank((*self.size, *output.shape[1:]))
        return self.bank.detach()

    @torch.no_grad()
    def _init_memory_bank(self, size: Sequence[int]) -> None:
        rows = torch.randn(tuple(size)).type_as(self.bank)
        self.bank = nn.functional.normalize(rows, dim=-1)
        self.bank_ptr = torch.zeros(1).type_as(self.bank_ptr)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        """Overwrite the rows from `bank_ptr` on. Neither the number of rows nor the place is read from the device."""
        joint, _ = ranks.batch(world(self.gather_distributed), 0, lambda _: (batch,))
        if isinstance(joint, JointBatch):
            batch = collectives.gather_rows(batch, joint.counts, joint.peers)
        size = self.size[0]
        rows = batch[:size].detach().to(self.bank)
        places = self.bank_ptr + torch.arange(rows.shape[0], device=self.bank.device)
        wrapped = places % size
        inside = (places < size)[:, None]
        self.bank.index_copy_(0, wrapped, torch.where(inside, rows, self.bank[wrapped]))
        reached = self.bank_ptr + batch.shape[0]
        self.bank_ptr.copy_(torch.where(reached >= size, 0, reached))
