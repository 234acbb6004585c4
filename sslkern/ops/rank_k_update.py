"""Rank-k updates in O(k N^2) that keep orthogonal and unitary matrices so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..backend import declare, pick
from ..core import checks
from ..core.autograd import differentiated, stacked
from ..core.dtypes import FULL
from ..reference import rank_k_update as _reference

Retraction = Literal["tangent", "direct", "cayley"]
_RETRACTIONS = get_args(Retraction)
_NUMBERS = {
    "tangent": _reference.TANGENT,
    "direct": _reference.DIRECT,
    "cayley": _reference.CAYLEY,
}


def _in_place(
    kernel: Callable, info: Any, in_dims: tuple[Any, ...], u: Tensor, a: Tensor, b: Tensor, *rest: Any
) -> Any:
    """`stacked` for an argument that is written in place: copied back if it is not laid out as a stack."""
    if in_dims[0] is None:
        raise ValueError("u must be mapped by torch.vmap where a or b is: it has one value for each of theirs.")
    u = u.movedim(in_dims[0], 0)
    target = u.contiguous()
    stacked()(lambda *args: kernel(target, *args) or (), info, in_dims[1:], a, b, *rest)
    if target is not u:
        u.copy_(target)
    return None, None


declare(
    "rank_k_update_(Tensor(a!) u, Tensor a, Tensor b, int retraction) -> ()",
    _reference.rank_k_update_,
    _in_place,
    FULL,
)


def rank_k_update_(u: Tensor, a: Tensor, b: Tensor, retraction: Retraction = "tangent") -> Tensor:
    r"""Move U along a b^H, in place, and keep its columns orthonormal.

    E = a b^H is the step, such as -lr times a rank-k gradient (torch's complex `.grad` is the direction of ascent: its
    negative is that of descent).

        direct    the matrix with orthonormal columns nearest to U + E: its polar factor
        tangent   U exp((U^H E - E^H U) / 2), square matrices only
        cayley    (I - S / 2)^-1 (I + S / 2) U with S = P E U^H - U E^H P, P = I - U U^H / 2

    All three agree with U + E - U (U^H E + E^H U) / 2, the projection onto the tangent space, up to O(|E|^2), and
    cayley with tangent up to O(|E|^3). A zero step leaves U as it is.

    An update takes two passes over U, 10 k n p multiplications and additions (four times as many if complex), and no
    n x p temporary. It needs no eigenvectors and no QR, so a and b may have zero or parallel columns. The accuracy of
    the direct form depends on the condition number of U + E. If U + E is singular there is no nearest matrix: kernels
    return NaN, and the reference raises an error of torch.linalg. In float32, rounding moves U away from orthogonality
    by about 4e-8 sqrt(steps); `sslkern.optim.reorthogonalize_` corrects that.

    Args:
        u: (..., n, p), n >= p, float32, float64, complex64 or complex128, with orthonormal columns; any strides, with a
            copy if it is not contiguous.
        a: (..., n, k), b: (..., p, k), in dtype and on the device of u, with its leading dimensions.
        retraction: "tangent", "direct" or "cayley".

    Returns:
        u.

    Raises:
        TypeError: other dtypes; for a bfloat16 model, keep a float32 master of u. ValueError: wrong shapes, a wide u, a
        tall one with "tangent", an expanded one. RuntimeError: u, a or b needs a gradient and gradients are enabled
        (use `torch.no_grad()`); a GPU's shared memory has no room for this k, as it has for 64 on an A100 and its
        successors.

    Source: Kiani et al., projUNN: efficient method for training deep networks with unitary matrices (2203.05483).
    """
    checks.one_of("retraction", retraction, _RETRACTIONS)
    _check(u, a, b, retraction)
    if differentiated(u, a, b):
        raise RuntimeError("rank_k_update_ cannot be differentiated: call it under torch.no_grad().")
    if u.numel() == 0 or a.shape[-1] == 0:
        return u
    if u.is_contiguous() and not checks.lazy(u):
        target = u
    elif any(step == 0 and size > 1 for step, size in zip(u.stride(), u.shape, strict=True)):
        raise ValueError(f"u must have its own memory for each element, got an expanded tensor of {tuple(u.shape)}.")
    else:
        target = u.resolve_conj().resolve_neg().contiguous()
    pick("rank_k_update_", u)(target, a.contiguous(), b.contiguous(), _NUMBERS[retraction])
    if target is not u:
        u.copy_(target)
    else:
        torch.autograd.graph.increment_version(u)  # so that autograd notices if it has saved u
    return u


def _check(u: Tensor, a: Tensor, b: Tensor, retraction: str) -> None:
    checks.full("u", u, ": rounded to fewer digits it is no longer orthogonal")
    for name, value in (("a", a), ("b", b)):
        checks.full(name, value)
    n, p = u.shape[-2:]
    if n < p:
        raise ValueError(f"u must have at least as many rows as columns, got shape {tuple(u.shape)}.")
    if retraction == "tangent" and n != p:
        raise ValueError(f"u must be square for 'tangent', got shape {tuple(u.shape)}: use 'direct' or 'cayley'.")
    for name, value, rows in (("a", a, n), ("b", b, p)):
        checks.columns(name, value, rows, a.shape[-1], "u", u)
