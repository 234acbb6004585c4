"""How many dimensions a representation uses: inexpensive measures of collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..ops.covariance import covariance


def participation_ratio(z: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    r"""(tr C)^2 / ||C||_F^2 of the covariance C, between 1 (one direction) and D (white).

    Args:
        z: (..., N, D) as in `sslkern.ops.covariance`; or the pair (variance, offdiag) that `covariance` returned, which
            makes the ratio nearly free.

    Returns:
        (...), float32 (float64 for float64), dimensionless; no host sync. A constant z gives NaN.

    Source: Gao et al., A theory of multineuronal dimensionality (2017).
    """
    if isinstance(z, Tensor):
        z = covariance(z)
    if not (isinstance(z, tuple) and len(z) == 2 and all(isinstance(part, Tensor) for part in z)):
        raise TypeError(f"z must be a torch.Tensor or the pair (variance, offdiag), got {type(z).__name__}.")
    variance, offdiag = z
    return variance.sum(-1).square() / (offdiag + variance.square().sum(-1))


def rankme(z: Tensor, eps: float = 1e-7) -> Tensor:
    r"""RankMe, exp(-sum_k p_k log p_k) with p_k = sigma_k / sum_l sigma_l + eps over the singular values of z.

    The singular values come from the smaller of z'z and zz', in float64: below 1e-8 of the largest they are noise. The
    result stays on the device; torch's symmetric eigenvalue solver may synchronise on CUDA.

    Args:
        z: (..., N, D), not centred, float32, bfloat16, float16 or float64, any strides.
        eps: added to every p_k, as in the paper.

    Returns:
        (...), float64, between 1 and min(N, D) up to eps; NaN for a slice with NaN or inf in it.

    Source: Garrido et al., RankMe (2210.02885).
    """
    checks.matrix_stack("z", z, min_rows=1)
    checks.non_negative("eps", eps)
    z = z.detach().double()
    gram = z @ z.mT if z.shape[-2] < z.shape[-1] else z.mT @ z
    total = torch.sum(gram, (-2, -1))
    # the solver raises on NaN and inf, and on a GPU may not return
    sigma = torch.linalg.eigvalsh(torch.nan_to_num_(gram, 0.0, 0.0, 0.0)).relu_().sqrt_()
    p = sigma.div_(torch.sum(sigma, -1, True)).add_(eps)
    rank = torch.sum(torch.special.entr(p), -1).exp_()
    return rank.add_(total, alpha=0)  # NaN where z has NaN or inf
