"""What users give as a relation, checked: sizes, indices, weights, labels and matrices as tensors on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import accumulation_dtype, short


def as_size(name: str, value: Any) -> int:
    """A Python or NumPy integer >= 1."""
    checks.positive(name, value)
    return int(value)


def _as_tensor(name: str, value: Any) -> Tensor:
    """An array of numbers, a tensor or a list as a dense tensor without a gradient, on the device where it is."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_complex():
            raise TypeError(f"{name} must be dense and real, got {value.layout} with {short(value.dtype)}.")
        return value.detach()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of numbers, got {array.dtype}.")
    native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64
    return torch.from_numpy(np.array(array, native))


def _one_axis(name: str, value: Tensor, least: int = 0) -> Tensor:
    if value.dim() != 1 or value.numel() < least:
        of = f" with at least {least} element(s)" if least else ""
        raise ValueError(f"{name} must be one-dimensional{of}, got shape {tuple(value.shape)}.")
    return value.cpu()


def as_indices(name: str, value: Any, n: int) -> Tensor:
    """Indices of samples in [0, n), as int64."""
    index = _one_axis(name, _as_tensor(name, value))
    if (index.is_floating_point() and index.numel()) or index.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {short(index.dtype)}.")
    index = index.long()
    if index.numel():
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"{name} must be in [0, {n}), got [{low}, {high}].")
    return index


def as_edge_weights(weight: Any, count: int) -> Tensor:
    """One finite number >= 0 for each edge, in float64."""
    if weight is None:
        return torch.ones(count, dtype=torch.float64)
    weight = _one_axis("weight", _as_tensor("weight", weight)).double()
    if weight.numel() != count:
        raise ValueError(f"weight must have one number for each of the {count} edges, got {weight.numel()}.")
    _check_weights("weight", weight)
    return weight


def _check_weights(name: str, weight: Tensor) -> None:
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError(f"{name} must be finite and >= 0, but its range is {_range(weight)}.")


def _range(value: Tensor) -> str:
    return "NaN" if bool(value.isnan().any()) else f"[{value.min():g}, {value.max():g}]"


def as_rows(x: Any) -> Tensor:
    """Finite samples (N, D) in float32 or float64, on the device where they are."""
    x = _as_tensor("x", x)
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (N, D) with at least one row and one column, got {tuple(x.shape)}.")
    x = x if x.dtype == torch.float32 else x.to(accumulation_dtype(x)) if x.is_floating_point() else x.double()
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite, but it contains NaN or infinity.")
    return x


def as_labels(labels: Any, unlabelled: int | str | None, name: str = "labels") -> tuple[Tensor, int]:
    """The number of the class of each sample, (N,), and the number of classes. A sample without a label is a class."""
    if isinstance(labels, Tensor):
        labels = _as_tensor(name, labels).cpu()
        labels = (labels.float() if labels.dtype in (torch.bfloat16, torch.float16) else labels).numpy()
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"{name} must have shape (N,) with N >= 1, got shape {labels.shape}.")
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.round(labels)):
        raise ValueError(f"{name} must be integers or strings: classes, not continuous numbers or NaN.")
    if labels.dtype.kind not in "biufUSO":
        raise TypeError(f"{name} must be integers or strings, got {labels.dtype}.")
    try:
        found, label = np.unique(labels, return_inverse=True)
    except TypeError as error:
        raise TypeError(f"{name} must be all integers or all strings, got a mixture of types.") from error
    if unlabelled == "auto":
        unlabelled = -1 if labels.dtype.kind in "if" and not np.array_equal(found, (-1, 1)) else None
    number = torch.from_numpy(label.astype(np.int64))
    alone = torch.zeros(number.numel(), dtype=torch.bool)
    if unlabelled is not None:
        alone = torch.from_numpy(np.asarray(labels == unlabelled) & np.ones(labels.shape, bool))
    number[alone] = found.size + torch.arange(int(alone.sum()))
    number = torch.unique(number, return_inverse=True)[1]
    return number, int(number.max()) + 1


def symmetric_entries(name: str, g: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows, columns and values of the upper triangle of an adjacency matrix, and its size."""
    row, column, value, shape = _entries(name, g)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(shape)}.")
    n = int(shape[0])
    _check_weights(name, value)
    upper = row < column
    key, place = torch.unique(torch.minimum(row, column) * n + torch.maximum(row, column), return_inverse=True)
    sides = value.new_zeros(2, key.numel())
    sides[0].index_add_(0, place[upper], value[upper])
    sides[1].index_add_(0, place[row > column], value[row > column])
    gap = (sides[0] - sides[1]).abs()
    if bool((gap > 1e-5 * sides.amax(0)).any()):
        raise ValueError(
            f"{name} must be symmetric, as ({name} + {name}.T)/2 is, but two entries differ by {gap.max():g}."
        )
    return key // n, key % n, sides.mean(0), n


def _entries(name: str, g: Any) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Rows, columns and values of the entries of a matrix other than 0, and its shape."""
    if hasattr(g, "tocoo"):  # of scipy.sparse
        coo = g.tocoo()
        if coo.ndim != 2:
            raise ValueError(f"{name} must be a square matrix, got shape {coo.shape}.")
        if coo.dtype.kind not in "biuf":
            raise TypeError(f"{name} must have real numbers, got {coo.dtype}.")
        row, column, value = (torch.from_numpy(np.array(part)) for part in (coo.row, coo.col, coo.data))
        return row.long(), column.long(), value.double(), coo.shape
    if isinstance(g, Tensor) and g.layout != torch.strided and not g.is_complex():
        coo = g.detach().cpu().to_sparse_coo().coalesce()
        if coo.sparse_dim() != 2 or coo.dense_dim():
            raise ValueError(f"{name} must be a square matrix, got shape {tuple(g.shape)}.")
        return coo.indices()[0], coo.indices()[1], coo.values().double(), tuple(g.shape)
    dense = _as_tensor(name, g).cpu().double()
    if dense.dim() != 2:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(dense.shape)}.")
    row, column = dense.nonzero(as_tuple=True)
    return row, column, dense[row, column], tuple(dense.shape)
