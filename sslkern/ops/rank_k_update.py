"""Rank-k updates of orthogonal and unitary matrices that keep them orthogonal or unitary, in O(k N^2)."""

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
    """A vmap rule like `stacked`, for a kernel that writes `u` in place. If `u` is not laid out as a stack, a copy is
    updated and copied back."""
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

    E = a b^H is the step, such as -lr times a rank-k gradient. For a complex U, torch's `.grad` is the direction of
    ascent, so a step of descent is along its negative. The retractions replace U by

        direct    the polar factor of U + E: the matrix with orthonormal columns that is nearest to U + E
        tangent   U exp((U^H E - E^H U) / 2), for square matrices only
        cayley    (I - S / 2)^-1 (I + S / 2) U with S = P E U^H - U E^H P, P = I - U U^H / 2

    U + E - U (U^H E + E^H U) / 2 is U moved by the projection of E onto the tangent space. All three retractions agree
    with it up to O(|E|^2). cayley and tangent agree with each other up to O(|E|^3). A step of zero leaves U as it is.

    An update takes two passes over U, 10 k n p multiplications and additions (four times as many if complex), and no
    n x p temporary. It needs no eigenvectors and no QR decomposition, so a and b may have zero or parallel columns. The
    accuracy of the direct form depends on the condition number of U + E. If U + E is singular, there is no nearest
    matrix: kernels return NaN, and the reference raises an error of torch.linalg. In float32, rounding moves U away
    from orthogonality by about 4e-8 sqrt(steps). `sslkern.optim.reorthogonalize_` corrects this.

    Args:
        u: the matrix U, (..., n, p), n >= p, with orthonormal columns; float32, float64, complex64 or complex128, any
            strides. If it is not contiguous, a copy is updated and copied back.
        a, b: tensors of shape (..., n, k) and (..., p, k), with the leading dimensions, the dtype and the device of u.
        retraction: "tangent", "direct" or "cayley".

    Returns:
        u itself, updated.

    Raises:
        TypeError: an argument has another dtype (for a bfloat16 model, keep a float32 copy of u). ValueError: shapes do
        not fit, u has more columns than rows, u is not square with "tangent", or u is expanded. RuntimeError: u, a or b
        needs a gradient and gradients are enabled (use `torch.no_grad()`); or the GPU's shared memory has no room for
        this k. An A100 and its successors have room for k = 64.

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
