"""The losses of stable-pretraining (`stable_pretraining.losses`, and SIGReg of
`stable_pretraining.methods.lejepa`), with its names, arguments, values and gradients.

    from sslkern.train.compat.stable_pretraining import VICRegLoss  # before: from stable_pretraining.losses import ...

As there, a loss that concerns the whole batch gathers or sums over all processes whenever torch.distributed is
initialised. What differs is this:

- Losses are computed and returned in float32, or in float64 for float64 tensors, also under autocast and in half
  precision, where those of stable-pretraining may overflow.
- A D x D matrix is formed only if it is the smaller one, and an N x M matrix of logits only for a mask, which is such a
  matrix itself.
- Tensors of different dtypes are accepted everywhere.
- Invalid input raises TypeError or ValueError with one sentence. With several processes, all of them raise.
- Processes may have different numbers of rows.
- SIGReg averages over all processes; that of stable-pretraining means to, but throws away the averages, so that each
  process compares its own rows.
"""

from .joint_embedding import BarlowTwinsLoss, BYOLLoss, InfoNCELoss, NTXEntLoss, VICRegLoss
from .lejepa import EppsPulley, SlicedEppsPulley
from .multimodal import CLIPLoss
from .utils import NegativeCosineSimilarity, VCRegLoss, off_diagonal

__all__ = [
    "BYOLLoss",
    "BarlowTwinsLoss",
    "CLIPLoss",
    "EppsPulley",
    "InfoNCELoss",
    "NTXEntLoss",
    "NegativeCosineSimilarity",
    "SlicedEppsPulley",
    "VCRegLoss",
    "VICRegLoss",
    "off_diagonal",
]

_LOSSES = {
    "losses.joint_embedding": (BYOLLoss, VICRegLoss, BarlowTwinsLoss, InfoNCELoss, NTXEntLoss),
    "losses.multimodal": (CLIPLoss,),
    "losses.utils": (NegativeCosineSimilarity, VCRegLoss),
    "methods.lejepa": (EppsPulley, SlicedEppsPulley),
}
SWAPPED = {f"stable_pretraining.{module}.{loss.__name__}": loss for module, found in _LOSSES.items() for loss in found}
LEFT = {
    "stable_pretraining.methods.wmse.WMSE": "it has its networks inside; its loss is "
    'sslkern.whitening_mse_loss with method="zca" and together=True, divided by the columns',
}
