"""A weight and its optimizer state, moved by the factors of its gradient, in plain torch. It defines what the kernels
of other back-ends compute. The gradient is P = dy' x, for dy (N, q) and x (N, p)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import without_autocast


def _product(w: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    with without_autocast(w):
        return dy.mT.to(w.dtype) @ x.to(w.dtype)


def _square(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, dtype=torch.float64).square()


def factored_momentum_(w: Tensor, m: Tensor | None, dy: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
    """Replace m (q, p) by a m + b P + c w, and then w (q, p) by d w + e m + f P, where the w of the first sum is the
    old one and the m of the second is the new one. Without m, the second sum has no m. Return the squared norm of the
    new w, (), float64.

    w and m are contiguous and have one dtype, float32 or float64. dy and x are contiguous and have one dtype: that of
    w, bfloat16 or float16. `coefficients` are a, b, c, d, e, f, (6,), in the dtype of w and on its device.
    """
    a, b, c, d, e, f = coefficients.unbind()
    product = _product(w, dy, x)
    if m is None:
        w.copy_(d * w + f * product)
    else:
        m.copy_(a * m + b * product + c * w)
        w.copy_(d * w + e * m + f * product)
    return _square(w)


def factored_adam_(
    w: Tensor, m: Tensor, v: Tensor, highest: Tensor | None, dy: Tensor, x: Tensor, coefficients: Tensor
) -> Tensor:
    """Move w by the rule of AdamW, with the gradient g = s P. Return the squared norm of the new w, (), float64.

        m <- m + (1 - beta1) (g - m)
        v <- beta2 v + (1 - beta2) g^2
        u = v, or with AMSGrad u = highest <- max(highest, v)
        w <- d w - step m / (sqrt(u) r + eps)

    `coefficients` are s, 1 - beta1, beta2, 1 - beta2, d, step, r, eps, (8,). A maximum with NaN is NaN. The rest is as
    in `factored_momentum_`; v and `highest` are like m.
    """
    s, one_beta1, beta2, one_beta2, d, step, r, eps = coefficients.unbind()
    g = s * _product(w, dy, x)
    m.add_(one_beta1 * (g - m))
    v.copy_(beta2 * v + one_beta2 * g.square())
    u = v if highest is None else torch.maximum(highest, v, out=highest)
    w.copy_(d * w - step * m / (u.sqrt() * r + eps))
    return _square(w)
