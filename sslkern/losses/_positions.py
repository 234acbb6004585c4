"""Reshaping of embeddings (N, D), (B, T, D), (B, C, H, W), ... to the shape (..., N, D) that the ops take."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ..core import checks

Positions = Literal["separate", "pooled"]


def to_stack(name: str, z: Tensor, dim: int, batch_dim: int, positions: str) -> Tensor:
    """Reshape z to (..., N, D): `batch_dim` becomes N, `dim` becomes D, and all other dimensions are positions.

    "separate" makes every position a slice with its own statistics. "pooled" counts every position as a sample. The
    result is a view of z, except that "pooled" copies z if its memory layout allows no such view. A contiguous
    (B, C, H, W) allows none; a channels-last one does.
    """
    plain = type(dim) is type(batch_dim) is int and dim == -1 and batch_dim == 0 and positions == "separate"
    if plain and isinstance(z, Tensor) and z.dim() == 2:
        return z  # the shape is right already, and making a view takes longer than all checks
    check_positions(dim, batch_dim, positions)
    if not isinstance(z, Tensor) or z.dim() < 2:
        return z  # the op raises the error
    if not (-z.dim() <= dim < z.dim() and -z.dim() <= batch_dim < z.dim()):
        raise ValueError(
            f"dim={dim} and batch_dim={batch_dim} must be dimensions of {name}, got shape {tuple(z.shape)}."
        )
    if (dim - batch_dim) % z.dim() == 0:
        raise ValueError(f"dim and batch_dim must differ, both are {dim % z.dim()} for {name} of {z.dim()} dimensions.")
    if positions == "separate":
        return z.movedim((batch_dim, dim), (-2, -1))
    return z.movedim(dim, -1).flatten(0, -2)


def check_positions(dim: object, batch_dim: object, positions: object) -> None:
    """Check the arguments that do not depend on a tensor."""
    for name, value in (("dim", dim), ("batch_dim", batch_dim)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}.")
    checks.one_of("positions", positions, get_args(Positions))


def over_slices(x: Tensor) -> Tensor:
    """The mean of x, which has one value for each slice of a stack. An x without dimensions is returned unchanged."""
    return x.mean() if x.dim() else x
