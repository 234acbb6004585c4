"""Metrics that describe representations."""

from .amari import amari_distance
from .bandwidth import median_bandwidth
from .cka import cka
from .dhsic import dhsic
from .entropy import entropy
from .hsic import hsic, pairwise_hsic
from .rank import participation_ratio, rankme

__all__ = [
    "amari_distance",
    "cka",
    "dhsic",
    "entropy",
    "hsic",
    "median_bandwidth",
    "pairwise_hsic",
    "participation_ratio",
    "rankme",
]
