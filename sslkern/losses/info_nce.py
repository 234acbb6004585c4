"""InfoNCE: each query against all keys, as in CPC, MoCo, NNCLR and CLIP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import _checks
from ..ops._rows import check_eps, precision, unit_rows
from ..train import distributed
from ..train.distributed import Peers
from ._pairs import (
    against,
    converted,
    cross_entropy,
    inverse,
    least_rows,
    mean,
    row_products,
    shown,
    shown_last,
)


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
    group: distributed.Group = None,
) -> Tensor:
    r"""The cross-entropy of the key p(i) of query i among all M keys, without the N x M logits.

        t_ij = <q_i, k_j> / temperature, of L2-normalised rows
        loss = mean_i [log sum_j exp(t_ij) - t_ip(i)] = mean_i log(1 + sum_{j != p(i)} exp(t_ij - t_ip(i)))

    The second form is the one computed: it keeps its digits where the positives win and the loss is small.

    Args:
        q: (N, D) queries; float32, bfloat16, float16 or float64; any strides; N >= 1.
        k: (M, D) keys on q's device, in any of these dtypes. Without `positives`, M >= N and p(i) = i: further keys are
            negatives.
        temperature: a number other than 0, or a floating tensor of one element, with a gradient; dimensionless.
        scale: a number, or a floating tensor of one element, with a gradient; where given, it replaces 1 / temperature,
            as CLIP's exp(logit_scale).
        positives: int64 (N,), the p(i); with a group, places among the rank's own keys.
        symmetric: CLIP's loss, the mean of this one and that of the keys against the queries, from one pass; M = N.
        normalize: False takes the rows as they are.
        eps: rows of length below it are divided by it, as in `torch.nn.functional.normalize`: their gradient is at most
            1/eps times what it is for a row of length 1. By default 1e-12; for float16 rows 1e-3, by which the gradient
            of a row of zeros stays in float16's range.
        group: None, this process alone; "world", a torch.distributed.ProcessGroup, or
            `sslkern.train.distributed.over` of one. Each rank gives its own rows, equally many or not, or none, and the
            mean over the ranks of the losses is the loss of the joint batch; so gradients averaged over the ranks, as
            DistributedDataParallel does, are those of the joint batch.
            The keys travel, and the rank's queries meet those of all; M >= N then holds on each rank, and N and M may
            differ between ranks. Of `symmetric`, sums over columns are joined, 2 M numbers: no query travels.

    Returns:
        The loss, a scalar in float32, or in float64 if q or k is float64; so is all arithmetic.

    Raises:
        TypeError, ValueError: one sentence, before any work. The range of `positives` is looked at on a CPU only. With
        a group, bad input on one rank raises on all.

    Sources: van den Oord et al., CPC (1807.03748); Radford et al., CLIP (2103.00020).
    """
    peers = distributed.peers_of(group)

    def check() -> None:
        _check(q, k, positives, symmetric, least_rows(peers))
        _check_settings(temperature, scale, symmetric, normalize, eps, q)

    counts: tuple[int, ...] = ()
    if peers is None:
        check()
    else:
        counts, k_counts = distributed.rows_of_all(peers, check, q, k, least=1)
    dtype = precision(q, k)
    c = inverse(temperature, dtype) if scale is None else converted(scale, dtype)
    x, y = (unit_rows(z, dtype, eps) if normalize else z.to(dtype) for z in (q, k))
    keys = y
    if peers is not None:
        keys = distributed.own_first(y, k_counts, peers)
    if positives is None:
        positive = c * row_products(x, y[: x.shape[0]])
        negatives = against(x, keys, scale=c, mask="others", both_sides=symmetric)
    else:
        positive = c * row_products(x, F.embedding(positives, y))  # adds its gradient in a fixed order
        places = torch.arange(keys.shape[0], device=keys.device)
        negatives = against(x, keys, scale=c, mask="different", labels=(positives, places))
    if symmetric:
        rows, columns = negatives
        if peers is not None:
            columns = _own_columns(columns, counts, peers)
        over_rows, over_columns = (mean(cross_entropy(positive, side), counts, peers) for side in (rows, columns))
        return 0.5 * (over_rows + over_columns)
    return mean(cross_entropy(positive, negatives), counts, peers)


def _own_columns(columns: Tensor, counts: tuple[int, ...], peers: Peers) -> Tensor:
    """The logsumexp over the ranks of what each has of the columns, own ones first: those of this rank."""
    before = sum(counts[: peers.rank])
    columns = columns.roll(before, 0)
    top = distributed.all_reduce(columns.detach(), peers.name, "max")
    top = top.masked_fill(top == -torch.inf, 0)
    total = distributed.summed((columns - top).exp(), peers)
    none = total == 0  # the one row of a joint batch of one
    logs = (total.masked_fill(none, 1).log() + top).masked_fill(none, -torch.inf)
    return logs.narrow(0, before, counts[peers.rank])


def _check(q: Tensor, k: Tensor, positives: Tensor | None, symmetric: bool, least: int) -> None:
    _checks.matrix("q", q, least)
    _checks.matrix("k", k, least)
    _checks.beside("q", q, "k", k)
    shapes = f"got shapes {tuple(q.shape)} for q and {tuple(k.shape)} for k."
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must have the same columns (D), {shapes}")
    if symmetric and (q.shape[0] != k.shape[0] or positives is not None):
        raise ValueError(f"symmetric=True pairs row i of q with row i of k: no positives, as many rows, {shapes}")
    if positives is not None:
        _checks.indices("positives", positives, q, (q.shape[0],))
        if q.shape[0]:
            _checks.below("positives", positives, k.shape[0])
    elif k.shape[0] < q.shape[0]:
        raise ValueError(f"k must have a row for every row of q unless positives says which, {shapes}")


def _check_settings(
    temperature: object, scale: object, symmetric: object, normalize: object, eps: object, x: Tensor | None
) -> None:
    _checks.setting("temperature", temperature, x, zero=False)
    if scale is not None:
        _checks.setting("scale", scale, x)
    _checks.flag("symmetric", symmetric)
    _checks.flag("normalize", normalize)
    check_eps(eps)
    if eps is not None and not normalize:
        raise ValueError(f"eps is for normalize=True, which divides rows by their length, got eps={eps!r}.")


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
        eps: float | None = None,
        group: distributed.Group = None,
    ) -> None:
        super().__init__()
        _check_settings(temperature, scale, symmetric, normalize, eps, None)
        distributed.peers_of(group)
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
