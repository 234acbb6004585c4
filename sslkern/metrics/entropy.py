"""Estimates and bounds of the entropy of a representation, from a small Gram matrix or one pass over the pairs."""

from __future__ import annotations

from torch import Tensor

from ..core import checks
from ..core.dtypes import accumulation_dtype
from ..ops.entropy import ESTIMATORS, Estimator, entropy_of
from ..ops.kernel_matmul import rbf_scale


def entropy(z: Tensor, estimator: Estimator = "logdet", noise: float | Tensor = 1.0) -> Tensor:
    r"""An estimate or a bound of the entropy, in nats, of the mixture of the N Gaussians N(z_i, noise^2 I).

    C = Zc'Zc/N is the covariance of the rows of z, so the covariance of the mixture is C + noise^2 I. The estimators:

        logdet                   (1/2) logdet(I + C/noise^2)
        moment                   (1/2) logdet(2 pi e (C + noise^2 I))
        diagonal                 (1/2) sum_k log(2 pi e (C_kk + noise^2))
        pairwise-kl              (D/2) log(2 pi e noise^2) - mean_i log mean_j exp(-|z_i - z_j|^2/(2 noise^2))
        pairwise-bhattacharyya   (D/2) log(2 pi e noise^2) - mean_i log mean_j exp(-|z_i - z_j|^2/(8 noise^2))

    "logdet" is the coding rate: "moment" minus the entropy of the noise, (D/2) log(2 pi e noise^2). "moment" is the
    entropy of a Gaussian with the covariance of the mixture, and "diagonal" the entropy of a Gaussian with the same
    variances and no correlations.

    "pairwise-bhattacharyya" is a lower bound. "pairwise-kl" and "moment" are upper bounds: "pairwise-kl" is tighter if
    the noise is small compared with the distances of the rows, and "moment" is tighter if it is large. "diagonal" is
    never below "moment". A determinant takes the smaller of the D x D and the N x N Gram matrix of the centred rows, in
    float32 (float64 for float64), and its Cholesky decomposition in float64. Where torch's switches allow products of
    float32 in TF32 or bfloat16, the Gram matrix is formed in float64 instead, since a determinant would not survive the
    rounding. Sums over pairs are computed without a matrix of pairs, in O(N D) memory.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides, N >= 1.
        estimator: one of the five names above.
        noise: the standard deviation of each Gaussian, in units of z: a number > 0, or a floating-point tensor with one
            element or with a shape that broadcasts to the leading dimensions. A tensor gets a gradient.

    Returns:
        The entropy, (...), in nats, in float32, or in float64 if z is float64. It is differentiable, but only once for
        the pairwise estimators. It is NaN where z has NaN or inf. An eigenvalue of C + noise^2 I below 1e-7 of the
        largest one (1e-15 for float64) is lost in the rounding of the Gram matrix, and a determinant may then be NaN.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: z has no rows or columns, the estimator is
        unknown, or `noise` is not above 0.

    Sources: Shwartz-Ziv and LeCun, What do we maximize in self-supervised learning (2207.10081); Kolchinsky and Tracey,
    Estimating mixture entropy with pairwise distances (1706.02419); Ma et al., Segmentation of multivariate mixed data
    via lossy data coding and compression (2007), for the coding rate.
    """
    checks.one_of("estimator", estimator, ESTIMATORS)
    checks.matrix_stack("z", z, min_rows=1)
    precision = 2 * rbf_scale("noise", noise, z)  # 1/noise^2
    return entropy_of(z, estimator, precision).to(accumulation_dtype(z))
