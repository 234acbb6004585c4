"""Analysis of representations and of trained networks."""

from .layerwise_callback import LayerwiseProbeCallback
from .layerwise_probe import LayerwiseProbe, layerwise_probe
from .normality import NormalityResult, normality_test, normality_test_of

__all__ = [
    "LayerwiseProbe",
    "LayerwiseProbeCallback",
    "NormalityResult",
    "layerwise_probe",
    "normality_test",
    "normality_test_of",
]
