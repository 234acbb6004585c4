"""torch.nn's batch norms on sslkern's kernels: constructor, state_dict, behaviour and errors are torch's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.batch_norm import Activation, batch_norm


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    activation: Activation

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        if activation not in (None, "relu"):
            raise ValueError(f"activation must be None or 'relu', got {activation!r}.")
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """y = (x - mean) / sqrt(var + eps) * weight + bias, and relu of it where `activation="relu"`."""
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
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
        )

    def extra_repr(self) -> str:
        """torch's settings, and the activation where there is one."""
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (N, C) and (N, C, L), with `activation=None | "relu"` fused behind it."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (N, C, H, W), with `activation=None | "relu"` fused behind it."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for (N, C, T, H, W), with `activation=None | "relu"` fused behind it."""


_OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def convert_batchnorm(module: nn.Module, back: bool = False) -> nn.Module:
    """Switch every batch norm of a model over to sslkern's, or `back` to torch's, in place.

    Parameters, buffers and hooks stay the same objects, so optimizers and state_dicts go on as they are.

    Args:
        module: any model; only torch.nn.BatchNorm1d, 2d and 3d themselves are switched, no subclass of a third party.
        back: from sslkern's to torch's.

    Returns:
        The module.

    Raises:
        TypeError: not a torch.nn.Module. ValueError: `back` of a layer with an activation, which torch's does not have.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    table = _TORCHS if back else _OURS
    found = [layer for layer in module.modules() if type(layer) in table]
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
