"""The data of a decomposition as a tensor with a mask, and the offset and the scale that free it of its units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype, short
from ._base import Array


@dataclass
class Observed:
    """Data in units of its own: X is `values` * `scale` + `offset` where `mask` is True, or everywhere without a mask.
    For the loss "poisson", which needs rates, X is `values` * `scale`, and the offset is a part of the model."""

    values: Tensor
    mask: Tensor | None
    offset: float
    scale: float

    @property
    def count(self) -> int:
        return self.values.numel() if self.mask is None else int(self.mask.sum())


def read(X: Array, mask: Array | None, device: torch.device | str | None) -> tuple[Tensor, Tensor | None]:
    """X as a float32 or float64 tensor, and the mask of the elements that count: those that are not NaN, and where the
    user's mask is True."""
    if isinstance(X, np.ma.MaskedArray):
        hidden = np.ma.getmaskarray(X)
        mask = ~hidden if mask is None else np.asarray(mask) & ~hidden
    x = _tensor(X).to(device=device)
    if x.dim() not in (2, 3) or x.numel() == 0:
        raise ValueError(f"X must be a matrix or a 3-way array with at least one element, got shape {tuple(x.shape)}.")
    observed = ~x.isnan()
    if mask is not None:
        given = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
        if given.dtype != torch.bool:
            raise TypeError(f"mask must be an array of bool, True where X is observed, got {short(given.dtype)}.")
        if given.shape != x.shape:
            raise ValueError(f"mask must have the shape of X, {tuple(x.shape)}, got {tuple(given.shape)}.")
        observed &= given.to(x.device)
    if bool((x.isinf() & observed).any()):
        raise ValueError("X must not contain infinity; mark a missing element by NaN or by mask=False.")
    if bool(observed.all()):
        return x, None
    if not bool(observed.any()):
        raise ValueError("X must have at least one observed element, got only NaN or masked ones.")
    return x, observed


def _tensor(X: Array) -> Tensor:
    if isinstance(X, Tensor):
        if X.layout != torch.strided or X.is_complex():
            raise TypeError(f"X must be a dense tensor of real numbers, got {X.layout} with {short(X.dtype)}.")
        return X.detach().to(accumulation_dtype(X))
    if hasattr(X, "toarray"):
        raise TypeError(f"X must be dense, got {type(X).__name__}: pass X.toarray(), and a mask if zeros are missing.")
    array = np.asarray(X)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"X must be an array of numbers, got {array.dtype}.")
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("=") if array.dtype == np.float32 else "f8"))


def standardize(x: Tensor, mask: Tensor | None, loss: str, signed: bool) -> Observed:
    """Divide by the scale of the observed elements, after subtracting their centre if the factors may be negative and
    the loss does not need rates. The centre and scale are the mean and the standard deviation, or, for the losses that
    resist outliers, the median and the mean deviation from it. Factors of one sign have no offset; their scale is the
    mean of |x|."""
    seen = x if mask is None else x[mask]
    largest = float(seen.abs().amax()) or 1.0
    seen = seen / largest  # so that no square overflows or vanishes
    if not signed:
        centre, spread = 0.0, float(seen.abs().mean())
    elif loss in ("l1", "huber"):
        centre = float(seen.median())
        spread = 1.2533 * float((seen - centre).abs().mean())  # the standard deviation, if the data were normal
    else:
        centre = float(seen.mean())
        spread = float((seen - centre).square().mean().sqrt())
    tiny = torch.finfo(x.dtype).eps * max(abs(centre), 1e-3)
    if spread <= tiny:  # constant data
        spread = 1.0 if loss == "poisson" and signed else tiny
    scaled = x / largest
    values = (scaled if loss == "poisson" else scaled - centre) / spread
    return Observed(values, mask, centre * largest, spread * largest)
