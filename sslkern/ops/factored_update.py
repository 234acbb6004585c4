"""A weight and its optimizer state, moved by the factors of its gradient, which is not formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from ..backend import declare, pick
from ..core import checks
from ..core.autograd import differentiated
from ..core.dtypes import HALF, short
from ..reference import factored_update as _reference

Rule = Literal["momentum", "adam"]
_STATES = {"momentum": (0, 1), "adam": (2, 3)}  # the least and the most tensors of the state
_COEFFICIENTS = {"momentum": 6, "adam": 8}
_DTYPES = (torch.float32, torch.float64)


def _no_vmap(*_: Any) -> NoReturn:
    raise NotImplementedError("factored_update_ takes one weight, not a stack: it does not run inside torch.vmap.")


declare(
    "factored_momentum_(Tensor(a!) w, Tensor(b!)? m, Tensor dy, Tensor x, Tensor coefficients) -> Tensor",
    _reference.factored_momentum_,
    _no_vmap,
    _DTYPES,
)
declare(
    "factored_adam_(Tensor(a!) w, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? highest, Tensor dy, Tensor x,"
    " Tensor coefficients) -> Tensor",
    _reference.factored_adam_,
    _no_vmap,
    _DTYPES,
)


def factored_update_(
    w: Tensor,
    state: Sequence[Tensor],
    dy: Tensor,
    x: Tensor,
    coefficients: Tensor,
    rule: Rule = "momentum",
) -> Tensor:
    r"""Move a weight W and its optimizer state in place by the gradient P = dy' x, in one pass, without forming P.

    The gradient of the weight of a linear layer y = x W' is dy' x, of rank N at most for a batch of N rows. Each tile
    of P is computed where the tiles of W and of the state are read, moved and written.

        "momentum"   m <- a m + b P + c W                     state: (m,)
                     W <- d W + e m + f P                     with the new m; without a state, W <- d W + f P
        "adam"       m <- m + (1 - beta1) (s P - m)           state: (m, v), or (m, v, h) with AMSGrad
                     v <- beta2 v + (1 - beta2) (s P)^2
                     h <- max(h, v)                           with AMSGrad; u is h, and otherwise v
                     W <- d W - step m / (sqrt(u) r + eps)

    SGD with momentum mu, dampening tau, decay lambda and step lr is a = mu, b = 1 - tau, c = (1 - tau) lambda, d = 1,
    e = -lr and f = 0. `sslkern.optim` has SGD, LARS and AdamW in this form.

    Args:
        w: the weight W, (q, p), contiguous, float32 or float64.
        state: the tensors of the state, with the shape, dtype and device of w, contiguous.
        dy: the gradient of y, (N, q), in the dtype of w, bfloat16 or float16; any strides. N = 0 stands for P = 0.
        x: the input of the layer, (N, p), in the dtype of dy; any strides.
        coefficients: (6,) for "momentum": a, b, c, d, e, f; (8,) for "adam": s, 1 - beta1, beta2, 1 - beta2, d, step,
            r, eps. In the dtype of w and on its device.
        rule: "momentum" or "adam".

    Returns:
        The squared norm of the new W, (), float64: the next step of LARS needs it.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes, strides or devices do not fit.
        RuntimeError: a tensor needs a gradient and gradients are enabled (use `torch.no_grad()`).

    Source: the identity of Xie et al., Distributed machine learning via sufficient factor broadcasting (1511.08486).
    """
    checks.one_of("rule", rule, tuple(_STATES))
    _check(w, state, dy, x, coefficients, rule)
    if differentiated(w, *state, dy, x, coefficients):
        raise RuntimeError("factored_update_ cannot be differentiated: call it under torch.no_grad().")
    slots = [*state, *[None] * (_STATES[rule][1] - len(state))]
    square: Tensor = pick(f"factored_{rule}_", w)(w, *slots, dy.contiguous(), x.contiguous(), coefficients)
    for t in (w, *state):
        torch.autograd.graph.increment_version(t)  # so that autograd notices if it has saved one of them
    return square


def _check(w: Tensor, state: Sequence[Tensor], dy: Tensor, x: Tensor, coefficients: Tensor, rule: str) -> None:
    least, most = _STATES[rule]
    if not least <= len(state) <= most:
        raise ValueError(f"state must have {least} or {most} tensors for {rule!r}, got {len(state)}.")
    for name, t in (("w", w), *((f"state[{k}]", t) for k, t in enumerate(state))):
        checks.matrix(name, t)
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32 or float64, got {short(t.dtype)}.")
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, because it is written in place, got strides {t.stride()}.")
        checks.same("w", w, name, t)
    for name, t, columns in (("dy", dy, w.shape[0]), ("x", x, w.shape[1])):
        checks.matrix(name, t, 0)
        if t.shape != (dy.shape[0], columns):
            raise ValueError(f"{name} must have shape ({dy.shape[0]}, {columns}), got {tuple(t.shape)}.")
        if t.dtype not in (w.dtype, *HALF) or t.dtype != dy.dtype:
            raise TypeError(
                f"dy and x must both be {short(w.dtype)}, bfloat16 or float16, got {short(dy.dtype)} and "
                f"{short(x.dtype)}."
            )
        checks.beside(name, t, "w", w)
    if coefficients.dtype != w.dtype or coefficients.shape != (_COEFFICIENTS[rule],):
        raise ValueError(
            f"coefficients must be {short(w.dtype)} of shape ({_COEFFICIENTS[rule]},) for {rule!r}, got "
            f"{short(coefficients.dtype)} of {tuple(coefficients.shape)}."
        )
    checks.beside("coefficients", coefficients, "w", w)
