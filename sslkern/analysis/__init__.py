"""Analysis of representations and of trained networks."""

from .normality import NormalityResult, normality_test, normality_test_of
from .per_class_effect import PerClassEffect, per_class_accuracy, per_class_effect
from .ridge_path import RidgePath, ridge_path

__all__ = [
    "NormalityResult",
    "PerClassEffect",
    "RidgePath",
    "normality_test",
    "normality_test_of",
    "per_class_accuracy",
    "per_class_effect",
    "ridge_path",
]
