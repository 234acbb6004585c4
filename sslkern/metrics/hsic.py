"""Statistical dependence by kernels: the Hilbert-Schmidt independence criterion, without a kernel matrix."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..ops import _checks
from ..ops.kernel_matmul import rbf_scale
from ..ops.pairwise_reduce import pairwise_reduce

Kernel = Literal["rbf", "linear"]
Estimator = Literal["biased", "unbiased"]
_MOST_ROWS = 1000  # of the median heuristic: half a million distances


def median_bandwidth(x: Tensor) -> Tensor:
    r"""The median heuristic: the median of |x_i - x_j| over the pairs i < j; the lower of the two middle ones.

    Exact up to 1000 rows; of more, over the 1000 evenly spaced rows floor(k N / 1000): the same ones every time. A
    median of 0 gives 1.

    Args:
        x: (..., N, D), float32, bfloat16, float16 or float64, any strides, N >= 2.

    Returns:
        (...), float32 (float64 for float64), in units of x, > 0, detached; NaN where a distance is.

    Raises:
        TypeError, ValueError: one sentence, before any work.

    Source: Gretton et al., A kernel two-sample test (2012), section 8.
    """
    _checks.matrix_stack("x", x, min_rows=2)
    n, d = x.shape[-2:]
    rows = x.detach().to(_result_dtype(x))
    if n > _MOST_ROWS:
        rows = rows[..., torch.arange(_MOST_ROWS, device=x.device) * n // _MOST_ROWS, :]
    # slice by slice: the distances of a stack of features together would outgrow everything else
    medians = [torch.pdist(part).median() for part in rows.reshape(-1, rows.shape[-2], d)]
    median = torch.stack(medians).view(x.shape[:-2]) if medians else rows.new_empty(x.shape[:-2])
    return torch.where(median == 0, 1, median)


def hsic(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = "rbf",
    estimator: Estimator = "biased",
    bandwidth: float | Tensor | tuple[Any, Any] | None = None,
) -> Tensor:
    r"""HSIC of the paired rows of x and y: 0 in expectation if they are independent, and, by "rbf", only then.

    With K and L the kernel matrices of x and y, rK and rL their row sums, and H = I - 11'/N:

        biased      Tr(KHLH)/(N-1)^2 = [sum K o L - (2/N) rK.rL + (sum K)(sum L)/N^2] / (N-1)^2
        unbiased    [sum K o L + (sum K)(sum L)/((N-1)(N-2)) - 2/(N-2) rK.rL] / (N(N-3)), with zeroed diagonals

        rbf         k(u, v) = exp(-|u - v|^2 / (2 bandwidth^2))
        linear      k(u, v) = <u, v>, whose biased HSIC is ||C_xy||_F^2, C_xy = Xc'Yc/(N-1)

    The sums of "rbf" are streamed, in O(N D) memory; "linear" takes the smaller of the cross-covariance and the two
    N x N Grams, in float64. Terms, which cancel, are combined in float64.

    Args:
        x: (..., N, D1), float32, bfloat16, float16 or float64, any strides; N >= 2, and N >= 4 when unbiased.
        y: (..., N, D2), of x's leading dimensions, N, dtype and device.
        kernel: "rbf" or "linear".
        estimator: "biased", which is >= 0, or "unbiased", which may be negative.
        bandwidth: for "rbf", in units of x and y: a number > 0, or a tensor of them that broadcasts to (...), with a
            gradient; or None for `median_bandwidth`; or a pair of these, for x and for y.

    Returns:
        (...), float32 (float64 for float64); dimensionless for "rbf", in units of x^2 y^2 for "linear"; differentiable
        by x and y, once for "rbf". The bandwidth of None is a constant to the gradient.

    Raises:
        TypeError, ValueError: one sentence, before any work.

    Sources: Gretton et al., Measuring statistical dependence with Hilbert-Schmidt norms (2005), for the biased form;
    Song et al., Feature selection via dependence maximization (2012), for the unbiased one.
    """
    _check_settings(kernel, estimator, bandwidth)
    _check_paired([("x", x), ("y", y)], _least_rows(estimator))
    n = x.shape[-2]
    if kernel == "linear":
        xc, yc = _centred(x), _centred(y)
        # equal by ||X'Y||_F^2 = <XX', YY'>_F; of the two, the one with less work also fits in the inputs' memory
        if x.shape[-1] * y.shape[-1] <= n * (x.shape[-1] + y.shape[-1]):
            product = (xc.mT @ yc).square().sum((-2, -1))
        else:
            product = ((xc @ xc.mT) * (yc @ yc.mT)).sum((-2, -1))
        diagonals = [z.square().sum(-1)[..., None, :] for z in (xc, yc)]
        sums = [torch.zeros_like(q) for q in diagonals]  # of centred rows
        found = _combine(product[..., None, None], sums, diagonals, estimator)
        return found[..., 0, 0].to(_result_dtype(x))
    scales = _scales(bandwidth, [("x", x), ("y", y)])
    width = max(x.shape[-1], y.shape[-1])
    stack = torch.stack([torch.nn.functional.pad(z, (0, width - z.shape[-1])) for z in (x, y)], -3)
    gram, rows = _rbf_sums(stack, torch.stack(scales, -1))
    sums = [rows[..., :1, :], rows[..., 1:, :]]
    found = _combine(gram[..., :1, 1:], sums, [torch.ones_like(r) for r in sums], estimator)
    return found[..., 0, 0].to(_result_dtype(x))


def pairwise_hsic(
    z: Tensor,
    kernel: Kernel = "rbf",
    estimator: Estimator = "biased",
    bandwidth: float | Tensor | None = None,
    normalized: bool = False,
) -> Tensor:
    r"""HSIC of every pair of single features: entry (i, j) is `hsic(z[:, i:i+1], z[:, j:j+1])`.

    Every pair of rows is visited once, for all D kernels together: O(N D + D^2) memory, where D kernel matrices take
    D N^2. With `normalized`, divided by sqrt(HSIC_ii HSIC_jj), between 0 and 1 if biased; and 0 for a feature, itself
    included, that is constant or, by "rbf", has an HSIC_ii of rounding alone, below 1e-14.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides; N >= 2, and N >= 4 when unbiased.
        kernel, estimator: as in `hsic`.
        bandwidth: for "rbf", in units of z: a number > 0, or a tensor of them that broadcasts to (..., D), with a
            gradient; or None for the `median_bandwidth` of each feature.
        normalized: as above.

    Returns:
        (..., D, D), float32 (float64 for float64); differentiable as `hsic`.

    Raises:
        TypeError, ValueError: one sentence, before any work.

    Source: Mialon et al., Variance-covariance regularization enforces pairwise independence (2209.14905).
    """
    _check_settings(kernel, estimator, bandwidth)
    _checks.matrix_stack("z", z, min_rows=_least_rows(estimator))
    if isinstance(bandwidth, tuple):
        raise TypeError("bandwidth must be a number, a torch.Tensor or None for all features, got a tuple.")
    if kernel == "linear":
        zc = _centred(z)
        product, diagonal = (zc.mT @ zc).square(), zc.mT.square()
        rows = torch.zeros_like(diagonal)
    else:
        features = z.mT[..., None]
        product, rows = _rbf_sums(features, _scales(bandwidth, [("z", features)])[0])
        diagonal = torch.ones_like(rows)
    out = _combine(product, [rows, rows], [diagonal, diagonal], estimator)
    if normalized:
        own = out.diagonal(dim1=-2, dim2=-1)
        none = own <= (1e-14 if kernel == "rbf" else 0)  # by rbf, 1 - 1 in float64; of centred rows, 0
        norm = own.masked_fill(none, 1).sqrt()
        out = out / (norm[..., :, None] * norm[..., None, :])
        out = out.masked_fill(none[..., :, None] | none[..., None, :], 0)
    return out.to(_result_dtype(z))


def dhsic(*variables: Tensor, bandwidth: float | Tensor | tuple[Any, ...] | None = None) -> Tensor:
    r"""dHSIC: the joint dependence of d variables, by Gaussian kernels.

    With K^d the kernel matrix of the d-th variable, exp(-|u - v|^2 / (2 bandwidth_d^2)):

        mean_ij prod_d K^d_ij + prod_d mean_ij K^d_ij - (2/N) sum_i prod_d mean_j K^d_ij

    which for two variables is (N-1)^2/N^2 times their biased `hsic`. The product of Gaussians is the Gaussian of the
    variables side by side, so each term is a streamed sum, in O(N sum D) memory; products are taken in float64.

    Args:
        variables: two or more (..., N, D_d) of the same leading dimensions, N >= 2, dtype and device; float32,
            bfloat16, float16 or float64, any strides.
        bandwidth: in units of the variables: a number > 0, or a tensor of them that broadcasts to (...), with a
            gradient; or None for `median_bandwidth`; or a tuple with one of these for each variable.

    Returns:
        (...), float32 (float64 for float64), dimensionless, >= 0, differentiable once by the variables.

    Raises:
        TypeError, ValueError: one sentence, before any work.

    Source: Pfister et al., Kernel-based tests for joint independence (1603.00285).
    """
    named = [(f"variables[{i}]", v) for i, v in enumerate(variables)]
    if len(named) < 2:
        raise ValueError(f"variables must be two or more tensors of shape (..., N, D), got {len(named)}.")
    _check_paired(named, 2)
    scales = _scales(bandwidth, named)
    dtype = _result_dtype(variables[0])
    # centred before they are rounded again: a common mean costs no digits
    units = [_centred(v) * c.sqrt()[..., None, None] for v, c in zip(variables, scales, strict=True)]
    joint = pairwise_reduce(torch.cat(units, -1).to(dtype), kernel="rbf", reduction="sum").double()
    sums = [pairwise_reduce(u.to(dtype), kernel="rbf", reduction="sum").double() for u in units]
    n = joint.shape[-1]
    means = torch.stack(sums) / n
    out = joint.mean(-1) / n + means.mean(-1).prod(0) - 2 * means.prod(0).mean(-1)
    return out.to(dtype)


def _combine(product: Tensor, sums: list[Tensor], diagonals: list[Tensor], estimator: str) -> Tensor:
    """HSIC (..., A, B) from sum_ij k^a_ij l^b_ij, and the row sums and diagonals, both (..., A, N) and (..., B, N)."""
    n = sums[0].shape[-1]
    if estimator == "unbiased":
        product = product - diagonals[0] @ diagonals[1].mT
        sums = [r - q for r, q in zip(sums, diagonals, strict=True)]
    rows = sums[0] @ sums[1].mT
    totals = sums[0].sum(-1)[..., :, None] * sums[1].sum(-1)[..., None, :]
    if estimator == "unbiased":
        return (product + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
    return (product - 2 / n * rows + totals / n**2) / (n - 1) ** 2


def _rbf_sums(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """sum_ij k^g_ij k^h_ij and sum_j k^g_ij of (..., G, N, D), in float64."""
    gram, rows = pairwise_reduce(groups, kernel="rbf", reduction="gram", scale=scale)
    return gram.double(), rows.double()


def _centred(z: Tensor) -> Tensor:
    """In float64; equal rows give exactly 0."""
    z = z.double()
    z = z - z[..., :1, :].detach()
    return z - z.mean(-2, keepdim=True)


def _scales(bandwidth: Any, named: list[tuple[str, Tensor]]) -> list[Tensor]:
    """1/(2 bandwidth^2) of each variable, (...)."""
    widths = bandwidth if isinstance(bandwidth, tuple) else (bandwidth,) * len(named)
    if len(widths) != len(named):
        raise ValueError(
            f"bandwidth must be one, or a tuple of {len(named)}, for {len(named)} variables, got {widths}."
        )
    wanted = [w if w is None else rbf_scale("bandwidth", w, z) for w, (_, z) in zip(widths, named, strict=True)]
    return [
        rbf_scale("bandwidth", median_bandwidth(z), z) if c is None else c
        for c, (_, z) in zip(wanted, named, strict=True)
    ]


def _check_settings(kernel: str, estimator: str, bandwidth: object) -> None:
    _checks.one_of("kernel", kernel, get_args(Kernel))
    _checks.one_of("estimator", estimator, get_args(Estimator))
    if kernel != "rbf" and bandwidth is not None:
        raise ValueError(f"bandwidth is for kernel='rbf', got one with kernel={kernel!r}.")


def _check_paired(named: list[tuple[str, Tensor]], least: int) -> None:
    """All must be (..., N, D) with the leading dimensions, the N, the dtype and the device of the first."""
    first, x = named[0]
    for name, z in named:
        _checks.matrix_stack(name, z, min_rows=least)
        if z.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"{name} must have the leading dimensions and the rows of {first}, "
                f"got shapes {tuple(x.shape)} for {first} and {tuple(z.shape)} for {name}."
            )
        _checks.alike(first, x, name, z)


def _least_rows(estimator: str) -> int:
    return 4 if estimator == "unbiased" else 2


def _result_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32
