"""Networks as people hand them over: compiled, wrapped for several processes, in training mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..core.dtypes import short


def bare(net: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DistributedDataParallel` and `DataParallel`."""
    while True:
        if isinstance(net, DataParallel | DistributedDataParallel):
            net = net.module
        elif isinstance(inner := getattr(net, "_orig_mod", None), nn.Module):
            net = inner
        else:
            return net


def module(name: str, net: Any) -> nn.Module:
    """Check that `net` is a module, and return the one inside its wrappers."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {kind(net)}.")
    return bare(net)


def inputs(name: str, x: Any, least: int = 1) -> Tensor:
    """Check that x is a floating-point batch (N, ...) with at least `least` rows."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {kind(x)}.")
    if x.dim() < 1 or x.shape[0] < least:
        raise ValueError(f"{name} must have at least {least} row{'s'[: least > 1]}, got shape {tuple(x.shape)}.")
    return x


def check_point(net: nn.Module, x: Tensor) -> None:
    """Check that x is finite, and float32 or float64 as the parameters of the network."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {short(x.dtype)}.")
    if x.numel() == 0:
        raise ValueError(f"x must have at least one number, got shape {tuple(x.shape)}.")
    for name, parameter in net.named_parameters():
        if parameter.is_floating_point() and (parameter.dtype, parameter.device) != (x.dtype, x.device):
            ours, theirs = (f"{short(t.dtype)} on {t.device}" for t in (x, parameter))
            raise TypeError(f"x must have the dtype and the device of net, {theirs} ({name}), got {ours}.")
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite, but it contains NaN or infinity.")


@contextmanager
def evaluating(net: Any) -> Iterator[None]:
    """Run a module in evaluation mode, and set every part of it back to its mode. Does nothing to a function."""
    modes = [(part, part.training) for part in net.modules()] if isinstance(net, nn.Module) else []
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training


def kind(value: object) -> str:
    return f"a tensor of {short(value.dtype)}" if isinstance(value, Tensor) else type(value).__name__


def first_sentence(error: Exception) -> str:
    """What an exception reports, without its last full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
