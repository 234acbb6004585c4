"""Contrastive losses with their gradients: plain torch on rows, with launches of the log-sum-exp over pairs and of its
gradient."""

from __future__ import annotations

from torch import Tensor

from sslkern.reference import contrastive as reference

from . import launch
from .pairwise_reduce import pairwise_logsumexp_bwd, pairwise_logsumexp_fwd


def contrastive_fwd(x: Tensor, *settings) -> reference.Results:
    """`sslkern.reference.contrastive.contrastive_fwd`."""
    with launch.on_device(x):
        return reference.contrastive_fwd(x, *settings, forward=pairwise_logsumexp_fwd, backward=pairwise_logsumexp_bwd)


launch.register("contrastive_fwd", contrastive_fwd)
