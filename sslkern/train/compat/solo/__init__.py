"""The losses of solo-learn (`solo.losses`) and its whitening layers (`solo.utils.whitening`), with its names,
arguments, values and gradients.

    from sslkern.train.compat.solo import vicreg_loss_func  # before: from solo.losses import vicreg_loss_func

As there, a loss that concerns the whole batch gathers it whenever torch.distributed is initialised. Gradients are those
of solo-learn before DistributedDataParallel averages them. What differs is this:

- Losses are computed and returned in float32, or in float64 for float64 tensors, also under autocast and in half
  precision, where those of solo-learn may overflow.
- Tensors of different dtypes are accepted everywhere.
- Small temperatures give the loss. `simclr_loss_func` of solo-learn gives NaN, as it exponentiates without a maximum.
- Invalid input raises TypeError or ValueError with one sentence. With several processes, all of them raise.
- Processes may have different numbers of rows.
"""

from typing import Any

from ._columns import barlow_loss_func, vibcreg_loss_func, vicreg_loss_func
from ._contrastive import mocov2plus_loss_func, mocov3_loss_func, nnclr_loss_func, ressl_loss_func, simclr_loss_func
from ._directions import byol_loss_func, simsiam_loss_func, wmse_loss_func
from ._prototypes import DINOLoss, swav_loss_func
from ._whitening import IterNorm, Whitening2d

__all__ = [
    "DINOLoss",
    "IterNorm",
    "Whitening2d",
    "barlow_loss_func",
    "byol_loss_func",
    "mocov2plus_loss_func",
    "mocov3_loss_func",
    "nnclr_loss_func",
    "ressl_loss_func",
    "simclr_loss_func",
    "simsiam_loss_func",
    "swav_loss_func",
    "vibcreg_loss_func",
    "vicreg_loss_func",
    "wmse_loss_func",
]

_LOSSES = {
    "barlow": barlow_loss_func,
    "byol": byol_loss_func,
    "mocov2plus": mocov2plus_loss_func,
    "mocov3": mocov3_loss_func,
    "nnclr": nnclr_loss_func,
    "ressl": ressl_loss_func,
    "simclr": simclr_loss_func,
    "simsiam": simsiam_loss_func,
    "vibcreg": vibcreg_loss_func,
    "vicreg": vicreg_loss_func,
    "wmse": wmse_loss_func,
}
SWAPPED: dict[str, Any] = {f"solo.losses.{module}.{loss.__name__}": loss for module, loss in _LOSSES.items()}
SWAPPED["solo.utils.whitening.Whitening2d"] = Whitening2d
LEFT = dict.fromkeys(("solo.losses.dino.DINOLoss", "solo.losses.swav.swav_loss_func"), "its logits exist already")
LEFT["solo.utils.whitening.IterNorm"] = "ours takes more time for small groups of channels"
