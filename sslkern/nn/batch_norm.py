"""The batch norm layers of torch.nn, computed by sslkern's kernels.

Constructors, state_dicts, behaviour and errors are those of torch.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core import internals, ranks
from ..ops.batch_norm import Activation, batch_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _recorded(input: object) -> bool:
    """Whether a tracer records this call. The recorded call may later run where this package is not installed."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or not isinstance(input, Tensor)


class _BatchNorm(internals.BatchNormBase):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # torch's own constructor has `bias` only since 2.13
            self.register_parameter("bias", None)
        _activate(self, activation)

    def forward(self, input: Tensor) -> Tensor:
        """y = (x - mean) / sqrt(var + eps) * weight + bias.

        `torch.jit.trace`, `torch.export` and the ONNX export record torch's own batch norm instead. torch.fx records a
        call of this layer.
        """
        if _recorded(input):
            if not isinstance(input, Tensor):
                return self._proxied(input)
            if self._group() is None:
                return super().forward(input)
        return self._normalise(input, None)

    def _normalise(self, input: Tensor, activation: Activation) -> Tensor:
        self._check_input_dim(input)
        # `self.weight` searches these dicts last, and takes as long as one of the checks
        parameters, buffers = internals.parameters(self), internals.buffers(self)
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean, variance, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and batches is not None:
            batches.add_(1)
            if self.momentum is None:  # momentum of the cumulative average, without a host sync
                momentum = batches.double().reciprocal()
        by_batch = self.training or (mean is None and variance is None)
        keep = not self.training or self.track_running_stats
        return batch_norm(
            input,
            weight,
            bias,
            mean if keep else None,
            variance if keep else None,
            by_batch,
            momentum,
            self.eps,
            activation,
            self._group(),
        )

    def _proxied(self, input: Any) -> Any:
        """What torch.fx records: a call of this layer, which can still be switched to training mode.

        If this layer itself is traced, without a model around it, its formula is recorded. This works only in eval
        mode.
        """
        if not isinstance(input, torch.fx.Proxy):
            raise TypeError(f"input must be a torch.Tensor of shape (N, C, ...), got {type(input).__name__}.")
        tracer: Any = input.tracer
        if tracer.root is not self:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        if self.training:
            raise ValueError(
                "torch.fx traces a standalone batch norm in eval mode only: call .eval(), or trace a model with it."
            )
        mean, var, by_batch = self.running_mean, self.running_var, self.running_mean is None
        formula: Any = nn.functional.batch_norm
        return formula(input, mean, var, self.weight, self.bias, by_batch, eps=self.eps)

    def _group(self) -> ProcessGroup | None:
        """The processes that share the statistics of the batch, or None if this process does not share them."""
        return None

    def __prepare_scriptable__(self) -> nn.Module:
        """The layer that `torch.jit.script` compiles: torch's own batch norm with the same parameters and buffers."""
        return convert_batchnorm(copy.copy(self), back=True)


class BatchNormReLU(nn.Sequential):
    """nn.Sequential(BatchNorm, ReLU), computed in one pass.

    With `activation="relu"`, a batch norm of sslkern becomes a layer of this class. Both layers are ordinary child
    modules, named "0" and "1". Tools that replace, fuse, prune, initialise or export batch norms therefore find the
    batch norm and keep the ReLU. The layers run one after the other if the first layer is not a batch norm of sslkern,
    if either layer has hooks, or if the call is traced or exported. State dicts have the keys "0.weight", "0.bias", and
    so on. The keys of a batch norm without ReLU ("weight", ...) can be loaded too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """relu((x - mean) / sqrt(var + eps) * weight + bias). x has a shape that the batch norm accepts."""
        if len(self._modules) == 2 and not _recorded(input):
            norm, relu = self._modules.values()
            if type(norm) in _TORCHS and type(relu) is nn.ReLU and not internals.hooked(norm, relu):
                return norm._normalise(input, "relu")  # type: ignore[operator]
        return super().forward(input)

    def __prepare_scriptable__(self) -> nn.Module:
        return nn.Sequential(*self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self[0].state_dict() if len(self) else ():
            if prefix + name in state_dict and f"{prefix}0.{name}" not in state_dict:
                state_dict[f"{prefix}0.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _activate(norm: nn.Module, activation: Activation) -> None:
    """If activation is "relu", turn `norm` into a `BatchNormReLU` in place, with the batch norm as its first child."""
    if activation is None:
        return
    if activation != "relu":
        raise ValueError(f"activation must be None or 'relu', got {activation!r}.")
    if type(norm) not in _TORCHS:
        raise TypeError(
            f"{type(norm).__name__} is a subclass of a batch norm of sslkern, and subclasses take no activation: "
            "put it and torch.nn.ReLU into a sslkern.nn.BatchNormReLU."
        )
    alone = copy.copy(norm)
    vars(norm).clear()
    norm.__class__ = BatchNormReLU
    nn.Sequential.__init__(norm, alone, nn.ReLU())  # type: ignore[call-overload]


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (N, C) and (N, C, L). With `activation="relu"`, the layer is a `BatchNormReLU`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (N, C, H, W). With `activation="relu"`, the layer is a `BatchNormReLU`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for (N, C, T, H, W). With `activation="relu"`, the layer is a `BatchNormReLU`."""


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm` for (N, C, ...), also on CPUs. With `activation="relu"`, the layer is a `BatchNormReLU`.

    In training, the statistics are those of the joint batch of all processes in `process_group`. None means all
    processes. `sslkern.ops.batch_norm` documents the formula, the collectives and the effect of an empty batch. In eval
    mode, with a single process, or without torch.distributed, this layer is a local batch norm and costs no more.

    The class is not a subclass of torch.nn.SyncBatchNorm, because DistributedDataParallel refuses that class on a CPU.
    """

    process_group: ProcessGroup | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group
        _activate(self, activation)

    _check_input_dim = internals.check_sync_input_dim

    def _group(self) -> ProcessGroup | None:
        world = ranks.world() if self.training else None
        return world if world is None or self.process_group is None else self.process_group

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
        """Convert every batch norm of a model to this class, in place.

        Parameters, buffers and hooks stay the same objects. The ReLU of a `BatchNormReLU` is kept.

        Args:
            module: any model. A layer is converted if its class is exactly BatchNorm1d, 2d, 3d or SyncBatchNorm of
                torch.nn or sslkern. Subclasses of a third party are not converted.
            process_group: the processes that share the statistics. None means all processes.

        Returns:
            The same module.

        Raises:
            TypeError: module is not a torch.nn.Module.
        """
        for layer in _found(module, _OURS | _TORCHS):
            layer.process_group = process_group  # type: ignore[assignment]
            layer.__class__ = cls
        return module


_OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def _found(module: nn.Module, types: dict[type, type]) -> list[nn.Module]:
    """The layers of a model whose class is exactly one of `types`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    return [layer for layer in module.modules() if type(layer) in types]


def convert_batchnorm(module: nn.Module, back: bool = False) -> nn.Module:
    """Convert every batch norm of a model from torch's class to sslkern's, in place; `back` does the reverse.

    Parameters, buffers and hooks stay the same objects, so optimizers and state_dicts remain valid. With `back`, a
    `BatchNormReLU` becomes a torch.nn.Sequential of torch's batch norm and ReLU, with the same state_dict keys.

    Args:
        module: any model. A layer is converted if its class is exactly BatchNorm1d, 2d, 3d or SyncBatchNorm. Subclasses
            of a third party are not converted. The process group of a layer is kept.
        back: whether to convert from sslkern's batch norms to torch's.

    Returns:
        The same module.

    Raises:
        TypeError: module is not a torch.nn.Module.
    """
    table = {**_TORCHS, BatchNormReLU: nn.Sequential} if back else _OURS
    for layer in _found(module, table):
        layer.__class__ = table[type(layer)]
    return module
