"""Generators of the factors of a decomposition: modules whose output, without an input, is an (n, rank) matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks

Factory = Callable[[int, int], nn.Module]
_CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
_FEW = 4  # a mode with fewer elements has a free factor instead of convolutions


class FreeFactor(nn.Module):
    """A factor without a prior: its (n, rank) elements are the parameters."""

    def __init__(self, n: int, rank: int):
        super().__init__()
        checks.positive("n", n)
        checks.positive("rank", rank)
        self.factor = nn.Parameter(0.3 * torch.randn(n, rank))

    def forward(self) -> Tensor:
        return self.factor


class ConvGenerator(nn.Module):
    r"""A convolutional decoder with a learnt input, whose output is an (n, rank) factor that is smooth along its mode.

    The input, `width` channels on a coarse grid, is a parameter. One block per resolution follows, each a convolution
    of 3 elements per axis with reflected borders, batch norm over the grid, and leaky ReLU of slope 0.2. Between the
    blocks, linear interpolation roughly doubles each axis, until the grid has n elements. A convolution of 1 element
    maps the channels to the `rank` columns.

    Args:
        n: the number of rows of the factor.
        rank: the number of its columns.
        width: the number of channels of each block.
        coarsest: the largest size of an axis of the input's grid; 2 or more.
        grid: None for a mode that is a line; or the lengths of the 1, 2 or 3 axes of the grid whose points, the last
            axis fastest, are the rows of the factor, such as (height, width) for the pixels of flattened images. Their
            product is n, and each is at least 2.

    Raises:
        ValueError: a size is out of its range, or n is not the product of `grid`.

    Source: Saragadam et al., DeepTensor: low-rank tensor decomposition with deep network priors (2204.03145).
    """

    def __init__(
        self, n: int, rank: int, *, width: int = 128, coarsest: int = 16, grid: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        for name, value in (("n", n), ("rank", rank), ("width", width)):
            checks.positive(name, value)
        if not isinstance(coarsest, int) or coarsest < 2:
            raise ValueError(f"coarsest must be an integer >= 2, got {coarsest!r}.")
        axes = (n,) if grid is None else tuple(int(size) for size in grid)
        if not 1 <= len(axes) <= 3 or min(axes) < 2 or math.prod(axes) != n:
            raise ValueError(f"grid must have 1 to 3 axes of at least 2 elements each and n = {n} in all, got {axes}.")
        levels = max(0, math.ceil(math.log2(max(axes) / coarsest)))
        self.sizes = [tuple(max(2, round(a / 2 ** (levels - k))) for a in axes) for k in range(levels + 1)]
        self.interpolation = _INTERPOLATION[len(axes)]
        convolution, batch_norm = _CONVOLUTION[len(axes)], _BATCH_NORM[len(axes)]
        self.z = nn.Parameter(0.1 * torch.randn(1, width, *self.sizes[0]))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                convolution(width, width, 3, padding=1, padding_mode="reflect"),
                batch_norm(width, track_running_stats=False),
                nn.LeakyReLU(0.2),
            )
            for _ in self.sizes
        )
        self.out = convolution(width, rank, 1)

    def forward(self) -> Tensor:
        x: Tensor = self.z
        for size, block in zip(self.sizes, self.blocks, strict=True):
            if x.shape[2:] != size:
                x = F.interpolate(x, size=size, mode=self.interpolation)
            x = block(x)
        return self.out(x)[0].flatten(1).mT


def factory(name: str, generator: object) -> Factory:
    """The function (n, rank) -> module that a value of the parameter `generator` stands for."""
    if generator == "free":
        return FreeFactor
    if generator == "conv":
        return lambda n, rank: ConvGenerator(n, rank) if n >= _FEW else FreeFactor(n, rank)
    if isinstance(generator, nn.Module):
        raise TypeError(
            f"{name} must be a function (n, rank) -> nn.Module, not a module: each fit starts from new parameters."
        )
    if not callable(generator):
        raise ValueError(f"{name} must be 'conv', 'free' or a function (n, rank) -> nn.Module, got {generator!r}.")
    return generator


def build(generator: object, shape: Sequence[int], rank: int) -> list[nn.Module]:
    """One module per mode, on the CPU."""
    if isinstance(generator, list | tuple):
        if len(generator) != len(shape):
            raise ValueError(f"generator must have one entry per mode of X, {len(shape)}, got {len(generator)}.")
        each = [factory(f"generator[{k}]", entry) for k, entry in enumerate(generator)]
    else:
        each = [factory("generator", generator)] * len(shape)
    modules = [make(n, rank) for make, n in zip(each, shape, strict=True)]
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"generator must return an nn.Module, got {type(module).__name__}.")
    return modules
