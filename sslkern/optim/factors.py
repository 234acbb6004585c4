"""Low-rank factors of gradients, dense or never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..ops import _checks as _ops_checks
from ..ops.skinny_products import skinny_products
from ..reference.columns import without_autocast
from . import _checks

Method = Literal["sketch", "columns", "svd"]
# r, a -> G r and G^H a; None is no columns
_Products = Callable[[Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
_LARGE = 1 << 17  # numbers of a matrix on a CPU from which reading it once for both products pays for the call
_NOISE = 2.0**-10  # of a warm start: finds what the last gradient had not, at 1e-6 of the captured energy


@torch.no_grad()
def low_rank_factors(
    g: Tensor,
    rank: int,
    method: Method = "sketch",
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
    samples: int | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""G ~ left right^H = left left^H G, with orthonormal columns of left.

        sketch    left = orth(G R), R random, or the warm start: G is read twice
        columns   left = the `rank` largest left singular vectors of `samples` columns of G, drawn with replacement with
                  probabilities p_j = |g_j|^2 / |G|_F^2 and divided by sqrt(p_j) (LinearTimeSVD); uniform for a zero G
        svd       left = the `rank` largest left singular vectors of G: the best there is, at O(n p min(n, p))

    sketch is exact where the rank of G is not above `rank`. With `warm_start`, R is the last step's right factor, its
    columns normalised, plus 2^-10 of a random one; that is a step of power iteration per step of an optimizer, and
    nearly as good as svd while gradients change slowly. All are equivariant to the scale of G, as far as its dtype
    reaches: nothing absolute is added. Zero and rank-deficient matrices are as good as any: of a zero G, right is zero.

    With `u`, all this is of the part of G that is tangent at U, the Riemannian gradient

        D = G - U (U^H G + G^H U) / 2

    which vanishes at a stationary point, where G does not: factors of G then spend their rank on what moves nothing,
    and descent stops short. Short steps along -left left^H D descend. The sketch does not form D: it reads G twice
    and U four times, or G three times and U five where it is tall.

    Args:
        g: (..., n, p), real or complex, float32, float64, complex64 or complex128; bfloat16 and float16 are factored in
            float32.
        rank: k; above min(n, p), which is exact, it is taken for that.
        method: "sketch", "columns" or "svd".
        warm_start: (..., p, k) in the dtype of the result, for "sketch": the right factor of a similar matrix. Columns
            of zeros are random ones.
        generator: of random numbers, on the device of g; they are shared by all matrices of a stack.
        samples: columns to draw, for "columns"; None is `rank`, and fewer are taken for that.
        u: None, or the matrix with orthonormal columns that g is the gradient of, of g's shape and of the dtype of the
            result; "columns" and "svd" form D, at O(n p^2).

    Returns:
        left (..., n, k) and right (..., p, k).

    Raises:
        TypeError: other dtypes. ValueError: wrong shapes, a rank below 1, an argument of another method.
        torch.linalg.LinAlgError: NaN or infinity in g, from "columns" and "svd"; "sketch" passes them on.

    Source: Kiani et al., projUNN (2203.05483); the warm start: Vogels et al., PowerSGD (1905.13727); columns: Drineas,
    Kannan and Mahoney, Fast Monte Carlo algorithms for matrices II (2006).
    """
    _ops_checks.one_of("method", method, get_args(Method))
    g = _checks.matrices("g", g).detach()
    g = g.float() if g.dtype in _checks.HALF else g
    _ops_checks.positive("rank", rank)
    if samples is not None:
        _ops_checks.positive("samples", samples)
    k = min(rank, *g.shape[-2:])
    if method != "sketch" and warm_start is not None:
        raise ValueError(f"warm_start must be None for method {method!r}: only 'sketch' has one.")
    if method != "columns" and samples is not None:
        raise ValueError(f"samples must be None for method {method!r}: only 'columns' draws them.")
    if u is not None:
        _check_point(u, g.shape, g.dtype)
    with without_autocast(g):
        if method == "sketch":
            return sketch(_products(g), u, g, g.shape[-1], k, warm_start, generator)
        if u is not None:
            inner = u.mH @ g
            g = g - u @ (inner + inner.mH) / 2
        basis = _unit(g) if method == "svd" else _columns(_unit(g), max(samples or k, k), generator)
        left, sigma, _ = torch.linalg.svd(basis, full_matrices=False)
        left, found = left[..., :k], sigma > sigma[..., :1] * max(basis.shape[-2:]) * torch.finfo(g.dtype).eps
        return left, (left.mH @ g).mH.resolve_conj().contiguous() * found[..., None, :k]  # a column drawn twice is one


@torch.no_grad()
def linear_factors(
    dy: Tensor,
    x: Tensor,
    rank: int,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""`low_rank_factors` of the gradient of a linear layer's weight, which is never formed.

    With y = x U^T, the gradient of U (n, p) is G = dy^T conj(x), a product of rank m. Its sketch

        left = orth(dy^T (conj(x) R)), right = x^T (conj(dy) left)

    takes 4 k m (n + p) multiplications and additions and no n x p matrix, and for the same random numbers or warm start
    it is the one of the dense G. For steps along the gradient itself: momentum is no such product.

    Args:
        dy: (..., m, n), the gradient of y, as torch hands it to a backward; leading dimensions are those of U: flatten
            those of a batch into m.
        x: (..., m, p), the input of the layer, in the dtype and on the device of dy.
        rank, warm_start, generator, u: those of `low_rank_factors`.

    Returns:
        left (..., n, k) and right (..., p, k): `rank_k_update_(u, -lr * left, right)` is a step of gradient descent.

    Raises:
        TypeError: other dtypes, or two of them. ValueError: wrong shapes, or a rank below 1.

    Source: as for `low_rank_factors`.
    """
    dy, x = _checks.matrices("dy", dy).detach(), _checks.matrices("x", x).detach()
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy and x must have shapes (..., m, n) and (..., m, p) that agree but for the last dimension, got "
            f"{tuple(dy.shape)} and {tuple(x.shape)}."
        )
    if dy.dtype != x.dtype:
        raise TypeError(
            f"dy and x must have the same dtype, got {_ops_checks.short(dy.dtype)} and {_ops_checks.short(x.dtype)}."
        )
    if dy.device != x.device:
        raise ValueError(f"dy and x must be on the same device, got {dy.device} and {x.device}.")
    _ops_checks.positive("rank", rank)
    dy, x = (t.float() if t.dtype in _checks.HALF else t for t in (dy, x))
    k = min(rank, dy.shape[-1], x.shape[-1])
    if u is not None:
        _check_point(u, (*dy.shape[:-2], dy.shape[-1], x.shape[-1]), dy.dtype)
    with without_autocast(dy):
        return sketch(linear_products(dy, x), u, dy, x.shape[-1], k, warm_start, generator)


def linear_products(dy: Tensor, x: Tensor) -> _Products:
    """G r and G^H a of G = dy^T conj(x)."""
    none = dy.new_empty(0)

    def products(r: Tensor | None, a: Tensor | None) -> tuple[Tensor, Tensor]:
        return none if r is None else dy.mT @ (x.conj() @ r), none if a is None else x.mT @ (dy.conj() @ a)

    return products


def _products(g: Tensor) -> _Products:
    """G r and G^H a of a dense G."""
    if g.device.type == "cpu" and g.shape[-2] * g.shape[-1] >= _LARGE:
        return lambda r, a: skinny_products(g, r, a)
    none = g.new_empty(*g.shape[:-2], 0, 0)

    def small(r: Tensor | None, a: Tensor | None) -> tuple[Tensor, Tensor]:
        return none if r is None else g @ r, none if a is None else (a.mH @ g).mH.resolve_conj().contiguous()

    return small


def sketch(
    products: _Products,
    u: Tensor | None,
    like: Tensor,
    p: int,
    k: int,
    warm_start: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """orth(G R) and G^H orth(G R), by products with G; leading dimensions, dtype and device are those of `like`."""
    # not torch.randn, which takes a generator or symbolic sizes
    start = like.new_empty(p, k).normal_(generator=generator) / max(p, 1) ** 0.5
    if warm_start is not None:
        expected = (*like.shape[:-2], p, k)
        if not isinstance(warm_start, Tensor) or warm_start.shape != expected or warm_start.dtype != like.dtype:
            found = f"{tuple(warm_start.shape)} of {warm_start.dtype}" if isinstance(warm_start, Tensor) else warm_start
            raise ValueError(f"warm_start must have shape {expected} and dtype {like.dtype}, got {found!s}.")
        norm = torch.linalg.vector_norm(warm_start, dim=-2, keepdim=True, dtype=_checks.accumulation_dtype(like.dtype))
        norm = norm.clamp_min(torch.finfo(like.dtype).tiny).to(like.dtype.to_real())
        start = warm_start / norm + _NOISE * start
    if u is not None:
        products = _tangent(u, products)
    left = torch.linalg.qr(_unit(products(start, None)[0])).Q
    return left, products(None, left)[1]


def _tangent(u: Tensor, products: _Products) -> _Products:
    """Those of D = G - U (U^H G + G^H U) / 2, one at a time; where U is square, U U^H = I."""
    of_u, square = _products(u), u.shape[-2] == u.shape[-1]

    def times(r: Tensor) -> Tensor:
        gr, inner = products(r, of_u(r, None)[0])
        if square:
            return (gr - of_u(inner, None)[0]) / 2
        return gr - of_u(inner + of_u(None, gr)[1], None)[0] / 2

    def adjoint(a: Tensor) -> Tensor:
        ua = of_u(None, a)[1]
        inner, ga = products(ua, a)
        if square:
            return (ga - of_u(None, inner)[1]) / 2
        back, inner = of_u(ua, inner)
        return ga - (products(None, back)[1] + inner) / 2

    def both(r: Tensor | None, a: Tensor | None) -> tuple[Tensor, Tensor]:
        none = u.new_empty(0)
        return none if r is None else times(r), none if a is None else adjoint(a)

    return both


def _check_point(u: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _checks.orthonormal("u", u)
    if u.shape != shape or u.dtype != dtype:
        raise ValueError(
            f"u must have the gradient's shape {tuple(shape)} and dtype {_ops_checks.short(dtype)}, got "
            f"{tuple(u.shape)} and {_ops_checks.short(u.dtype)}."
        )


def _unit(x: Tensor) -> Tensor:
    """x over its largest entry, where that is not zero: squares neither vanish nor overflow."""
    if x.numel() == 0:
        return x
    scale = x.abs().amax((-2, -1), keepdim=True)
    return x / torch.where(scale > 0, scale, 1)


def _columns(g: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """(..., n, samples) columns of g, drawn by their squared norms and divided by the roots of their probabilities."""
    weights = torch.linalg.vector_norm(g, dim=-2, dtype=_checks.accumulation_dtype(g.dtype)).square()
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total > 0, weights / total, 1 / max(g.shape[-1], 1))
    steps = weights.cumsum(-1)
    draws = torch.rand(samples, dtype=steps.dtype, device=g.device, generator=generator) * steps[..., -1:]
    index = torch.searchsorted(steps, draws.contiguous(), right=True).clamp_max(g.shape[-1] - 1)
    scale = weights.gather(-1, index).sqrt().to(g.dtype.to_real())
    return g.gather(-1, index[..., None, :].expand(*g.shape[:-1], samples)) / scale[..., None, :]
