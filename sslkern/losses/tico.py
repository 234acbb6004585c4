"""The TiCo loss: views agree, and avoid the directions in which the features have varied so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.autograd import Op, first_order, intermediate
from ..core.dtypes import accumulation_dtype, without_autocast
from ..core.ranks import Batch, Group
from ..ops.matrix_product import product
from ..ops.unit_rows import check_eps, unit_rows
from ._pairs import shown_last


def tico_loss(
    a: Tensor,
    b: Tensor,
    covariance: Tensor | None = None,
    beta: float = 0.9,
    rho: float | Tensor = 8.0,
    *,
    eps: float | None = None,
    return_covariance: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The TiCo loss of two views, with the covariance that the features had so far.

    The rows are first divided by their length. With A and B the views after this division,

        C    = beta C_before + (1 - beta) A'A/N
        loss = 1 - mean_i <a_i, b_i> + rho mean_i a_i'C a_i

    C has no gradient. The last term is formed from one product AC, which is the gradient of this term too. Without
    `covariance`, C_before is 0; if C is not returned either and N < D, the term comes from the N x N matrix AA', and C
    is not formed.

    Args:
        a, b: the two views, (N, D), N >= 1. float32, bfloat16, float16 or float64; any strides; the dtypes may differ.
        covariance: C_before, (D, D), float32 or float64. It is not changed. `TiCoLoss` keeps it from step to step.
        beta: the weight of C_before, in [0, 1].
        rho: the weight of the last term: a finite number, or a floating-point tensor with one element, which gets a
            gradient.
        eps: a row shorter than `eps` is divided by `eps` instead of by its length. The default is 1e-12, but 1e-3 for
            float16.
        return_covariance: also return C, detached.
        group: the ranks that hold the batch; see `sslkern.distributed`. C is that of the joint batch. All ranks must
            hold the same C_before.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a or b is float64. With `return_covariance`, the pair
        (loss, C).

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, or a setting is out of
        range.

    Source: Zhu et al., TiCo (2206.10698).
    """
    batch, beta, rho = _checked(a, b, covariance, beta, rho, eps, group)
    return _loss(a, b, covariance, beta, rho, eps, return_covariance, batch, in_place=False)


def _checked(
    a: Tensor, b: Tensor, covariance: Tensor | None, beta: float, rho: float | Tensor, eps: float | None, group: Group
) -> tuple[Batch, float, float | Tensor]:
    def check(least: int) -> tuple[Tensor, Tensor]:
        nonlocal rho, beta
        checks.matrix("a", a, least)
        checks.matrix("b", b, least)
        checks.same_shape("a", a, "b", b)
        _check_covariance(covariance, a)
        rho, beta = checks.setting("rho", rho, a), _check_beta(beta)
        check_eps(eps)
        return a, b

    return ranks.batch(group, 1, check)[0], beta, rho


def _loss(
    a: Tensor,
    b: Tensor,
    before: Tensor | None,
    beta: float,
    rho: float | Tensor,
    eps: float | None,
    return_covariance: bool,
    batch: Batch,
    in_place: bool,
) -> Any:
    dtype = accumulation_dtype(a, b)
    x, y = unit_rows(a, dtype, eps), unit_rows(b, dtype, eps)
    invariance = 1 - batch.mean((x * y).sum(-1))
    n, d = batch.count(len(x)), x.shape[1]
    if before is None and not return_covariance and n < d:
        own = _GramSquares.apply(x, batch.every(x.detach()))[0]
        return invariance + rho * ((1 - beta) / n * batch.mean(own))
    covariance = _updated(before, x.detach(), beta, batch, in_place)
    loss = invariance + rho * batch.mean(_Quadratic.apply(x, covariance)[0])
    return (loss, covariance) if return_covariance else loss


def _updated(before: Tensor | None, x: Tensor, beta: float, batch: Batch, in_place: bool) -> Tensor:
    """beta C_before + (1 - beta) X'X/N, in one product per rank: each rank adds its share of C_before. If `in_place`,
    the product is added to C_before itself; the result may be C_before or another tensor."""
    n = batch.count(len(x))
    scale = (1 - beta) / n
    with without_autocast(x):
        if before is None:
            return batch.summed(product(x.mT, x)) * scale
        before = before.detach()
        add = before.addmm_ if in_place and before.dtype == x.dtype else before.to(x.dtype).addmm
        return batch.summed(add(x.mT, x, beta=beta * len(x) / n, alpha=scale))


class _Quadratic(Op):
    """x_i'M x_i of every row i, for a symmetric matrix M without a gradient. It keeps xM, half of the gradient."""

    @staticmethod
    def forward(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(x):
            half = product(x, matrix)
        return (half * x).sum(-1), half

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], output[1])  # `first_order` sees by the input that it needs a gradient
        intermediate(ctx, output[1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, _: None):
        _, half = ctx.saved_tensors
        return None if grad is None else half * (2 * grad[..., None]), None


class _GramSquares(Op):
    """The same for M = Y'Y, by the matrix xY'."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(x):
            gram = product(x, y.mT)
        return gram.square().sum(-1), gram

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        intermediate(ctx, output[1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, _: None):
        _, y, gram = ctx.saved_tensors
        if grad is None:
            return None, None
        with without_autocast(y):
            return product(gram * (2 * grad[..., None]), y), None


def _check_beta(beta: object) -> float:
    number = checks.non_negative("beta", beta)
    if number > 1:
        raise ValueError(f"beta must be a number in [0, 1], got {beta!r}.")
    return number


def _check_covariance(covariance: object, a: Tensor) -> None:
    if covariance is None:
        return
    checks.matrix("covariance", covariance)
    assert isinstance(covariance, Tensor)
    if covariance.shape != (a.shape[1], a.shape[1]) or covariance.device != a.device:
        raise ValueError(
            f"covariance must have shape {(a.shape[1], a.shape[1])} and be on {a.device}, got "
            f"{tuple(covariance.shape)} on {covariance.device}."
        )


class TiCoLoss(nn.Module):
    """`tico_loss` as a module, which keeps C (D, D) in the buffer `covariance`, at first of zeros.

    A call updates the buffer, unless the module is in evaluation mode or `update` is False.
    """

    covariance: Tensor

    def __init__(
        self,
        num_features: int,
        beta: float = 0.9,
        rho: float | Tensor = 8.0,
        *,
        eps: float | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        checks.positive("num_features", num_features)
        check_eps(eps)
        ranks.peers_of(group)
        self.num_features, self.eps, self.group = num_features, eps, group
        self.beta, self.rho = _check_beta(beta), checks.setting("rho", rho)
        self.register_buffer("covariance", torch.zeros(num_features, num_features))

    def forward(self, a: Tensor, b: Tensor, update: bool = True) -> Tensor:
        batch, beta, rho = _checked(a, b, self.covariance, self.beta, self.rho, self.eps, self.group)
        update = update and self.training
        loss, covariance = _loss(a, b, self.covariance, beta, rho, self.eps, True, batch, in_place=update)
        if update and covariance is not self.covariance:
            with torch.no_grad():
                self.covariance.copy_(covariance)
        return loss

    def extra_repr(self) -> str:
        rho = self.rho.detach() if isinstance(self.rho, Tensor) else self.rho
        return f"{self.num_features}, beta={self.beta}, rho={rho!r}{shown_last(self.eps, self.group)}"
