"""What self-supervised objectives optimise, in closed form or without a network: scikit-learn estimators."""

from .deep_tensor import DeepTensor
from .factor_generators import ConvGenerator

__all__ = ["ConvGenerator", "DeepTensor"]
