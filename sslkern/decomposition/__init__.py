"""What self-supervised objectives optimise, in closed form or without a network: scikit-learn estimators."""

from .ica import VCRegICA

__all__ = ["VCRegICA"]
