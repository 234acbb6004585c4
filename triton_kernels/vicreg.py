"""VICReg, by the kernels of covariance on both views. The formulas are in `sslkern.reference.vicreg`."""

from __future__ import annotations

from torch import Tensor

from . import launch
from .covariance_backward import Coefficients, backward
from .covariance_forward import forward


def vicreg_fwd(
    a: Tensor,
    b: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    gamma: float,
    eps: float,
    unbiased: bool,
    dual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = (sim_coeff, std_coeff, cov_coeff, gamma, eps)
    lead = a.shape[:-2]
    views = [launch.slices(a), launch.slices(b)]
    loss, terms, centre, variance, gram, row_sq = forward(views, unbiased, dual, settings)
    assert terms is not None
    return (
        loss.view(lead),
        terms.view(*lead, 3),
        centre.view(2, *lead, 2, -1),
        variance.view(2, *lead, -1),
        gram.view(2, *lead, *gram.shape[-2:]),
        row_sq.view(2, *lead, row_sq.shape[-1]),
    )


def vicreg_bwd(
    grad_loss: Tensor,
    a: Tensor,
    b: Tensor,
    centre: Tensor,
    variance: Tensor,
    gram: Tensor,
    row_sq: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    gamma: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    saved = (centre, variance, gram, row_sq)
    n, d = a.shape[-2:]
    coefficients = Coefficients.of(n, unbiased, dual, cov_coeff / d)._replace(
        pull=2 * sim_coeff / (n * d), hinge=-std_coeff / (2 * d * (n - 1)), gamma=gamma, eps=eps
    )
    grad_a, grad_b = backward([a, b], [need_a, need_b], saved, grad_loss, None, coefficients, unbiased, dual)
    return grad_a, grad_b


launch.register("vicreg_fwd", vicreg_fwd)
launch.register("vicreg_bwd", vicreg_bwd)
