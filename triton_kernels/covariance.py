"""Covariance. The formulas are in `sslkern.reference.covariance`."""

from __future__ import annotations

from torch import Tensor

from . import launch
from .covariance_backward import Coefficients, backward
from .covariance_forward import forward


def covariance_fwd(z: Tensor, unbiased: bool, dual: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lead = z.shape[:-2]
    offdiag, _, centre, variance, gram, row_sq = forward([launch.slices(z)], unbiased, dual, (0.0,) * 5)
    return (
        variance.view(*lead, -1),
        offdiag.view(lead),
        centre.view(*lead, 2, -1),
        gram.view(*lead, *gram.shape[-2:]),
        row_sq.view(*lead, row_sq.shape[-1]),
    )


def covariance_bwd(
    grad_variance: Tensor,
    grad_offdiag: Tensor,
    z: Tensor,
    centre: Tensor,
    variance: Tensor,
    gram: Tensor,
    row_sq: Tensor,
    unbiased: bool,
    dual: bool,
) -> Tensor:
    coefficients = Coefficients.of(z.shape[-2], unbiased, dual)
    saved = (centre, variance, gram, row_sq)
    grad_variance = grad_variance.reshape(-1, z.shape[-1])
    return backward([z], [True], saved, grad_offdiag, grad_variance, coefficients, unbiased, dual)[0]


launch.register("covariance_fwd", covariance_fwd)
launch.register("covariance_bwd", covariance_bwd)
