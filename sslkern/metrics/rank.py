"""Inexpensive measures of how many dimensions a representation uses, which show its collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..ops.covariance import covariance


def participation_ratio(z: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    r"""The participation ratio (tr C)^2 / ||C||_F^2 of the covariance C of z.

    It lies between 1, if z varies along one direction only, and D, if C is a multiple of the identity.

    Args:
        z: (..., N, D), as in `sslkern.ops.covariance`, or the pair (variance, offdiag) that `covariance` returned. The
            pair saves nearly all of the work.

    Returns:
        The ratio, (...), in float32, or in float64 if z is float64. It is dimensionless, and NaN for a constant z.
        There is no host sync.

    Source: Gao et al., A theory of multineuronal dimensionality (2017).
    """
    if isinstance(z, Tensor):
        z = covariance(z)
    if not (isinstance(z, tuple) and len(z) == 2 and all(isinstance(part, Tensor) for part in z)):
        raise TypeError(f"z must be a torch.Tensor or the pair (variance, offdiag), got {type(z).__name__}.")
    variance, offdiag = z
    return variance.sum(-1).square() / (offdiag + variance.square().sum(-1))


def rankme(z: Tensor, eps: float = 1e-7) -> Tensor:
    r"""RankMe: exp(-sum_k p_k log p_k) with p_k = sigma_k / sum_l sigma_l + eps, for the singular values sigma_k of z.

    The singular values are computed in float64 from the smaller of z'z and zz'. Singular values below 1e-8 of the
    largest one are rounding errors. The result stays on the device, but torch's symmetric eigenvalue solver may
    synchronise with the host on CUDA.

    Args:
        z: (..., N, D), which the function does not centre; float32, bfloat16, float16 or float64, any strides.
        eps: added to every p_k, as in the paper.

    Returns:
        RankMe, (...), float64. It lies between 1 and min(N, D), up to an error from `eps`. It is NaN for a slice that
        contains NaN or inf.

    Source: Garrido et al., RankMe (2210.02885).
    """
    checks.matrix_stack("z", z, min_rows=1)
    checks.non_negative("eps", eps)
    z = z.detach().double()
    gram = z @ z.mT if z.shape[-2] < z.shape[-1] else z.mT @ z
    total = torch.sum(gram, (-2, -1))
    # for NaN and inf the solver raises, and on a GPU it may never return
    sigma = torch.linalg.eigvalsh(torch.nan_to_num_(gram, 0.0, 0.0, 0.0)).relu_().sqrt_()
    p = sigma.div_(torch.sum(sigma, -1, True)).add_(eps)
    rank = torch.sum(torch.special.entr(p), -1).exp_()
    return rank.add_(total, alpha=0)  # makes the result NaN where z has NaN or inf
