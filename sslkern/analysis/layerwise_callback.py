"""A callback of Lightning's Trainer that probes the layers of a network while it trains."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core import checks
from .layerwise_probe import LayerwiseProbe, layerwise_probe


class LayerwiseProbeCallback:
    """Runs `layerwise_probe` at the end of training epochs, and logs the accuracy of each layer.

        Trainer(callbacks=[LayerwiseProbeCallback(train_loader, validation=test_loader, every_n_epochs=5)])

    It logs "probe/<layer>", the accuracy of the layer at its best strength, with `pl_module.log`. Lightning is not
    needed to import this class. If `lightning` or `pytorch_lightning` is imported when a callback is made, the callback
    is an instance of its `Callback` class too.

    Args:
        loader: labelled batches (x, y). The batches of self-supervised training usually have no labels, so the
            trainer's own loader is not used.
        part: the name of the part of the LightningModule that is probed, as in `get_submodule`. "" is the whole module,
            whose forward must then take x.
        every_n_epochs: probe at the end of each n-th epoch: after n, 2n, ... epochs.
        prefix: of the names in the log.
        settings: the other arguments of `layerwise_probe`: layers, validation, strengths, pool, channel_dim, folds and
            group. With several processes, each runs the callback: give each its part of the samples and group="world",
            or all samples and no group.

    Attributes:
        result: the last `LayerwiseProbe`, or None.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> LayerwiseProbeCallback:
        return object.__new__(_class(cls))

    def __init__(
        self, loader: Iterable[Any], *, part: str = "", every_n_epochs: int = 1, prefix: str = "probe", **settings: Any
    ) -> None:
        checks.positive("every_n_epochs", every_n_epochs)
        for name, value in (("part", part), ("prefix", prefix)):
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {type(value).__name__}.")
        self.loader, self.part, self.every_n_epochs, self.prefix = loader, part, every_n_epochs, prefix
        self.settings = settings
        self.result: LayerwiseProbe | None = None

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Called by the trainer."""
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        self.result = layerwise_probe(pl_module.get_submodule(self.part), self.loader, **self.settings)
        for layer, accuracy in zip(self.result.layers, self.result.best_accuracy.tolist(), strict=True):
            pl_module.log(f"{self.prefix}/{layer}", accuracy)  # type: ignore[operator]

    def __reduce__(self) -> tuple[Any, ...]:
        ours = next(c for c in type(self).__mro__ if not getattr(c, "_made", False))
        return _remade, (ours, self.__dict__)


_MADE: dict[tuple[type, ...], type] = {}


def _class(cls: type) -> type:
    """The class, with the `Callback` classes of Lightning that are imported as further bases."""
    modules = (sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning"))
    bases = tuple(base for m in modules if (base := getattr(m, "Callback", None)) is not None)
    if not bases or issubclass(cls, bases):
        return cls
    key = (cls, *bases)
    if key not in _MADE:
        _MADE[key] = type(cls.__name__, key, {"__module__": cls.__module__, "__doc__": cls.__doc__, "_made": True})
    return _MADE[key]


def _remade(cls: type, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(_class(cls))
    made.__dict__.update(state)
    return made
