"""torch.nn's batch norms on sslkern's kernels: constructor, state_dict, behaviour and errors are torch's."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _torch
from ..ops.batch_norm import Activation, batch_norm
from ..train import distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _recorded(input: object) -> bool:
    """Whether a tracer writes down what is done, to be run where this package may be missing."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or not isinstance(input, Tensor)


class _BatchNorm(_torch.BatchNormBase):
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
        if not bias:  # torch's constructor takes `bias` from 2.13 on
            self.register_parameter("bias", None)
        _activate(self, activation)

    def forward(self, input: Tensor) -> Tensor:
        """y = (x - mean) / sqrt(var + eps) * weight + bias.

        `torch.jit.trace`, `torch.export` and ONNX record torch's own batch norm, and torch.fx a call of this layer.
        """
        if _recorded(input):
            if not isinstance(input, Tensor):
                return self._proxied(input)
            if self._group() is None:
                return super().forward(input)
        return self._normalise(input, None)

    def _normalise(self, input: Tensor, activation: Activation) -> Tensor:
        self._check_input_dim(input)
        # where they are: `self.weight` looks there last, and takes as long as a check of ours
        parameters, buffers = _torch.parameters(self), _torch.buffers(self)
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean, variance, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and batches is not None:
            batches.add_(1)
            if self.momentum is None:  # the cumulative average, without a look at the number
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
        """What torch.fx records: a call of this layer, which may still be switched to training; the formula, in eval,
        where the layer is all there is."""
        if not isinstance(input, torch.fx.Proxy):
            raise TypeError(f"input must be a torch.Tensor of shape (N, C, ...), got {type(input).__name__}.")
        tracer: Any = input.tracer
        if tracer.root is not self:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        if self.training:
            raise ValueError(
                "torch.fx traces a batch norm by itself in eval only: call .eval(), or trace a model of it."
            )
        mean, var, by_batch = self.running_mean, self.running_var, self.running_mean is None
        formula: Any = nn.functional.batch_norm
        return formula(input, mean, var, self.weight, self.bias, by_batch, eps=self.eps)

    def _group(self) -> ProcessGroup | None:
        """The processes that share the statistics of the batch."""
        return None

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: torch's own layer, of the same parameters and buffers."""
        return convert_batchnorm(copy.copy(self), back=True)


class BatchNormReLU(nn.Sequential):
    """nn.Sequential(BatchNorm, ReLU) in one pass: what sslkern's batch norms with `activation="relu"` are.

    The layers are ordinary children, "0" and "1": whatever replaces, fuses, prunes, initialises or exports batch norms
    finds the one and keeps the other. They run one after the other where the first is no batch norm of sslkern, where
    one of them has hooks, and where they are traced or exported. State dicts hold "0.weight", ...; those of a bare
    batch norm ("weight", ...) are loaded too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """relu((x - mean) / sqrt(var + eps) * weight + bias)"""
        if len(self._modules) == 2 and not _recorded(input):
            norm, relu = self._modules.values()
            if type(norm) in _TORCHS and type(relu) is nn.ReLU and not _torch.hooked(norm, relu):
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
    """Make a new batch norm the `BatchNormReLU` of itself, where it is to have a relu."""
    if activation is None:
        return
    if activation != "relu":
        raise ValueError(f"activation must be None or 'relu', got {activation!r}.")
    if type(norm) not in _TORCHS:
        raise TypeError(
            f"{type(norm).__name__} is a subclass of a batch norm of sslkern, which takes no activation: "
            "put it and torch.nn.ReLU into a sslkern.nn.BatchNormReLU."
        )
    alone = copy.copy(norm)
    vars(norm).clear()
    norm.__class__ = BatchNormReLU
    nn.Sequential.__init__(norm, alone, nn.ReLU())  # type: ignore[call-overload]


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (N, C) and (N, C, L); with `activation="relu"` a `BatchNormReLU` of it."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (N, C, H, W); with `activation="relu"` a `BatchNormReLU` of it."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for (N, C, T, H, W); with `activation="relu"` a `BatchNormReLU` of it."""


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm` for (N, C, ...) on CPUs too; with `activation="relu"` a `BatchNormReLU` of it.

    In training, the statistics are those of the batches of all processes of `process_group` (None: of all there are) as
    one; `sslkern.ops.batch_norm` tells the formula, the collectives and what an empty batch does. In eval, with one
    process, or without torch.distributed, it is a local batch norm and costs no more.

    No subclass of torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on a CPU.
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

    _check_input_dim = _torch.check_sync_input_dim

    def _group(self) -> ProcessGroup | None:
        world = distributed.world() if self.training else None
        return world if world is None or self.process_group is None else self.process_group

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
        """Make every batch norm of a model one of these, in place.

        Parameters, buffers and hooks stay the same objects, and a relu stays behind its batch norm.

        Args:
            module: any model; torch.nn's and sslkern's BatchNorm1d, 2d, 3d and SyncBatchNorm themselves are switched,
                no subclass of a third party.
            process_group: processes that share the statistics; None is all.

        Returns:
            The module.

        Raises:
            TypeError: not a torch.nn.Module.
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
    """The layers of a model that are exactly of these types."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    return [layer for layer in module.modules() if type(layer) in types]


def convert_batchnorm(module: nn.Module, back: bool = False) -> nn.Module:
    """Switch every batch norm of a model over to sslkern's, or `back` to torch's, in place.

    Parameters, buffers and hooks stay the same objects, so optimizers and state_dicts go on as they are. Back, a batch
    norm with `activation="relu"` becomes a torch.nn.Sequential of torch's batch norm and ReLU, under the same names.

    Args:
        module: any model; only torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm themselves are switched, no subclass of a
            third party. A process group stays.
        back: from sslkern's to torch's.

    Returns:
        The module.

    Raises:
        TypeError: not a torch.nn.Module.
    """
    table = {**_TORCHS, BatchNormReLU: nn.Sequential} if back else _OURS
    for layer in _found(module, table):
        layer.__class__ = table[type(layer)]
    return module
