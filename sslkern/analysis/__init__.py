"""Analysis of representations and of trained networks."""

from .normality import NormalityResult, normality_test, normality_test_of

__all__ = ["NormalityResult", "normality_test", "normality_test_of"]
