"""Analysis of representations and of trained networks."""

from .batch_norm import tls_distance
from .normality import NormalityResult, normality_test, normality_test_of
from .partition import PartitionDistance, partition_distance

__all__ = [
    "NormalityResult",
    "PartitionDistance",
    "normality_test",
    "normality_test_of",
    "partition_distance",
    "tls_distance",
]
