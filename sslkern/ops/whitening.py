"""Whitening: a linear map after which the columns of a batch have unit variance and no correlation. For arguments that
have been checked; `sslkern.nn.Whitening` has the formulas."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core import checks, collectives
from ..core.autograd import Op, first_order, intermediate
from ..core.dtypes import accumulation_dtype, without_autocast
from ..core.ranks import Batch, JointBatch
from .gram import Gram, centred_rows
from .matrix_product import product

Method = Literal["cholesky", "zca", "iterative"]
METHODS = get_args(Method)
EPS = {"cholesky": 0.0, "zca": 1e-3, "iterative": 1e-5}
INVERTS = 4  # rows per column


def check_whitening(method: object, eps: object, steps: object, groups: object) -> tuple[str, float, int, int]:
    """Check the settings of a whitening, and return them with the default of `eps`."""
    checks.one_of("method", method, METHODS)
    checks.positive("steps", steps)
    checks.positive("groups", groups)
    if eps is None:
        return method, EPS[method], steps, groups  # type: ignore[index, return-value]
    most = 1 if method == "cholesky" else inf
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= float(eps) <= most or float(eps) == inf:
        raise ValueError(f"eps must be None or a number {'in [0, 1]' if most == 1 else '>= 0'}, got {checks.got(eps)}.")
    return method, float(eps), steps, groups  # type: ignore[return-value]


def check_columns(name: str, columns: int, rows: int, method: str, eps: float, groups: int) -> None:
    """Check that the columns form `groups` groups, and that the covariance of a group is not singular for the lack of
    rows. `rows` is 0 where their number is not known yet."""
    if columns % groups:
        raise ValueError(f"the columns (D) of {name} must be a multiple of groups={groups}, got {columns}.")
    width = columns // groups
    if method == "cholesky" and eps == 0 and 0 < rows <= width:
        raise ValueError(
            f"{name} must have more rows (N) than columns in a group for eps=0, because the covariance is singular "
            f"otherwise: got {rows} rows for {width} columns."
        )


def whitened(z: Tensor, method: str, eps: float, steps: int, groups: int, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The whitened rows of every slice of `z` (..., N, D), in float32 or float64, and the covariances
    (..., groups, d, d) of which they are a function, detached; None where the N x N side is used instead."""
    n = batch.count(z.shape[-2])
    if method == "cholesky":
        name = batch.peers.name if isinstance(batch, JointBatch) else None
        y, _, covariance = _Cholesky.apply(split_groups(z.to(accumulation_dtype(z)), groups), eps, n, name)
        return join_groups(y, groups), covariance
    x = split_groups(centred_rows(z, batch), groups)
    d = x.shape[-1]
    dual, divisor = n < d, n - 1 if method == "zca" else n
    if dual:
        every = batch.every(x)
        matrix = Gram.apply(every, True) / divisor
    else:
        matrix = batch.summed(Gram.apply(x, False)) / divisor
    root = inverse_root(matrix, d, method, eps, steps)
    with without_autocast(x):
        y = root[..., : x.shape[-2], :] @ every if dual else x @ root
    return join_groups(y, groups), None if dual else matrix.detach()


def whitened_by(x: Tensor, covariance: Tensor, method: str, eps: float, steps: int) -> Tensor:
    """Whiten centred rows `x` (..., N, D) by given covariances (groups, d, d)."""
    groups, d = covariance.shape[-3:-1]
    x = split_groups(x, groups)
    with without_autocast(x):
        if method == "cholesky":
            y = torch.linalg.solve_triangular(_factor(covariance, eps).mT, x, upper=True, left=False)
        else:
            y = x @ inverse_root(covariance, d, method, eps, steps)
    return join_groups(y, groups)


def covariance_for(z: Tensor, method: str, groups: int, batch: Batch) -> Tensor:
    """The covariances (..., groups, d, d) by which `method` whitens `z`; not differentiable."""
    x = split_groups(centred_rows(z.detach(), batch), groups)
    n = batch.count(x.shape[-2])
    return batch.summed(Gram.apply(x, False)) / (n if method == "iterative" else n - 1)


def split_groups(x: Tensor, groups: int) -> Tensor:
    """(..., N, D) to (..., groups, N, D/groups)."""
    if groups == 1:
        return x.unsqueeze(-3)
    return x.unflatten(-1, (groups, -1)).movedim(-2, -3)


def join_groups(y: Tensor, groups: int) -> Tensor:
    return y.squeeze(-3) if groups == 1 else y.movedim(-3, -2).flatten(-2)


def _factor(covariance: Tensor, eps: float) -> Tensor:
    """The Cholesky factor of (1 - eps) S + eps I; NaN where there is none."""
    matrix = covariance
    if eps:
        matrix = (1 - eps) * matrix + eps * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor.masked_fill((failed != 0)[..., None, None], torch.nan)


class _Cholesky(Op):
    """Y = X L^{-T}, where X are the centred rows of z, S = X'X/(n - 1), and LL' = (1 - eps) S + eps I. The other
    results are L or L^{-1}, and S.

    From the gradient G of Y, that of X is (G - (1 - eps)/(n - 1) Y Q) L^{-1}, where Q is the symmetric matrix with the
    lower triangle of G'Y. So the backward takes two products and one triangular solve; torch's backward of the same
    formula takes the backward of the decomposition too.
    """

    @staticmethod
    def forward(z: Tensor, eps: float, n: int, group_name: str | None) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(z):
            x = z - (_summed(z.sum(-2, keepdim=True), group_name) / n if group_name else z[..., :1, :])
            x = x - _summed(x.sum(-2, keepdim=True), group_name) / n
            covariance = _summed(product(x.mT, x), group_name) / (n - 1)
            factor = _factor(covariance, eps)
            if _inverts(x):
                eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
                factor = torch.linalg.solve_triangular(factor, eye, upper=False)
                return product(x, factor.mT), factor, covariance
            return torch.linalg.solve_triangular(factor.mT, x, upper=True, left=False), factor, covariance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, eps, ctx.n, ctx.group_name = inputs
        y, factor, covariance = output
        ctx.scale, ctx.inverted = (1 - eps) / (ctx.n - 1), _inverts(y)
        ctx.save_for_backward(y, factor)
        intermediate(ctx, factor, covariance)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *_: None):
        y, factor = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        with without_autocast(y):
            lower = _summed(product(grad.mT, y), ctx.group_name).tril()
            both = lower + lower.tril(-1).mT
            grad = grad - ctx.scale * product(y, both)
            grad = (
                product(grad, factor)
                if ctx.inverted
                else torch.linalg.solve_triangular(factor, grad, upper=False, left=False)
            )
            return grad - _summed(grad.sum(-2, keepdim=True), ctx.group_name) / ctx.n, None, None, None


def _inverts(x: Tensor) -> bool:
    """Whether to invert the factor once, which for many rows takes less time than two solves with it. A compiled graph
    solves, so that it serves all numbers of rows."""
    return not torch.compiler.is_compiling() and x.shape[-2] >= INVERTS * x.shape[-1]


def _summed(x: Tensor, group_name: str | None) -> Tensor:
    return x if group_name is None else collectives.all_reduce(x, group_name)


def inverse_root(matrix: Tensor, d: int, method: str, eps: float, steps: int) -> Tensor:
    """The inverse square root of a covariance, or of the N x N matrix with the same eigenvalues, of d columns."""
    if method == "zca":
        return _InverseRoot.apply(matrix, eps)[0]
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + d * eps
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    with without_autocast(matrix):
        scaled = (matrix + eps * eye) / trace
        root = 1.5 * eye - 0.5 * scaled
        for _ in range(steps - 1):
            root = 1.5 * root - 0.5 * (root @ (root @ root)) @ scaled
    return root * trace.rsqrt()


class _InverseRoot(Op):
    """V max(e, floor)^{-1/2} V', with e and V the eigenvalues and eigenvectors of a symmetric matrix.

    The gradient is exact for equal eigenvalues too: with c = max(e, floor), the derivative's divided differences are
    -r_ij/(sqrt(c_i c_j) (sqrt c_i + sqrt c_j)), where r_ij = (c_i - c_j)/(e_i - e_j) is 1 above the floor and 0 below.
    """

    @staticmethod
    def forward(matrix: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(matrix):
            values, vectors = torch.linalg.eigh(matrix.nan_to_num(0, 0, 0))  # it raises for NaN
            root = (vectors * values.clamp_min(floor).rsqrt()[..., None, :]) @ vectors.mT
        return root + matrix.sum((-2, -1), keepdim=True) * 0, values, vectors  # NaN if a number is not finite

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.floor = inputs[1]
        ctx.save_for_backward(*output)
        intermediate(ctx, *output[1:])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *_: None):
        if grad is None:
            return None, None
        root, values, vectors = ctx.saved_tensors
        kept, above = values.clamp_min(ctx.floor), values >= ctx.floor
        s = kept.sqrt()
        row, column = s[..., :, None], s[..., None, :]
        ratio = (kept[..., :, None] - kept[..., None, :]) / (values[..., :, None] - values[..., None, :])
        ratio = torch.where(above[..., :, None] == above[..., None, :], above.to(s.dtype)[..., None], ratio)
        with without_autocast(root):
            inner = vectors.mT @ grad @ vectors * (-ratio / (row * column * (row + column)))
            return vectors @ inner @ vectors.mT, None
