"""The loss of a low-rank model of a matrix or of a 3-way tensor, without forming the model or the residual."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..backend import declare, pick
from ..core import checks
from ..core.autograd import Op, differentiated, first_order, intermediate
from ..core.dtypes import accumulation_dtype, short
from ..reference import low_rank_residual as _reference

Loss = Literal["l2", "l1", "huber", "poisson"]
_LOSSES = get_args(Loss)
_NARROW = 32  # a mode with fewer elements does not fill the tiles of a kernel as columns

declare(
    "low_rank_residual(Tensor u, Tensor v, Tensor m, Tensor? mask, str loss, float setting, bool need_u, bool need_v)"
    " -> (Tensor, Tensor, Tensor)",
    _reference.low_rank_residual,
    dtypes=(torch.float32, torch.float64),  # the caller converts the factors to one of them
)


class _Residual(Op):
    """The gradients are computed in the forward, from the same block of the residual as the loss."""

    @staticmethod
    def forward(u, v, w, m, mask, loss, setting, needs):
        if w is None:
            return *pick("low_rank_residual", u)(u, v, m, mask, loss, setting, *needs[:2]), u.new_empty(0)
        return _three_way((u, v, w), m, mask, loss, setting, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.needs = inputs[-1]
        ctx.save_for_backward(*output[1:], *inputs[:3])  # the factors, for the error of a second derivative
        intermediate(ctx, *output[1:])

    @staticmethod
    @first_order
    def backward(ctx, grad, *_):
        each = zip(ctx.saved_tensors[:3], ctx.needs, strict=True)
        grads = (None if grad is None or not need else grad[..., None, None] * saved for saved, need in each)
        return *grads, None, None, None, None, None


def _three_way(factors, m, mask, loss, setting, needs):
    """The CP form by products of matrices: for some of the first mode's elements at a time, m has the columns of the
    third mode, and the rows of u and v, multiplied with each other, are the left factor."""
    order = _modes(m)
    m, mask = (None if x is None else _permuted(x, order) for x in (m, mask))
    u, v, w = (factors[k] for k in order)
    need_u, need_v, need_w = (needs[k] for k in order)
    (i, j), dims = m.shape[-3:-1], m.dim() - 3
    rows = _rows_at_once(m, u.shape[-1])
    step = 1 if rows < j else rows // j
    parts = []
    for start in range(0, i, step):
        count = step if start + step <= i else i - start
        own, some = u.narrow(-2, start, count)[..., :, None, :], m.narrow(-3, start, count)
        kept = None if mask is None else mask.narrow(-3, start, count).flatten(dims, dims + 1)
        left = (own * v[..., None, :, :]).flatten(dims, dims + 1)
        value, of_left, of_w = pick("low_rank_residual", u)(
            left, w, some.flatten(dims, dims + 1), kept, loss, setting, need_u or need_v, need_w
        )
        of_u = of_v = u.new_empty(0)
        if need_u or need_v:
            of_left = of_left.unflatten(-2, (count, j))
            of_u = (of_left * v[..., None, :, :]).sum(-2) if need_u else of_u
            of_v = (of_left * own).sum(-3) if need_v else of_v
        parts.append((value, of_u, of_v, of_w))
    values, of_u, of_v, of_w = zip(*parts, strict=True)
    by_mode = dict(zip(order, (torch.cat(of_u, -2) if need_u else of_u[0], sum(of_v), sum(of_w)), strict=True))
    return sum(values), by_mode[0], by_mode[1], by_mode[2]


def _modes(m: Tensor) -> list[int]:
    """The modes of a tensor, the one that gives the columns last: the mode whose elements are next to each other in
    memory, if it is not narrow, or else one that is not narrow."""
    for adjacent in (True, False):
        for k in (2, 1, 0):
            if m.shape[k - 3] >= _NARROW and (m.stride(k - 3) == 1 or not adjacent):
                return [*(mode for mode in range(3) if mode != k), k]
    return [0, 1, 2]


def _rows_at_once(m: Tensor, r: int) -> int:
    """Rows of the left factor, which then takes about a thirtieth of the memory of m."""
    rows = m.shape[-3:].numel() // (32 * r)
    return 256 if rows < 256 else 8192 if rows > 8192 else rows


def _permuted(x: Tensor, order: list[int]) -> Tensor:
    return x.permute(*range(x.dim() - 3), *(x.dim() - 3 + k for k in order))


def low_rank_residual(
    m: Tensor,
    u: Tensor,
    v: Tensor,
    w: Tensor | None = None,
    *,
    loss: Loss = "l2",
    mask: Tensor | None = None,
    delta: float = 1.0,
    eps: float = 1e-3,
) -> Tensor:
    r"""The loss of a low-rank model of a matrix, or of a 3-way tensor, summed over the elements.

        matrix        t_ij = sum_k u_ik v_jk                 loss = sum_ij rho(m_ij, t_ij)
        3-way (CP)    t_ijl = sum_k u_ik v_jk w_lk           loss = sum_ijl rho(m_ijl, t_ijl)

        l2            rho(m, t) = (t - m)^2
        l1            rho(m, t) = |t - m|
        huber         rho(m, t) = (t - m)^2 / 2 if |t - m| <= delta, else delta (|t - m| - delta / 2)
        poisson       rho(m, t) = t - m log t, for t >= eps: the negative log-likelihood of counts m at rates t, up to
                      log m!. Below eps, the rate is eps, and the logarithm continues along its tangent.

    The loss and its gradients are computed in one sweep over m, block by block. Nothing of the size of m is formed: not
    the model, not the residual, and not a gradient. The squares are sums of squared residuals; they are not expanded
    into products of the factors, which would lose all digits of a small residual.

    Args:
        m: the data, (..., N, P), or (..., I, J, L) if `w` is given. float32, bfloat16, float16 or float64; any strides.
            It has no gradient.
        u, v: the factors, (..., N, R) and (..., P, R), or (..., I, R) and (..., J, R), with the leading dimensions and
            the device of m, in any of these dtypes.
        w: None, or the third factor, (..., L, R), of the CP form.
        loss: one of the losses above.
        mask: None, or a bool tensor whose shape broadcasts to that of m. Elements where it is False do not count, and
            may be NaN.
        delta: the residual, in units of m, at which "huber" turns from squares to absolute values; a number > 0.
        eps: the least rate of "poisson", in units of m; a number > 0.

    Returns:
        The loss, (...), in float32, or in float64 if m or a factor is float64. It is differentiable once with respect
        to the factors.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices do not fit, m requires a
        gradient, the loss is unknown, or a setting is not a number > 0.

    Source: Saragadam et al., DeepTensor: low-rank tensor decomposition with deep network priors (2204.03145).
    """
    checks.one_of("loss", loss, _LOSSES)
    modes = 2 if w is None else 3
    checks.matrix_stack("m", m, min_rows=1)
    if m.dim() < modes or m.numel() == 0:
        shape = "(..., N, P)" if w is None else "(..., I, J, L)"
        raise ValueError(f"m must have shape {shape} with at least one element, got {tuple(m.shape)}.")
    factors = [u, v] if w is None else [u, v, w]
    for k, (name, factor) in enumerate(zip("uvw", factors, strict=False)):
        _check_factor(name, factor, m, modes, m.shape[k - modes], u)
    if m.requires_grad:
        raise ValueError("m must not require a gradient, because low_rank_residual has none for it: pass m.detach().")
    if mask is not None:
        mask = _expanded(mask, m)
    setting = {"huber": ("delta", delta), "poisson": ("eps", eps)}.get(loss)
    number = 1.0 if setting is None else checks.positive_number(*setting)
    dtype = accumulation_dtype(m, *factors)
    needs = tuple(differentiated(factor) for factor in factors)
    factors = [factor.to(dtype).contiguous() for factor in factors]
    if w is None:
        return _Residual.apply(*factors, None, m, mask, loss, number, (*needs, False))[0]
    return _Residual.apply(*factors, m, mask, loss, number, needs)[0]


def _check_factor(name: str, factor: Tensor, m: Tensor, modes: int, rows: int, u: Tensor) -> None:
    checks.matrix_stack(name, factor, min_rows=1)
    if factor.shape[:-1] != (*m.shape[:-modes], rows) or factor.shape[-1] != u.shape[-1]:
        expected = ", ".join(map(str, (*m.shape[:-modes], rows, "R" if factor is u else u.shape[-1])))
        raise ValueError(f"{name} must have shape ({expected}) for m of {tuple(m.shape)}, got {tuple(factor.shape)}.")
    checks.beside(name, factor, "m", m)


def _expanded(mask: Tensor, m: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = short(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool torch.Tensor, got {kind}.")
    checks.beside("mask", mask, "m", m)
    fits = mask.dim() <= m.dim()
    for size, n in zip(mask.shape[::-1], m.shape[::-1], strict=False):
        fits = fits and (size == 1 or size == n)
    if not fits:
        raise ValueError(f"mask must broadcast to the shape of m, {tuple(m.shape)}, got {tuple(mask.shape)}.")
    return mask.expand(m.shape)
