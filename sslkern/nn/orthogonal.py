"""Layers with orthogonal or unitary weights. During training, `sslkern.ops.rank_k_update_` keeps them orthogonal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks, internals
from ..core.dtypes import short
from ..ops import factored_linear
from .init import BY_NAME, Init, one_of_dtypes, uniform_


class OrthogonalModule(nn.Module):
    """A layer whose attribute `orthogonal_names` lists which of its own parameters have orthonormal columns.

    The attribute is an iterable of strings, on the class or on the instance. `orthogonal_parameters` accepts any module
    that has it, whether or not the module is of this class. All that this class adds to `nn.Module` is that conversions
    of the dtype keep complex parameters complex and real ones real. Both `.double()` and `.to(torch.complex128)`
    convert them to complex128 and float64.
    """

    orthogonal_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthogonalModule:
        def of_its_kind(t: Tensor) -> Tensor:
            moved = fn(torch.view_as_real(t) if t.is_complex() else t)
            moved = moved.real.contiguous() if moved.is_complex() else moved
            if t.is_complex() and moved.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{type(self).__name__} has complex weights, which are complex64 or complex128: they cannot become "
                    f"{short(moved.dtype)}."
                )
            return torch.view_as_complex(moved.contiguous()) if t.is_complex() else moved

        return super()._apply(of_its_kind, recurse)


def orthogonal_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model whose columns must stay orthonormal, for `sslkern.optim.ProjUNN`.

    Each module lists its own such parameters in the attribute `orthogonal_names`, like the layers of `sslkern.nn`. A
    shared parameter is returned once.

        optimizers = [ProjUNN(orthogonal_parameters(model), lr=1e-4), torch.optim.Adam(other_parameters(model))]

    Args:
        module: any model.

    Returns:
        An iterator of parameters (..., n, p), n >= p, in the order of `module.parameters()`.

    Raises:
        TypeError: module is not a torch.nn.Module.
    """
    ours = _orthogonal_ids(module)
    return (p for p in module.parameters() if id(p) in ours)


def other_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters of a model that are not among its `orthogonal_parameters`.

    Args:
        module: any model.

    Returns:
        An iterator of parameters, in the order of `module.parameters()`.

    Raises:
        TypeError: module is not a torch.nn.Module.
    """
    ours = _orthogonal_ids(module)
    return (p for p in module.parameters() if id(p) not in ours)


def _orthogonal_ids(module: nn.Module) -> set[int]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    return {
        id(internals.parameters(layer)[name])
        for layer in module.modules()
        for name in getattr(layer, "orthogonal_names", ())
        if internals.parameters(layer).get(name) is not None
    }


class OrthogonalLinear(OrthogonalModule):
    """y = x W^T + b, where W has orthonormal columns, or orthonormal rows if it has more columns than rows.

    W is (out_features, in_features), as in torch.nn.Linear, and `weight` returns it. The parameter is `weight_u`, which
    never has more columns than rows, as `rank_k_update_` requires: it is W for out_features >= in_features, and W^T
    otherwise. So `weight` is the parameter or a view of it. For out_features >= in_features, the layer preserves the
    norm of its input, |W x| = |x|. For out_features <= in_features, it preserves the norm of the gradient,
    |W^T dy| = |dy|.

    Args:
        in_features, out_features: at least 1.
        bias: whether to add b, (out_features,), initialised uniformly in +-1 / sqrt(in_features) as in torch.nn.Linear.
        init: the initialisation of `weight_u`, a name in `sslkern.nn.init`: "haar" or "identity"; for a square weight
            also "henaff" or "cayley".
        device, dtype: the device and the dtype of the parameters; float32, float64, complex64 or complex128. The input
            must have the same dtype.
        factored: whether the backward keeps the factors of the gradient of `weight_u` instead of the gradient, as in
            `FactoredLinear`. The factors have one row for each row of the input. `sslkern.optim.ProjUNN` then takes its
            step of plain gradient descent without forming a matrix of the size of the weight. Neither input nor output
            may be modified in place before that step.

    Raises:
        ValueError: a size is below 1, or `init` is unknown, or `init` needs a square weight and W is not square.
        TypeError: another dtype.

    Source: Kiani et al., projUNN (2203.05483).
    """

    orthogonal_names = ("weight_u",)
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init: Init = "haar",
        device: Any = None,
        dtype: torch.dtype | None = None,
        factored: bool = False,
    ) -> None:
        super().__init__()
        checks.positive("in_features", in_features)
        checks.positive("out_features", out_features)
        checks.one_of("init", init, get_args(Init))
        dtype = one_of_dtypes(dtype)
        self.in_features, self.out_features, self.init, self.factored = in_features, out_features, init, factored
        tall = max(in_features, out_features), min(in_features, out_features)
        self.weight_u = nn.Parameter(torch.empty(tall, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters again."""
        BY_NAME[self.init](self.weight_u)
        if self.bias is not None:
            uniform_(self.bias, self.in_features**-0.5)

    @property
    def weight(self) -> Tensor:
        """W, (out_features, in_features). Gradients flow through it to `weight_u`."""
        return self.weight_u if self.out_features >= self.in_features else self.weight_u.mT

    def forward(self, input: Tensor) -> Tensor:
        """Map an input (..., in_features) to (..., out_features)."""
        if not self.factored:
            return F.linear(input, self.weight, self.bias)
        wide = self.out_features < self.in_features
        y = factored_linear.linear(input, self.weight_u, orthogonal=True, wide=wide)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """The settings that torch.nn.Linear shows, and the initialisation."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"init={self.init!r}" + (", factored=True" if self.factored else "")
        )
