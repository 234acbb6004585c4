"""Metrics of representations."""

from .rank import participation_ratio, rankme

__all__ = ["participation_ratio", "rankme"]
