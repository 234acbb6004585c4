"""The two passes of a layerwise probe: sums of the features, then predictions. The ranks of a group meet in between."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import collectives
from ..core.collectives import Peers
from ..core.dtypes import short
from ._networks import kind
from ._probe_layers import Layers
from ._probe_moments import Rows
from ._probe_ridge import Probe, solve


class Stream:
    """The state of one call of `layerwise_probe`.

    Attributes:
        device: where the model is.
        classes: the labels. While `train` runs in the order in which they come; then sorted, of all ranks.
        features: the name of each layer that is probed -> D.
        rows, tested: the numbers of samples of all ranks, in training and in testing.
    """

    def __init__(self, model: nn.Module, layers: Layers, folds: int, peers: Peers | None) -> None:
        self.model, self.layers, self.folds, self.peers = model, layers, folds, peers
        held = next((t for ts in (model.parameters(), model.buffers()) for t in ts), None)
        self.device = torch.device("cpu") if held is None else held.device
        self._moves = held is not None
        self.classes: list[int] = []
        self.features: dict[str, int] = {}
        self.rows = self.tested = 0
        self._code: dict[int, int] = {}
        self._sets: dict[str, list[Rows]] = {}
        self._homes: dict[str, torch.device] = {}
        self._digests: list[int] = []

    def train(self, loader: Iterable[Any]) -> None:
        """Add up the rows of all layers, and agree with the other ranks about layers and classes."""

        def take(layer: str, x: Tensor) -> None:
            if self.features.setdefault(layer, x.shape[1]) != x.shape[1]:
                raise ValueError(
                    f"layers must have as many features in every batch, but {layer!r} has {self.features[layer]} in "
                    f"one and {x.shape[1]} in another."
                )
            self._homes[layer] = x.device
            sets = self._sets.setdefault(layer, [Rows() for _ in range(self.folds)])
            for fold, (part, label) in self._dealt(x):
                sets[fold].add(part, label, len(self._code))

        def work() -> dict[str, Any]:
            rows = self._pass("loader", loader, take, self._learn)
            self._complete(rows, {layer: sum(s.count for s in sets) for layer, sets in self._sets.items()})
            return {
                "rows": rows,
                "features": {layer: d for layer, d in self.features.items() if layer not in self.layers.left_out},
                "left out": self.layers.left_out,
                "classes": list(self._code),
            }

        told = [each for each in agree(self.peers, work) if each["rows"]]
        self.rows = sum(each["rows"] for each in told)
        self.classes = sorted({label for each in told for label in each["classes"]})
        if self.rows < 2 or len(self.classes) < 2:
            raise ValueError(
                f"loader must have samples of at least two classes, got {self.rows} of the classes {self.classes}."
            )
        if self.rows < 2 * self.folds:
            raise ValueError(f"loader must have at least {2 * self.folds} samples, got {self.rows}.")
        for each in told:
            self.layers.left_out.update(each["left out"])
        seen = [{k: d for k, d in each["features"].items() if k not in self.layers.left_out} for each in told]
        if any(each != seen[0] for each in seen):
            raise ValueError("model must have the same layers with the same numbers of features on all ranks.")
        self.features = seen[0]
        if not self.features:
            raise ValueError(f"model must have modules that can be probed, but {self._reasons()}.")

    def solve(self, strengths: Tensor) -> dict[str, Probe]:
        """The classifiers of all layers. What was added up of a layer is dropped when it has been solved."""
        place = torch.tensor([self.classes.index(label) for label in self._code], dtype=torch.int64)
        self._code = {label: number for number, label in enumerate(self.classes)}
        probes = {}
        for layer, features in self.features.items():
            sets = self._sets.pop(layer, None) or [Rows() for _ in range(self.folds)]
            home = place.to(self._homes.get(layer, self.device))
            found = solve(sets, features, self.rows, home, len(self.classes), strengths, self.peers)
            if found is None:
                raise ValueError(f"layers must have finite features, but {layer!r} has NaN or infinity for loader.")
            probes[layer] = found
        self._sets.clear()
        return probes

    def test(self, probes: dict[str, Probe], loader: Iterable[Any], again: bool) -> None:
        """Count the hits of all probes on a loader: the one of the training pass `again`, or another."""

        def take(layer: str, x: Tensor) -> None:
            if layer in probes:
                if x.shape[1] != self.features[layer]:
                    raise ValueError(
                        f"layers must have as many features in every batch, but {layer!r} has {self.features[layer]} "
                        f"in loader and {x.shape[1]} in validation."
                    )
                for fold, (part, label) in self._dealt(x):
                    probes[layer].test(part, label, fold)

        def work() -> int:
            name = "loader" if again else "validation"
            rows = self._pass(name, loader, take, self._recall if again else self._read)
            if again and self._digests:
                raise ValueError(
                    "loader must give the same batches twice if there is no validation, but it gave fewer."
                )
            for layer, probe in probes.items():
                if bool(probe.bad):
                    raise ValueError(f"layers must have finite features, but {layer!r} has NaN or infinity for {name}.")
            self._complete(rows, {layer: probe.tested for layer, probe in probes.items()}, final=True)
            return rows

        self.tested = sum(agree(self.peers, work))
        if not self.tested:
            raise ValueError("validation must have at least one sample, got none.")
        if self.peers is not None:
            for probe in probes.values():
                probe.hits = collectives.all_reduce(probe.hits, self.peers.name)

    def _pass(
        self,
        name: str,
        loader: Iterable[Any],
        take: Callable[[str, Tensor], None],
        codes: Callable[[Tensor, Tensor], Tensor],
    ) -> int:
        """Run the model on all batches. Returns the number of rows."""
        rows, self._seen = 0, torch.zeros(0, dtype=torch.int64)
        with self.layers.watched(take) as begin:
            for batch in loader:
                x, y = _pair(name, batch)
                if len(x):
                    label = codes(x, y)
                    self._fold = self._deal(label, y)
                    self._label = label.to(self.device)
                    rows += len(x)
                    begin(len(x))
                    self.model(x.to(self.device if self._moves else x.device, copy=True))  # it may overwrite its input
        return rows

    def _learn(self, x: Tensor, y: Tensor) -> Tensor:
        """The numbers of the classes of a batch, which may be new."""
        values, which = y.unique(return_inverse=True)
        codes = [self._code.setdefault(label, len(self._code)) for label in values.tolist()]
        if self.folds > 1:
            self._digests.append(_digest(x, y))
        return torch.tensor(codes)[which]

    def _read(self, x: Tensor, y: Tensor) -> Tensor:
        """The numbers of known classes; -1 for others."""
        values, which = y.unique(return_inverse=True)
        return torch.tensor([self._code.get(label, -1) for label in values.tolist()])[which]

    def _recall(self, x: Tensor, y: Tensor) -> Tensor:
        """The same for a batch that must be that of the first pass."""
        if not self._digests or self._digests.pop(0) != _digest(x, y):
            raise ValueError(
                "loader must give the same batches twice if there is no validation, but they differ: it shuffles or "
                "augments."
            )
        return self._read(x, y)

    def _deal(self, label: Tensor, y: Tensor) -> Tensor | None:
        """The fold of each row: the rows of each class in turn, from another fold on for another class."""
        if self.folds == 1:
            return None
        classes = max(len(self._code), len(self.classes))
        self._seen = F.pad(self._seen, (0, classes - len(self._seen)))
        member = F.one_hot(label, classes)
        place = (member.cumsum(0) + self._seen)[torch.arange(len(label)), label] - 1
        self._seen = self._seen + member.sum(0)
        return (place + y) % self.folds

    def _dealt(self, x: Tensor) -> Iterable[tuple[int, tuple[Tensor, Tensor]]]:
        """The rows of each fold, with their labels."""
        label = self._label.to(x.device)
        if self._fold is None:
            yield 0, (x, label)
            return
        for fold in range(self.folds):
            rows = (self._fold == fold).nonzero()[:, 0].to(x.device)
            if len(rows):
                yield fold, (x[rows], label[rows])

    def _complete(self, rows: int, counts: dict[str, int], final: bool = False) -> None:
        """Check that every layer has seen every row. In training, one that was not named is left out instead."""
        expected = [*counts, *(name for name in self.layers.paths if name not in self.layers.calls)]
        for layer in expected if rows else ():
            if counts.get(layer, 0) != rows and layer not in self.layers.left_out:
                why = "is called for some batches only" if counts.get(layer) else "is not called"
                if self.layers.named or (final and layer in counts):
                    raise ValueError(f"layers must be called for every batch, but {layer!r} {why}.")
                self.layers.left_out[layer] = f"it {why}"

    def _reasons(self) -> str:
        """Why the first of the layers was left out."""
        return "; ".join(f"{layer!r}: {why}" for layer, why in list(self.layers.left_out.items())[:1])


def agree(peers: Peers | None, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each rank. If it raises on one, all ranks raise, so that none waits for another."""
    if peers is None:
        return [work()]
    failure, own = None, None
    try:
        own = work()
    except Exception as error:
        failure = error
    told = collectives.gather_objects((failure is None, own), peers)
    if failure is not None:
        raise failure
    if bad := [rank for rank, (good, _) in enumerate(told) if not good]:
        raise RuntimeError(f"layerwise_probe failed on rank {bad[0]} (see its traceback): all ranks stopped.")
    return [own for _, own in told]


def _pair(name: str, batch: Any) -> tuple[Tensor, Tensor]:
    """The inputs of a batch, and its labels on the CPU in int64."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"{name} must give pairs (x, y) of tensors, got {got}.")
    x, y = batch
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex():
        got = short(y.dtype) if isinstance(y, Tensor) else kind(y)
        raise TypeError(f"{name} must give integer labels (N,) as a tensor, got {got}.")
    if x.dim() < 1 or y.shape != x.shape[:1]:
        raise ValueError(
            f"{name} must give one label for each row of x, got x of {tuple(x.shape)} and y of {tuple(y.shape)}."
        )
    return x, y.cpu().long()


def _digest(x: Tensor, y: Tensor) -> int:
    """A checksum of the bytes of a batch."""
    found = 0
    for t in (x, y):
        found = zlib.crc32(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), found)
    return zlib.crc32(repr(tuple(x.shape)).encode(), found)
