"""Analysis of representations and of trained networks."""

from .conditioning import ExtremeSingularValues, condition_number, extreme_singular_values
from .hessian_factors import HessianFactors, hessian_factors
from .local_affine import LocalAffine, local_affine
from .normality import NormalityResult, normality_test, normality_test_of
from .perturbation import (
    BoundResult,
    absolute_value_shift,
    activation_condition,
    dense_condition,
    dense_shift,
    residual_condition,
    residual_shift,
)

__all__ = [
    "BoundResult",
    "ExtremeSingularValues",
    "HessianFactors",
    "LocalAffine",
    "NormalityResult",
    "absolute_value_shift",
    "activation_condition",
    "condition_number",
    "dense_condition",
    "dense_shift",
    "extreme_singular_values",
    "hessian_factors",
    "local_affine",
    "normality_test",
    "normality_test_of",
    "residual_condition",
    "residual_shift",
]
