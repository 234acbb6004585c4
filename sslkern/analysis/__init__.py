"""Analysis of representations and of trained networks."""

from .batch_norm import fit_batch_norm_, tls_distance
from .boundary_jitter import BoundaryJitter, boundary_jitter
from .normality import NormalityResult, normality_test, normality_test_of
from .partition import PartitionDistance, partition_distance
from .partition_plot import plot_partition

__all__ = [
    "BoundaryJitter",
    "NormalityResult",
    "PartitionDistance",
    "boundary_jitter",
    "fit_batch_norm_",
    "normality_test",
    "normality_test_of",
    "partition_distance",
    "plot_partition",
    "tls_distance",
]
