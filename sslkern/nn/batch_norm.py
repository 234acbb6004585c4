"""torch.nn's batch norms on sslkern's kernels: constructor, state_dict, behaviour and errors are torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import _torch
from ..ops.batch_norm import Activation, batch_norm
from ..train import distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _BatchNorm(_torch.BatchNormBase):
    activation: Activation

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        if activation not in (None, "relu"):
            raise ValueError(f"activation must be None or 'relu', got {activation!r}.")
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """y = (x - mean) / sqrt(var + eps) * weight + bias, and relu of it where `activation="relu"`."""
        self._check_input_dim(input)
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average, without a look at the number
                momentum = self.num_batches_tracked.double().reciprocal()
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        keep = not self.training or self.track_running_stats
        return batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            by_batch,
            momentum,
            self.eps,
            self.activation,
            self._group(),
        )

    def _group(self) -> ProcessGroup | None:
        """The processes that share the statistics of the batch."""
        return None

    def extra_repr(self) -> str:
        """torch's settings, and the activation where there is one."""
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (N, C) and (N, C, L), with `activation=None | "relu"` fused behind it."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (N, C, H, W), with `activation=None | "relu"` fused behind it."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for (N, C, T, H, W), with `activation=None | "relu"` fused behind it."""


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm` for (N, C, ...) on CPUs too, with `activation=None | "relu"` fused behind it.

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
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        self.process_group = process_group

    _check_input_dim = _torch.check_sync_input_dim

    def _group(self) -> ProcessGroup | None:
        world = distributed.world() if self.training else None
        return world if world is None or self.process_group is None else self.process_group

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
        """Make every batch norm of a model one of these, in place.

        Parameters, buffers and hooks stay the same objects, and an activation stays.

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
            layer.activation = getattr(layer, "activation", None)  # type: ignore[assignment]
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

    Parameters, buffers and hooks stay the same objects, so optimizers and state_dicts go on as they are.

    Args:
        module: any model; only torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm themselves are switched, no subclass of a
            third party. A process group stays.
        back: from sslkern's to torch's.

    Returns:
        The module.

    Raises:
        TypeError: not a torch.nn.Module. ValueError: `back` of a layer with an activation, which torch's does not have.
    """
    table = _TORCHS if back else _OURS
    found = _found(module, table)
    for layer in found:
        if back and getattr(layer, "activation", None) is not None:
            raise ValueError("A batch norm with activation='relu' has no counterpart in torch.nn to convert back to.")
    for layer in found:
        layer.__class__ = table[type(layer)]
        if back:
            del layer.activation
        else:
            layer.activation = None  # type: ignore[assignment]
    return module
