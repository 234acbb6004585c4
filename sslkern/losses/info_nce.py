"""The InfoNCE loss, which compares each query with all keys, as in CPC, MoCo, NNCLR and CLIP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.contrastive import contrastive_of, one_call
from ..ops.pairs import reduce_pairs
from ..ops.unit_rows import unit_rows
from ._pairs import check_normalize, converted, cross_entropy, inverse, row_products, shown, shown_last


def info_nce_loss(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    scale: float | Tensor | None = None,
    positives: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    eps: float | None = None,
    group: Group = None,
) -> Tensor:
    r"""The cross-entropy of finding the positive key p(i) of each query i among all M keys.

    The N x M matrix of logits is not formed. The rows q_i and k_j are L2-normalised first, unless
    `normalize` is False:

        t_ij = <q_i, k_j> / temperature
        loss = mean_i [log sum_j exp(t_ij) - t_ip(i)] = mean_i log(1 + sum_{j != p(i)} exp(t_ij - t_ip(i)))

    The loss is computed in the second form, which keeps its relative precision where the loss is small.

    Args:
        q: (N, D) queries; float32, bfloat16, float16 or float64; any strides; N >= 1.
        k: (M, D) keys on the device of `q`, in any of these dtypes. Without `positives`, M must be at least N, and key
            i is the positive of query i: p(i) = i. The keys from N on are negatives only.
        temperature: a number other than 0, or a floating-point tensor with one element, which gets a gradient. It is
            dimensionless.
        scale: replaces 1 / temperature, like exp(logit_scale) in CLIP: a number, or a floating-point tensor with one
            element, which gets a gradient.
        positives: int64 (N,), the indices p(i) of the positive keys. With a group, they are indices into the keys of
            this rank.
        symmetric: return the loss of CLIP, which is the mean of this loss and of the same loss with `q` and `k`
            exchanged. Both are computed in one pass. It needs M = N.
        normalize: whether to L2-normalise the rows first.
        eps: a row shorter than `eps` is divided by `eps` instead of by its length, which bounds the gradient of the
            row. The default is 1e-12, but 1e-3 for float16 rows, because the gradient of a row of zeros would overflow
            with 1e-12.
        group: the ranks that hold the batch; see `sslkern.distributed`. The keys are sent to all ranks. Without
            `positives`, every rank needs M >= N. With `symmetric`, the ranks also reduce two numbers per key; queries
            are not sent.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if q or k is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, settings do not fit
        together, or an index in `positives` is out of range, which is checked only on a CPU.

    Sources: van den Oord et al., CPC (1807.03748); Radford et al., CLIP (2103.00020).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        _check(q, k, positives, symmetric, least)
        _check_settings(temperature, scale, symmetric, normalize, eps, q)
        return q, k

    (batch, key_batch), _ = ranks.batches(group, 1, check)
    dtype = accumulation_dtype(q, k)
    c = inverse(temperature, dtype) if scale is None else converted(scale, dtype)
    if positives is not None and checks.in_order(positives):
        positives = None
    if positives is None and one_call(batch):
        total = contrastive_of(q, k, c, dtype, both_sides=symmetric, normalize=normalize, eps=eps)
        return batch.average(total, q.shape[0])
    x, y = (unit_rows(z, dtype, eps) if normalize else z.to(dtype) for z in (q, k))
    keys = key_batch.every(y)
    if positives is None:
        positive = c * row_products(x, y[: x.shape[0]])
        negatives = reduce_pairs(x, keys, c, mask="offdiag", both_sides=symmetric)
    else:
        # the backward of embedding adds up gradients in a fixed order
        positive = c * row_products(x, F.embedding(positives, y))
        places = torch.arange(keys.shape[0], device=keys.device)
        negatives = reduce_pairs(x, keys, c, mask="different", labels=(positives, places))
    if symmetric:
        rows, columns = negatives
        sides = rows, batch.logsumexp(columns)
        over_rows, over_columns = (batch.mean(cross_entropy(positive, side)) for side in sides)
        return 0.5 * (over_rows + over_columns)
    return batch.mean(cross_entropy(positive, negatives))


def _check(q: Tensor, k: Tensor, positives: Tensor | None, symmetric: bool, least: int) -> None:
    checks.matrix("q", q, least)
    checks.matrix("k", k, least)
    checks.beside("q", q, "k", k)
    shapes = f"got shapes {tuple(q.shape)} for q and {tuple(k.shape)} for k."
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must have the same columns (D), {shapes}")
    if symmetric and (q.shape[0] != k.shape[0] or positives is not None):
        raise ValueError(f"symmetric=True pairs row i of q with row i of k: no positives, as many rows, {shapes}")
    if positives is not None:
        checks.indices("positives", positives, q, (q.shape[0],))
        if q.shape[0]:
            checks.below("positives", positives, k.shape[0])
    elif k.shape[0] < q.shape[0]:
        raise ValueError(f"k must have a row for every row of q unless positives says which, {shapes}")


def _check_settings(
    temperature: object, scale: object, symmetric: object, normalize: object, eps: object, x: Tensor | None
) -> None:
    checks.setting("temperature", temperature, x, zero=False)
    if scale is not None:
        checks.setting("scale", scale, x)
    checks.flag("symmetric", symmetric)
    check_normalize(normalize, eps)


class InfoNCELoss(nn.Module):
    """`info_nce_loss` as a module, which stores the settings. The temperature or scale may be an `nn.Parameter`.

    If the scale is computed anew in every step, like exp(logit_scale) in CLIP, pass it to the call as `scale`.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        scale: float | Tensor | None = None,
        symmetric: bool = False,
        normalize: bool = True,
        eps: float | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check_settings(temperature, scale, symmetric, normalize, eps, None)
        ranks.peers_of(group)
        self.temperature, self.scale = temperature, scale
        self.symmetric, self.normalize, self.eps, self.group = symmetric, normalize, eps, group

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
            eps=self.eps,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, scale={shown(self.scale)}, symmetric={self.symmetric}, "
            f"normalize={self.normalize}{shown_last(self.eps, self.group)}"
        )
