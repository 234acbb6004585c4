"""Analysis of representations and of trained networks."""

from ._layer_operator import CovarianceOperator
from .batch_norm import fit_batch_norm_, tls_distance
from .boundary_jitter import BoundaryJitter, boundary_jitter
from .conditioning import ExtremeSingularValues, condition_number, extreme_singular_values
from .covariance_operator import byol_covariance_operator, covariance_operator
from .hessian_factors import HessianFactors, hessian_factors
from .layerwise_callback import LayerwiseProbeCallback
from .layerwise_probe import LayerwiseProbe, layerwise_probe
from .local_affine import LocalAffine, local_affine
from .normality import NormalityResult, normality_test, normality_test_of
from .partition import PartitionDistance, partition_distance
from .partition_plot import plot_partition
from .per_class_effect import PerClassEffect, per_class_accuracy, per_class_effect
from .perturbation import (
    BoundResult,
    absolute_value_shift,
    activation_condition,
    dense_condition,
    dense_shift,
    residual_condition,
    residual_shift,
)
from .ridge_path import RidgePath, ridge_path

__all__ = [
    "BoundResult",
    "BoundaryJitter",
    "CovarianceOperator",
    "ExtremeSingularValues",
    "HessianFactors",
    "LayerwiseProbe",
    "LayerwiseProbeCallback",
    "LocalAffine",
    "NormalityResult",
    "PartitionDistance",
    "PerClassEffect",
    "RidgePath",
    "absolute_value_shift",
    "activation_condition",
    "boundary_jitter",
    "byol_covariance_operator",
    "condition_number",
    "covariance_operator",
    "dense_condition",
    "dense_shift",
    "extreme_singular_values",
    "fit_batch_norm_",
    "hessian_factors",
    "layerwise_probe",
    "local_affine",
    "normality_test",
    "normality_test_of",
    "partition_distance",
    "per_class_accuracy",
    "per_class_effect",
    "plot_partition",
    "residual_condition",
    "residual_shift",
    "ridge_path",
    "tls_distance",
]
