"""InfoNCE: each query against all keys, as in CPC, MoCo, NNCLR and CLIP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import _checks
from ..ops._rows import unit_rows
from ..ops.pairwise_reduce import pairwise_reduce
from ..reference.columns import accumulation_dtype


def info_nce_loss(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    scale: float | Tensor | None = None,
    positives: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = True,
) -> Tensor:
    r"""The cross-entropy of the key p(i) of query i among all M keys, without the N x M logits.

        t_ij = <q_i, k_j> / temperature, of L2-normalised rows
        loss = mean_i [log sum_j exp(t_ij) - t_ip(i)] = mean_i log(1 + sum_{j != p(i)} exp(t_ij - t_ip(i)))

    The second form is the one computed: it keeps its digits where the positives win and the loss is small.

    Args:
        q: (N, D) queries; float32, bfloat16, float16 or float64; any strides; N >= 1.
        k: (M, D) keys of q's dtype and device. Without `positives`, M >= N and p(i) = i: further keys are negatives.
        temperature: a number other than 0, or a 0-dim tensor, with a gradient; dimensionless.
        scale: where given, it replaces 1 / temperature, as CLIP's exp(logit_scale).
        positives: int64 (N,), the p(i); with keys gathered from all ranks, arange(N) + rank * N.
        symmetric: CLIP's loss, the mean of this one and that of the keys against the queries, from one pass; M = N.
        normalize: False takes the rows as they are.

    Returns:
        The loss, a float32 (float64 for float64) scalar, of which all arithmetic is at least float32.

    Raises:
        TypeError, ValueError: one sentence, before any work. The range of `positives` is looked at on a CPU only.

    Sources: van den Oord et al., CPC (1807.03748); Radford et al., CLIP (2103.00020).
    """
    _check(q, k, positives, symmetric)
    _checks.coefficient("temperature", temperature, q, zero=False)
    c = inverse(temperature, q)
    if scale is not None:
        _checks.coefficient("scale", scale, q)
        c = converted(scale, q)
    x, y = (unit_rows(z) if normalize else z.to(accumulation_dtype(z)) for z in (q, k))
    if positives is None:
        positive = c * row_products(x, y[: x.shape[0]])
        negatives = pairwise_reduce(x, y, scale=c, mask="others", both_sides=symmetric)
    else:
        positive = c * row_products(x, F.embedding(positives, y))  # adds its gradient in a fixed order
        keys = torch.arange(y.shape[0], device=y.device)
        negatives = pairwise_reduce(x, y, scale=c, mask="different", labels=(positives, keys))
    if symmetric:
        rows, columns = (cross_entropy(positive, side).mean() for side in negatives)
        return 0.5 * (rows + columns)
    return cross_entropy(positive, negatives).mean()


def _check(q: Tensor, k: Tensor, positives: Tensor | None, symmetric: bool) -> None:
    _checks.matrix("q", q)
    _checks.matrix("k", k)
    _checks.alike("q", q, "k", k)
    shapes = f"got shapes {tuple(q.shape)} for q and {tuple(k.shape)} for k."
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must have the same columns (D), {shapes}")
    if symmetric and (q.shape[0] != k.shape[0] or positives is not None):
        raise ValueError(f"symmetric=True pairs row i of q with row i of k: no positives, as many rows, {shapes}")
    if positives is not None:
        _checks.indices("positives", positives, q, (q.shape[0],))
        _checks.below("positives", positives, k.shape[0])
    elif k.shape[0] < q.shape[0]:
        raise ValueError(f"k must have a row for every row of q unless positives says which, {shapes}")


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i>, at the full precision of the dtype whatever autocast and torch's matmul precision say."""
    return (x * y).sum(-1)


def converted(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A coefficient in the precision of the loss of x."""
    return value.to(accumulation_dtype(x)) if isinstance(value, Tensor) else value


def inverse(temperature: float | Tensor, x: Tensor) -> float | Tensor:
    return 1 / converted(temperature, x)


def cross_entropy(positive: Tensor, negatives: Tensor) -> Tensor:
    """log(1 + exp(negatives - positive)): never negative, and 0 with a gradient of 0 where negatives is -inf."""
    return -F.logsigmoid(positive - negatives)


def shown(value: float | Tensor | None) -> str:
    return repr(value.detach() if isinstance(value, Tensor) else value)


class InfoNCELoss(nn.Module):
    """`info_nce_loss` as a module; it holds its settings, of which a temperature or scale may be an `nn.Parameter`.

    A `scale` that is computed anew in every step, as CLIP's exp(logit_scale), goes into the call.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        scale: float | Tensor | None = None,
        symmetric: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.temperature, self.scale = temperature, scale
        self.symmetric, self.normalize = symmetric, normalize

    def forward(
        self, q: Tensor, k: Tensor, *, scale: float | Tensor | None = None, positives: Tensor | None = None
    ) -> Tensor:
        return info_nce_loss(
            q,
            k,
            self.temperature,
            scale=self.scale if scale is None else scale,
            positives=positives,
            symmetric=self.symmetric,
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, scale={shown(self.scale)}, symmetric={self.symmetric}, "
            f"normalize={self.normalize}"
        )
