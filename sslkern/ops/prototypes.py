"""Cross-entropies between softmaxes over K prototypes, without the N x K matrix of the logits.

With features x_i and prototypes w_j as rows, the logits are t_ij = <x_i, w_j>, where the caller has divided x by the
temperature. The targets q_ij are softmaxes of other logits, and are fixed:

    p_ij = exp(t_ij - l_i),  l_i = log sum_j exp(t_ij)
    loss_i = -sum_j q_ij log p_ij = l_i - sum_j q_ij t_ij        if sum_j q_ij = 1
    g_ij   = d loss_i / d t_ij = p_ij - q_ij
    dx_i   = sum_j g_ij w_j,  dw_j = sum_i g_ij x_i

A block of rows has all it needs of its loss and of its gradient, so both are computed at once, from one product x w'
and two products with g. The gradients with respect to x and w, which are as large as these, are kept for the backward.

Codes by Sinkhorn's algorithm are softmaxes too. From the kernel E_ij = exp(s_ij), each iteration scales the columns to
the sum 1/K and then the rows to the sum 1/N:

    a_j <- 1 / (K sum_i E_ij b_i),  b_i <- 1 / (N sum_j a_j E_ij),  with b_i = 1 at first

The result N a_j E_ij b_i of the last row step is softmax_j(s_ij + log a_j), so only the K potentials log a are kept.
Since a_j E_ij b_i = softmax_j(s_ij + log a_j) / N, the next column step needs the column sums of this softmax alone:

    log a_j <- log a_j - log sum_i softmax_j(s_ij + log a_j)   up to a constant, which no softmax depends on

The first step is a log-sum-exp over rows, and every further iteration is one pass over blocks of rows. Nothing can
underflow: after a column step some entry of column j is at least 1/(KN) and no entry of its row exceeds 1/K, so the
softmax is at least 1/(KN) there, for any temperature.

These functions are plain torch. Compilers do not trace the loops over the blocks: they see one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.autograd import Op, differentiated, first_order, intermediate, opaque, or_zeros, scaled
from ..core.dtypes import without_autocast
from ..core.ranks import Batch, JointBatch
from . import _prototype_blocks as blocks
from .matrix_product import product
from .pairs import reduce_pairs

_library = torch.library.Library("sslkern_prototypes", "DEF")


def _each_slice(kernel: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """The vmap rule of the operators: one call for each slice."""
    slices = []
    for k in range(info.batch_size):
        each = (
            x.select(dim, k) if isinstance(x, Tensor) and dim is not None else x
            for x, dim in zip(args, in_dims, strict=True)
        )
        slices.append(kernel(*each))
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    return tuple(map(torch.stack, zip(*slices, strict=True))), (0,) * len(slices[0])


def _fake_cross_entropy(
    x: Tensor, w: Tensor, y: Any, v: Any, bias: Any, ratio: Any, t: Any, pairs: Any, rows: Any, h: Any, *needs: bool
) -> tuple[Tensor, ...]:
    grads = (z.new_empty(z.shape if need else 0) for z, need in zip((x, w), needs, strict=True))
    return (x.new_empty(()), *grads)


_softmax_sums = opaque(
    _library,
    "softmax_sums(Tensor x, Tensor w, Tensor? bias) -> Tensor",
    blocks.softmax_sums,
    lambda x, w, bias: x.new_empty(w.shape[0]),
    _each_slice,
)
_potentials = opaque(
    _library,
    "potentials(Tensor t, Tensor? ratio, int iterations, bool rows_first) -> Tensor",
    blocks.potentials,
    lambda t, ratio, iterations, rows_first: t.new_empty(t.shape[-1]),
    _each_slice,
)
_cross_entropy = opaque(
    _library,
    "cross_entropy(Tensor x, Tensor w, Tensor? y, Tensor? v, Tensor? bias, Tensor? ratio, Tensor? logits,"
    " float[] pairs, Tensor? row_weights, Tensor? slope, bool need_x, bool need_w) -> (Tensor, Tensor, Tensor)",
    blocks.cross_entropy,
    _fake_cross_entropy,
    _each_slice,
)


class _CrossEntropy(Op):
    @staticmethod
    def forward(x, w, y, v, bias, ratio, logits, row_weights, slope, pairs, need_x, need_w):
        return _cross_entropy(x, w, y, v, bias, ratio, logits, pairs, row_weights, slope, need_x, need_w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output)
        intermediate(ctx, *output[1:])

    @staticmethod
    @first_order
    def backward(ctx, grad, *_):
        loss, *grads = ctx.saved_tensors
        grad, needed = or_zeros(grad, loss), ctx.needs_input_grad
        return (*(scaled(g, grad) if need else None for g, need in zip(grads, needed[:2], strict=True)), *(None,) * 10)


def cross_entropy(
    x: Tensor,
    w: Tensor,
    y: Tensor | None,
    v: Tensor | None,
    pairs: list[list[float]],
    *,
    bias: Tensor | None = None,
    ratio: Tensor | None = None,
    logits: Tensor | None = None,
    row_weights: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """sum_i r_i sum_st pairs[s][t] CE(q^t_i, p^s_i), with p^s = softmax(x_s w') and q^t = softmax(y_t v' + bias_t).

    Only x and w have gradients. All tensors have been checked and have one dtype, float32 or float64.

    Args:
        x: (V, n, D). w: (K, D).
        y, v: (U, n, E) and (K, E). If both are None, the targets come from the logits of the first U views of x, which
            are not computed again: q^t = softmax(ratio x_t w' + bias_t).
        pairs: V lists of U weights >= 0.
        bias: (U, K). ratio: (), needed where y is None.
        logits: the products x w', (V, n, K), if they are at hand.
        row_weights: the weights r_i, (n,); by default 1.
        slope: (K,) numbers h. The gradients become those of the loss + sum_s sum_i sum_j h_j p^s_ij, while the value
            stays the loss. It does not go with `row_weights`.
    """
    flat = [weight for row in pairs for weight in row]
    fixed = (None if z is None else z.detach() for z in (y, v, bias, ratio, logits, row_weights, slope))
    return _CrossEntropy.apply(x, w, *fixed, flat, differentiated(x), differentiated(w))[0]


@torch.no_grad()
def few_logits(x: Tensor, w: Tensor) -> Tensor | None:
    """The products x w' (..., N, K), to be computed once, if they are so few that they may be kept. Else None."""
    if not blocks.may_keep(x.shape[:-1].numel(), w.shape[0]):
        return None
    with without_autocast(x):
        return product(x, w.mT)


@torch.no_grad()
def sinkhorn_potentials(
    x: Tensor,
    w: Tensor,
    iterations: int,
    batch: Batch,
    *,
    rows_first: bool = False,
    logits: Tensor | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """The potentials log a (K,) after so many iterations of Sinkhorn's algorithm on exp(ratio <x_i, w_j>).

    Args:
        x: (n, D), the rows of this rank. w: (K, D). ratio: (), by default 1.
        iterations: at least 1.
        batch: the ranks whose rows are assigned together.
        rows_first: begin with a row step, and so with the columns of a softmax.
        logits: what `few_logits` returned for x and w.
    """
    rows = x.shape[0]
    if not isinstance(batch, JointBatch) and blocks.one_exponential(rows, w.shape[0], iterations):
        logits = few_logits(x, w) if logits is None else logits
        if logits is not None:
            return _potentials(logits, ratio, iterations, rows_first)
    x = x if ratio is None else x * ratio
    left, right = x, w
    if rows_first:  # the log of the softmax is a product of rows with one more column
        left = torch.cat([x, -reduce_pairs(x, w, 1.0)[:, None]], 1)
        right = torch.cat([w, w.new_ones(w.shape[0], 1)], 1)
    columns = reduce_pairs(right, left, 1.0) if rows else w.new_full(w.shape[:1], -torch.inf)
    bias = -batch.log_summed(columns)
    for _ in range(iterations - 1):
        bias = bias - batch.summed(softmax_sums(x, w, bias)).log()
    return bias


def softmax_sums(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """sum_i softmax_j(<x_i, w_j> + bias_j), (K,), without a gradient."""
    return _softmax_sums(x.detach(), w.detach(), bias)
