"""Low-rank factors of a gradient, which is given as a dense matrix or as a product that is never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import HALF, double_dtype, short, without_autocast
from ..ops.skinny_products import skinny_products

Method = Literal["sketch", "columns", "svd"]
# maps (r, a) to (G r, G^H a); None stands for an r or an a without columns
_Products = Callable[[Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
# From this many elements on, `skinny_products` is faster on a CPU than two products. On a GPU it has not been timed; it
# reads G half as often if both products are needed, and as often if one is.
_LARGE = 1 << 17
_NOISE = 2.0**-10  # scale of the noise in a warm start, for new directions; costs 1e-6 of the energy


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
    r"""Low-rank factors of G: G ~ left right^H with right = G^H left, where left has orthonormal columns.

        sketch    left = orth(G R), an orthonormal basis of the columns of G R, where R is random or the warm start.
                  G is read twice
        columns   left = the `rank` largest left singular vectors of `samples` columns of G. Column j is drawn with
                  replacement with probability p_j = |g_j|^2 / |G|_F^2 (uniform if G is zero) and divided by sqrt(p_j)
                  (LinearTimeSVD)
        svd       left = the `rank` largest left singular vectors of G: the best approximation, in O(n p min(n, p))

    "sketch" is exact if the rank of G is at most `rank`. With `warm_start`, R is the given right factor with normalised
    columns, plus 2^-10 times a random matrix. If this is the right factor of the last step of an optimizer, each step
    is a step of power iteration, which is nearly as good as "svd" while gradients change slowly.

    No absolute constant is added anywhere, so with every method, scaling G scales the result by the same factor within
    the range of the dtype. G may be zero or rank-deficient. For a zero G, right is zero.

    With `u`, the factors approximate the Riemannian gradient, which is the part of G that is tangent at U:

        D = G - U (U^H G + G^H U) / 2

    At a stationary point D vanishes, but G does not. Factors of G would spend their rank on directions that do not move
    U, and descent would stop early. Short steps along -left left^H D descend. The sketch does not form D: it reads G
    twice and U four times, or G three times and U five times if n > p.

    Args:
        g: (..., n, p), real or complex, float32, float64, complex64 or complex128. bfloat16 and float16 are factored in
            float32.
        rank: k. Larger values are reduced to min(n, p), for which the factors are exact.
        method: "sketch", "columns" or "svd".
        warm_start: only for "sketch": the right factor of a similar matrix, (..., p, k), in the dtype of the result.
            Zero columns are replaced by random ones.
        generator: the generator of the random numbers, on the device of `g`. All matrices of a stack share the numbers.
        samples: only for "columns": the number of columns to draw. It is at least `rank`, which is also the default.
        u: None, or the matrix with orthonormal columns at which `g` is the gradient: (..., n, p), in the dtype of the
            result. "columns" and "svd" form D, in O(n p^2).

    Returns:
        The pair (left, right): left is (..., n, k), and right is (..., p, k).

    Raises:
        TypeError: another dtype. ValueError: wrong shapes, a rank below 1, or an argument of another method.
        torch.linalg.LinAlgError: for "columns" and "svd", `g` has NaN or infinity. "sketch" passes them on.

    Sources: Kiani et al., projUNN (2203.05483); for the warm start, Vogels et al., PowerSGD (1905.13727); for
    "columns", Drineas, Kannan and Mahoney, Fast Monte Carlo algorithms for matrices II (2006).
    """
    checks.one_of("method", method, get_args(Method))
    g = checks.matrices("g", g).detach()
    g = g.float() if g.dtype in HALF else g
    checks.positive("rank", rank)
    if samples is not None:
        checks.positive("samples", samples)
    k = min(rank, *g.shape[-2:])
    if method != "sketch" and warm_start is not None:
        raise ValueError(f"warm_start must be None for method {method!r}: only 'sketch' uses it.")
    if method != "columns" and samples is not None:
        raise ValueError(f"samples must be None for method {method!r}: only 'columns' uses it.")
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
        return left, (left.mH @ g).mH.resolve_conj().contiguous() * found[..., None, :k]  # repeated columns add no rank


@torch.no_grad()
def linear_factors(
    dy: Tensor,
    x: Tensor,
    rank: int,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""`low_rank_factors` of the gradient of the weight of a linear layer, without forming this gradient.

    With y = x U^T and U (n, p), the gradient of U is G = dy^T conj(x), a product over the m rows of dy and x. Its
    sketch of rank k, where R (p, k) is random or the warm start,

        left = orth(dy^T (conj(x) R)), right = x^T (conj(dy) left)

    takes 4 k m (n + p) multiplications and additions and forms no n x p matrix. For the same random numbers or warm
    start, it equals the sketch of the dense G. This function serves only steps along the gradient itself, because a
    momentum buffer is not a product of this form.

    Args:
        dy: (..., m, n), the gradient of y, as torch passes it to a backward. The leading dimensions are the leading
            dimensions of U; batch dimensions must be flattened into m.
        x: (..., m, p), the input of the layer, with the dtype and the device of `dy`.
        rank, warm_start, generator, u: as in `low_rank_factors`.

    Returns:
        The pair (left, right): left is (..., n, k), and right is (..., p, k). `rank_k_update_(u, -lr * left, right)` is
        a step of gradient descent.

    Raises:
        TypeError: another dtype, or `dy` and `x` have different dtypes. ValueError: wrong shapes, different devices, or
        a rank below 1.

    Sources: the same as for `low_rank_factors`.
    """
    dy, x = checks.matrices("dy", dy).detach(), checks.matrices("x", x).detach()
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy and x must have shapes (..., m, n) and (..., m, p) that differ only in the last dimension, got "
            f"{tuple(dy.shape)} and {tuple(x.shape)}."
        )
    if dy.dtype != x.dtype:
        raise TypeError(f"dy and x must have the same dtype, got {short(dy.dtype)} and {short(x.dtype)}.")
    if dy.device != x.device:
        raise ValueError(f"dy and x must be on the same device, got {dy.device} and {x.device}.")
    checks.positive("rank", rank)
    dy, x = (t.float() if t.dtype in HALF else t for t in (dy, x))
    k = min(rank, dy.shape[-1], x.shape[-1])
    if u is not None:
        _check_point(u, (*dy.shape[:-2], dy.shape[-1], x.shape[-1]), dy.dtype)
    with without_autocast(dy):
        return sketch(linear_products(dy, x), u, dy, x.shape[-1], k, warm_start, generator)


def linear_products(dy: Tensor, x: Tensor) -> _Products:
    """A function that computes G r and G^H a for G = dy^T conj(x), without forming G."""
    none = dy.new_empty(0)

    def products(r: Tensor | None, a: Tensor | None) -> tuple[Tensor, Tensor]:
        return none if r is None else dy.mT @ (x.conj() @ r), none if a is None else x.mT @ (dy.conj() @ a)

    return products


def _products(g: Tensor) -> _Products:
    """A function that computes G r and G^H a for a dense G."""
    if g.device.type in ("cpu", "cuda") and g.shape[-2] * g.shape[-1] >= _LARGE:
        g = g.contiguous()  # once, for all products
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
    """left = orth(G R) and right = G^H left, computed from products with G. With `u`, D takes the place of G.

    The leading dimensions, the dtype and the device are those of the tensor `like`.
    """
    # torch.randn takes a generator or symbolic sizes, but not both
    start = like.new_empty(p, k).normal_(generator=generator) / max(p, 1) ** 0.5
    if warm_start is not None:
        expected = (*like.shape[:-2], p, k)
        if not isinstance(warm_start, Tensor) or warm_start.shape != expected or warm_start.dtype != like.dtype:
            found = f"{tuple(warm_start.shape)} of {warm_start.dtype}" if isinstance(warm_start, Tensor) else warm_start
            raise ValueError(f"warm_start must have shape {expected} and dtype {like.dtype}, got {found!s}.")
        norm = torch.linalg.vector_norm(warm_start, dim=-2, keepdim=True, dtype=double_dtype(like.dtype))
        norm = norm.clamp_min(torch.finfo(like.dtype).tiny).to(like.dtype.to_real())
        start = warm_start / norm + _NOISE * start
    if u is not None:
        products = _tangent(u, products)
    left = torch.linalg.qr(_unit(products(start, None)[0])).Q
    return left, products(None, left)[1]


def _tangent(u: Tensor, products: _Products) -> _Products:
    """A function that computes D r or D^H a for D = G - U (U^H G + G^H U) / 2, one of them per call.

    For a square U, it uses U U^H = I.
    """
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
    checks.orthonormal("u", u)
    if u.shape != shape or u.dtype != dtype:
        raise ValueError(
            f"u must have the gradient's shape {tuple(shape)} and dtype {short(dtype)}, got "
            f"{tuple(u.shape)} and {short(u.dtype)}."
        )


def _unit(x: Tensor) -> Tensor:
    """Divide each nonzero matrix by its largest absolute entry, so that squares neither underflow nor overflow."""
    if x.numel() == 0:
        return x
    scale = x.abs().amax((-2, -1), keepdim=True)
    return x / torch.where(scale > 0, scale, 1)


def _columns(g: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Draw columns of g, (..., n, samples): column j with probability p_j = |g_j|^2 / |g|_F^2, divided by sqrt(p_j)."""
    weights = torch.linalg.vector_norm(g, dim=-2, dtype=double_dtype(g.dtype)).square()
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total > 0, weights / total, 1 / max(g.shape[-1], 1))
    steps = weights.cumsum(-1)
    draws = torch.rand(samples, dtype=steps.dtype, device=g.device, generator=generator) * steps[..., -1:]
    index = torch.searchsorted(steps, draws.contiguous(), right=True).clamp_max(g.shape[-1] - 1)
    scale = weights.gather(-1, index).sqrt().to(g.dtype.to_real())
    return g.gather(-1, index[..., None, :].expand(*g.shape[:-1], samples)) / scale[..., None, :]
