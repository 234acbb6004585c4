"""Layers of a network: their names, hooks that see their outputs, and pooling to one row of features for each input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core import checks
from ..core.dtypes import FLOATS
from ._networks import bare, kind

POOLS = ("mean", "max", "flatten")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_UNCHANGED = (nn.Identity, nn.Flatten, nn.Unflatten, *_DROPOUTS)
_SEQUENCES = (nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)
_AVERAGES: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class Call(NamedTuple):
    """The n-th call of the module at a path, and whether it returns a tensor, not a tuple or a dictionary of them."""

    path: str
    number: int
    plain: bool


class Layers:
    """The modules whose outputs are probed, and how each output becomes features.

    Attributes:
        paths: the name of each module as users see it -> its path in the model.
        named: whether the caller named them. Then what cannot be probed is an error, and is left out otherwise.
        left_out: the name of a layer -> why it is left out.
        calls: the name of each layer that was seen, in the order of the outputs -> where it is.
    """

    def __init__(self, model: nn.Module, layers: Any, pool: Any, channel_dim: Any) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("model must not be a TorchScript module: its parts run no hooks.")
        if any(is_lazy(parameter) for parameter in model.parameters()):
            raise ValueError("model must be initialised: call it once, since it has lazy parameters.")
        self.model, self.pool = model, Pool(pool, channel_dim)
        self.named = layers is not None
        self.paths = _named(model, layers) if self.named else _default(model)
        self.left_out: dict[str, str] = {}
        self.calls: dict[str, Call] = {}
        self._sequences = any(isinstance(part, _SEQUENCES) for part in model.modules())

    @contextmanager
    def watched(self, take: Callable[[str, Tensor], None]) -> Iterator[Callable[[int], None]]:
        """Call `take(name, features)` for each output of a layer while the model runs.

        The n-th call of a module in a batch is a layer of its own, "name:n" for n > 1. The value of the context is to
        be called before each batch, with its number of rows.
        """
        calls: dict[str, int] = {}
        rows, last = 0, None

        def begin(count: int) -> None:
            nonlocal rows, last
            rows, last = count, None
            calls.clear()

        def hook(name: str, part: nn.Module, output: Any) -> None:
            nonlocal last
            calls[name] = calls.get(name, 0) + 1
            layer = name if calls[name] == 1 else f"{name}:{calls[name]}"
            new = layer not in self.calls
            if layer in self.left_out or (x := self._features(layer, part, output, rows)) is None:
                return
            seen, last = last, None if self.named else (layer, output, x)
            if new and seen and _repeats(part, output, x, *seen[1:]):
                self.left_out[layer] = f"it returns the output of {seen[0]!r}"
                return
            self.calls.setdefault(layer, Call(self.paths[name], calls[name], isinstance(output, Tensor)))
            take(layer, x)

        def hooked(name: str) -> Callable[..., None]:
            return lambda part, _, output: hook(name, part, output)

        handles = []
        try:
            for name, path in self.paths.items():
                handles.append(self.model.get_submodule(path).register_forward_hook(hooked(name)))
            with uncompiled():
                yield begin
        finally:
            for handle in handles:
                handle.remove()

    def _features(self, layer: str, part: nn.Module, output: Any, rows: int) -> Tensor | None:
        """The features (rows, D) of an output. None if it cannot be probed and was not named."""
        x = first(output)
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            why = f"returns {kind(x)}, not a floating-point tensor"
        elif x.dim() < 1 or x.shape[0] != rows:
            why = f"returns shape {tuple(x.shape)} for a batch of {rows}"
        elif x.numel() == 0:
            why = f"returns no features, but shape {tuple(x.shape)}"
        else:
            if self.pool.guesses and self._unsure(part, x):
                raise ValueError(
                    f"channel_dim must be given for a network like this: layer {layer!r} returns shape "
                    f"{tuple(x.shape)}, whose channels may be dimension 1 or the last one."
                )
            return self.pool(x, layer)
        if self.named:
            raise ValueError(f"layers must be probeable, but {layer!r} {why}.")
        self.left_out[layer] = f"it {why}"
        return None

    def _unsure(self, part: nn.Module, x: Tensor) -> bool:
        """Whether the network tells that the usual dimension of the channels may be another here."""
        return self._sequences if x.dim() == 3 else x.dim() > 3 and _last(part)


class Pool:
    """From the output of a layer to features (N, D), in float32, or in float64 for float64."""

    def __init__(self, pool: Any, channel_dim: Any) -> None:
        grid = isinstance(pool, int) and not isinstance(pool, bool) and pool >= 1
        if not (callable(pool) or grid or (isinstance(pool, str) and pool in POOLS)):
            raise ValueError(
                f"pool must be 'mean', 'max', 'flatten', an int >= 1 or a function, got {checks.got(pool)}."
            )
        if channel_dim not in (None, 1, -1) or isinstance(channel_dim, bool):
            raise ValueError(f"channel_dim must be 1, -1 or None, got {checks.got(channel_dim)}.")
        self.pool, self.channel_dim = pool, channel_dim
        self.guesses = channel_dim is None and not callable(pool) and pool != "flatten"

    def __call__(self, x: Tensor, layer: str = "output") -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if callable(self.pool):
            out = self.pool(x)
            if not isinstance(out, Tensor) or out.dtype not in FLOATS or out.dim() != 2 or len(out) != len(x):
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(
                    f"pool must return floating-point features of shape ({len(x)}, D) for layer {layer!r} of shape "
                    f"{tuple(x.shape)}, got {got}."
                )
            return out.to(dtype)
        if x.dim() < 3 or self.pool == "flatten":
            return x.reshape(len(x), -1).to(dtype)
        x = x.movedim(self.channel_dim or (-1 if x.dim() == 3 else 1), 1)
        places = tuple(range(2, x.dim()))
        if self.pool == "mean":
            return x.mean(places, dtype=dtype)
        if self.pool == "max":
            return x.amax(places).to(dtype)
        if len(places) not in _AVERAGES:
            raise ValueError(f"pool must be a name or a function for layer {layer!r} of shape {tuple(x.shape)}.")
        grid = [min(self.pool, side) for side in x.shape[2:]]
        return _AVERAGES[len(places)](x.to(dtype), grid).flatten(1)


def first(output: Any) -> Any:
    """The tensor that a layer returns, or the first one of a tuple or a dictionary."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return output[0] if isinstance(output, tuple | list) and output else output


def chain(part: nn.Module) -> bool:
    """Whether a module calls its parts one after the other."""
    return isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward


def shown(path: str) -> str:
    """The path of a module without the wrappers of `torch.compile`."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _named(model: nn.Module, layers: Any) -> dict[str, str]:
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise TypeError(f"layers must be a list of names of modules of the model, or None, got {layers!r}.")
    known = {name: path for path, _ in model.named_modules(remove_duplicate=False) for name in (path, shown(path))}
    seen: dict[int, str] = {}
    for name in layers:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"layers must be names of modules of the model, got {name!r}.")
        part = model.get_submodule(known[name])
        if seen.setdefault(id(part), name) is not name or list(layers).count(name) > 1:
            raise ValueError(
                f"layers must name each module once, got {seen[id(part)]!r} and {name!r} for the same one."
            )
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"layers must be modules that are called, but {name!r} is a {type(part).__name__}.")
    return {name: known[name] for name in layers}


def _default(model: nn.Module) -> dict[str, str]:
    """All modules inside the model, but for containers, and for those that only drop, reshape or pass on."""
    found = {}
    for path, part in model.named_modules():
        container = isinstance(part, nn.ModuleList | nn.ModuleDict) or chain(part)
        if not container and not isinstance(part, _UNCHANGED) and bare(part) is part and (path or not _parts(model)):
            found[shown(path)] = path
    if not found:
        raise ValueError("model must have modules that can be probed, but it has only containers.")
    return found


def _parts(model: nn.Module) -> bool:
    return any(True for _ in model.children())


def _last(part: nn.Module) -> bool:
    """Whether the channels of a module are surely the last dimension of its output."""
    return isinstance(part, nn.Linear) or (isinstance(part, nn.LayerNorm) and len(part.normalized_shape) == 1)


def _repeats(part: nn.Module, output: Any, x: Tensor, before: Any, x_before: Tensor) -> bool:
    """Whether a module returns what a module inside it has returned, unchanged."""
    return _parts(part) and output is before and torch.equal(x, x_before)


def uncompiled() -> Any:
    """A context in which compiled functions run as they were written, since compiled ones may pass hooks by. If
    `torch._dynamo` is not loaded, nothing is compiled, and it is not loaded here."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
