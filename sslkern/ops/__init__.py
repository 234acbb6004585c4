"""The primitives: checked, differentiable torch ops over the back-ends."""

from .covariance import covariance
from .cross_correlation import cross_correlation

__all__ = ["covariance", "cross_correlation"]
