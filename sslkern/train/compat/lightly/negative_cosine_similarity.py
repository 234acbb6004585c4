"""lightly's negative cosine similarity, the loss of SimSiam and BYOL in its trainers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.autograd import Op, first_order
from ....core.dtypes import FLOATS, accumulation_dtype
from ....ops.unit_rows import HALF_EPS
from .._cosines import small
from .._peers import shown


class NegativeCosineSimilarity(nn.Module):
    """lightly's `NegativeCosineSimilarity`: minus the mean cosine of vectors along `dim`, without a stop-gradient.

    The vectors are divided by max(length, eps), in float16 by at least 1e-3, so that the gradient of a vector of zeros
    does not overflow. Shapes that differ are broadcast.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return -mean_cosine(x0, x1, self.dim, self.eps)

    def extra_repr(self) -> str:
        return shown(self, "dim", "eps")


def mean_cosine(x: Tensor, y: Tensor, dim: int, eps: float) -> Tensor:
    """The mean of `torch.nn.functional.cosine_similarity`, whose backward takes many passes."""
    if small(x, y):
        return F.cosine_similarity(x, y, dim, eps).mean()
    for name, z in (("x0", x), ("x1", y)):
        if not isinstance(z, Tensor) or z.dtype not in FLOATS:
            kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"{name} must be a floating-point torch.Tensor, got {kind}.")
    dtype = accumulation_dtype(x, y)
    if torch.float16 in (x.dtype, y.dtype):
        eps = max(eps, HALF_EPS)
    if torch.compiler.is_compiling():  # it fuses the passes
        return F.cosine_similarity(x.to(dtype), y.to(dtype), dim, eps).mean()
    if x.shape != y.shape:
        x, y = torch.broadcast_tensors(x, y)
    return _Cosine.apply(x.to(dtype), y.to(dtype), dim, eps)[0].mean()


class _Cosine(Op):
    """The cosines along `dim`, with the dimension kept. A vector shorter than eps is divided by eps; its gradient is
    torch's, in which the length has a derivative there too."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, dim: int, eps: float) -> tuple[Tensor, ...]:
        lengths = [torch.linalg.vector_norm(z, dim=dim, keepdim=True) for z in (x, y)]
        over = [length.clamp_min(eps) for length in lengths]
        return (x * y).sum(dim, keepdim=True) / over[0] / over[1], *lengths

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, _, ctx.eps = inputs
        cosine, *lengths = output
        ctx.save_for_backward(x, y, cosine, *lengths)
        ctx.mark_non_differentiable(*lengths)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, cosine, *lengths = ctx.saved_tensors
        over = [length.clamp_min(ctx.eps) for length in lengths]
        across = grad / over[0] / over[1]
        grads = []
        for k, (this, other) in enumerate(((x, y), (y, x))):
            along = (grad * cosine / over[k] / lengths[k]).masked_fill(lengths[k] == 0, 0.0)
            grads.append(torch.addcmul(across * other, along, this, value=-1) if ctx.needs_input_grad[k] else None)
        return *grads, None, None
