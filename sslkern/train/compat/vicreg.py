"""The loss of the official VICReg script (facebookresearch/vicreg, main_vicreg.py), which it computes inside its model.

In `VICReg.forward`, one line replaces all that follows the projector:

    return vicreg_loss(
        x,
        y,
        batch_size=self.args.batch_size,
        num_features=self.num_features,
        sim_coeff=self.args.sim_coeff,
        std_coeff=self.args.std_coeff,
        cov_coeff=self.args.cov_coeff,
    )
"""

from __future__ import annotations

from numbers import Integral

from torch import Tensor

from ...core import checks
from ...ops.vicreg import vicreg_of
from ._official import off_diagonal, rows_of_script
from ._views import matched_batch

__all__ = ["off_diagonal", "vicreg_loss"]


def vicreg_loss(
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int | None = None,
    num_features: int | None = None,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
) -> Tensor:
    r"""VICReg as the script computes it. The variance and covariance terms are those of the rows of all processes.

        invariance = mean_ij (x_ij - y_ij)^2, over the rows of this process
        variance   = 1/2 sum_{z in x, y} mean_j max(0, 1 - sqrt(var_j(z) + 1e-4))
        covariance = sum_{z in x, y} sum_{j != k} [Zc'Zc / (batch_size - 1)]_jk^2 / num_features, Zc the centred z

    It equals `sslkern.vicreg_loss` where batch_size is the number N of rows of all processes. The script divides by its
    nominal batch size, so a smaller last batch has a smaller covariance term. Before DistributedDataParallel averages
    them, gradients are W times those of the joint batch of W processes, as in the script.

    The loss is computed in float32, or in float64 for float64 views, also under autocast, where the script squares in
    float16 in place.

    Args:
        x, y: the outputs of the projector, both (N, D), floating-point, N >= 2.
        batch_size: the batch size of all processes together. None is the number of rows that there are.
        num_features: the number by which the covariance is divided. None is D.
        sim_coeff, std_coeff, cov_coeff: the weights of the terms.

    Raises:
        TypeError, ValueError: an argument is invalid. With several processes, all of them raise for invalid views.

    Source: Bardes, Ponce, LeCun, VICReg (2105.04906).
    """
    batch, (x, y) = matched_batch(2, x=x, y=y)
    n, d = batch.count(len(x)), x.shape[1]
    nominal = rows_of_script(batch_size, n, above=1)
    features = d if num_features is None else num_features
    if isinstance(features, bool) or not isinstance(features, Integral) or features < 1:
        raise ValueError(f"num_features must be None or an integer >= 1, got {checks.got(features)}.")
    coefficients = [
        checks.setting(name, value, x)
        for name, value in (("sim_coeff", sim_coeff), ("std_coeff", std_coeff), ("cov_coeff", cov_coeff))
    ]
    coefficients[2] = coefficients[2] * (((n - 1) / (nominal - 1)) ** 2 * d / int(features))
    return vicreg_of(x, y, (*coefficients, 1.0, 1e-4), "plugin", batch)[0]
