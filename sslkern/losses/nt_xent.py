"""NT-Xent, the loss of SimCLR, which contrasts the views of a sample with all other samples of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.contrastive import contrastive_of, one_call
from ..ops.pairs import reduce_pairs
from ..ops.unit_rows import unit_rows
from ._pairs import (
    against_other_samples,
    check_normalize,
    cross_entropy,
    inverse,
    row_products,
    shown,
    shown_last,
    unit_views,
)


def nt_xent_loss(
    a: Tensor,
    b: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    others: Sequence[Tensor] = (),
    inside: bool = False,
    negatives: Tensor | None = None,
    decoupled: bool = False,
    normalize: bool = True,
    eps: float | None = None,
    group: Group = None,
) -> Tensor:
    r"""The cross-entropy of finding the other views of a sample among all rows of the batch.

    The matrix of the similarities of all rows is not formed. The V views have V N rows z_i in total. P(i) is the set of
    the other views of the sample of row i, and t_ij = cos(z_i, z_j) / temperature, or <z_i, z_j> / temperature if
    `normalize` is False:

        loss = mean_i mean_{p in P(i)} -log(exp(t_ip) / sum_{j != i} exp(t_ij))
        loss = mean_i -log(sum_{p in P(i)} exp(t_ip) / sum_{j != i} exp(t_ij))             inside=True

    For two views, both forms are the loss of SimCLR: a mean over 2N rows, each of which is compared with the 2N - 1
    others. `decoupled` leaves P(i) out of the sum in the denominator, as in DCL; the loss may then be negative.

    Without `decoupled`, a term of the second form is computed as log(1 + exp(n_i - p_i)), where n_i and p_i are the
    logsumexp of the t_ij of the negatives and of the positives of row i. This keeps the relative precision where the
    loss is small. The first form adds p_i - mean_{p in P(i)} t_ip.

    Args:
        a, b: two views, (N, D), N >= 1, with the same shape and device; each float32, bfloat16, float16 or float64; any
            strides.
        temperature: a number other than 0, or a floating-point tensor with one element, which gets a gradient. It is
            dimensionless.
        others: further views, each (N, D), with the shape and device of `a`.
        inside: take the sum over the positives of a row inside the logarithm, as in the second form.
        negatives: (K, D), a memory bank, in any of these dtypes. The loss is then the mean over the N rows of `a`. The
            positive of a row is the same row of `b`, and its negatives are the rows of the bank. The bank gets a
            gradient if it requires one.
        decoupled: leave P(i) out of the denominator, as described above. It needs N >= 2 or a memory bank.
        normalize: whether to L2-normalise all rows first, those of the bank included. False saves this work where the
            rows have unit length already, as in the queue of MoCo.
        eps: a row shorter than `eps` is divided by `eps` instead of by its length, which bounds the gradient of the
            row. The default is 1e-12, but 1e-3 for float16 rows, because the gradient of a row of zeros would overflow
            with 1e-12.
        group: the ranks that hold the batch; see `sslkern.distributed`. All views of a sample must be on one rank. A
            memory bank is not sent: every rank compares its rows with its own bank.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a view or the bank is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, or settings do not fit
        together.

    Sources: Chen et al., SimCLR (2002.05709); Yeh et al., DCL (2110.06848); He et al., MoCo (1911.05722) for the bank.
    """
    views = (a, b, *others) if isinstance(others, list | tuple) else (a, b)

    def check(least: int) -> tuple[Tensor, ...]:
        _check(a, b, others, negatives, decoupled, least)
        _check_settings(temperature, inside, decoupled, normalize, eps, a)
        return views

    batch, _ = ranks.batch(group, 2 if decoupled and negatives is None else 1, check)
    dtype = accumulation_dtype(*views) if negatives is None else accumulation_dtype(a, b, negatives)
    c = inverse(temperature, dtype)
    if not others and one_call(batch if negatives is None else None, negatives):
        views_only = negatives is None
        total = contrastive_of(
            a, b, c, dtype, bank=negatives, views=views_only, decoupled=decoupled, normalize=normalize, eps=eps
        )
        return batch.average(total, a.shape[0], 2 if views_only else 1)
    if negatives is not None:
        x, y, bank = (unit_rows(z, dtype, eps) if normalize else z.to(dtype) for z in (a, b, negatives))
        rows = _loss(c * row_products(x, y)[None], reduce_pairs(x, bank, c), inside, decoupled)
        return batch.mean(rows)
    z = unit_views(views, dtype, eps) if normalize else torch.stack([view.to(dtype) for view in views])
    return batch.mean(_loss(c * _positives(z), against_other_samples(z, c, batch), inside, decoupled))


def _check(
    a: Tensor, b: Tensor, others: Sequence[Tensor], negatives: Tensor | None, decoupled: bool, least: int
) -> None:
    if not isinstance(others, list | tuple):
        raise TypeError(f"others must be a list or tuple of further views (N, D), got {type(others).__name__}.")
    checks.matrix("a", a, min(least, 1))
    for i, view in enumerate((b, *others)):
        name = f"others[{i - 1}]" if i else "b"
        checks.matrix(name, view, min(least, 1))
        checks.same_shape("a", a, name, view)
    if negatives is not None:
        checks.matrix("negatives", negatives)
        if negatives.shape[1] != a.shape[1] or negatives.device != a.device:
            raise ValueError(
                f"negatives must have shape (K, {a.shape[1]}) and be on {a.device}, as the views, "
                f"got {tuple(negatives.shape)} on {negatives.device}."
            )
        if others:
            raise ValueError(f"negatives go with the two views a and b, got {len(others)} others.")
    elif decoupled and a.shape[0] < least:
        raise ValueError(f"decoupled=True needs negatives: a bank or at least 2 rows (N), got shape {tuple(a.shape)}.")


def _check_settings(
    temperature: object, inside: object, decoupled: object, normalize: object, eps: object, x: Tensor | None
) -> None:
    checks.setting("temperature", temperature, x, zero=False)
    checks.flag("inside", inside)
    checks.flag("decoupled", decoupled)
    check_normalize(normalize, eps)


def _positives(z: Tensor) -> Tensor:
    """The products of each row of z (V, N, D) with the other views of its sample: (V - 1, V, N).

    The products of each pair of views are computed once.
    """
    views = z.unbind()
    count = len(views)
    pairs = {(v, w): row_products(views[v], views[w]) for v in range(count) for w in range(v + 1, count)}
    rows = [[pairs[min(v, w), max(v, w)] for w in range(count) if w != v] for v in range(count)]
    return torch.stack([torch.stack(row) for row in rows], 1)


def _loss(positives: Tensor, against: Tensor, inside: bool, decoupled: bool) -> Tensor:
    """The loss of each row.

    `positives` (P, ...) are the logits of its positives, and `against` (...) is the logsumexp of its negatives' logits.
    """
    together = positives.logsumexp(0)
    target = together if inside else positives.mean(0)
    return against - target if decoupled else cross_entropy(together, against) + (together - target)


class NTXentLoss(nn.Module):
    """`nt_xent_loss` as a module, which stores the settings. The temperature may be an `nn.Parameter`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        inside: bool = False,
        decoupled: bool = False,
        normalize: bool = True,
        eps: float | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check_settings(temperature, inside, decoupled, normalize, eps, None)
        ranks.peers_of(group)
        self.temperature, self.inside, self.decoupled = temperature, inside, decoupled
        self.normalize, self.eps, self.group = normalize, eps, group

    def forward(
        self, a: Tensor, b: Tensor, *, others: Sequence[Tensor] = (), negatives: Tensor | None = None
    ) -> Tensor:
        return nt_xent_loss(
            a,
            b,
            self.temperature,
            others=others,
            inside=self.inside,
            negatives=negatives,
            decoupled=self.decoupled,
            normalize=self.normalize,
            eps=self.eps,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, inside={self.inside}, decoupled={self.decoupled}, "
            f"normalize={self.normalize}{shown_last(self.eps, self.group)}"
        )
