"""Metrics of representations."""

from .entropy import entropy
from .hsic import dhsic, hsic, median_bandwidth, pairwise_hsic
from .rank import participation_ratio, rankme

__all__ = ["dhsic", "entropy", "hsic", "median_bandwidth", "pairwise_hsic", "participation_ratio", "rankme"]
