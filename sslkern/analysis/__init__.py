"""Analysis of representations and of trained networks."""

from ._layer_operator import CovarianceOperator
from .covariance_operator import byol_covariance_operator, covariance_operator
from .normality import NormalityResult, normality_test, normality_test_of

__all__ = [
    "CovarianceOperator",
    "NormalityResult",
    "byol_covariance_operator",
    "covariance_operator",
    "normality_test",
    "normality_test_of",
]
