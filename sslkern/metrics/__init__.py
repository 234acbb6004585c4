"""Metrics that describe representations."""

from .bandwidth import median_bandwidth
from .dhsic import dhsic
from .entropy import entropy
from .hsic import hsic, pairwise_hsic
from .rank import participation_ratio, rankme

__all__ = ["dhsic", "entropy", "hsic", "median_bandwidth", "pairwise_hsic", "participation_ratio", "rankme"]
