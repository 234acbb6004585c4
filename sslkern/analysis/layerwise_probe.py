"""Ridge probes of all layers of a network from sums that are added up in one forward pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from ..core import checks
from ..core.ranks import Group, peers_of
from ._networks import evaluating, module
from ._probe_layers import Call, Layers, Pool
from ._probe_stream import Stream, agree
from ._results import axes, table
from ._truncation import truncated

STRENGTHS = tuple(10.0**k for k in range(-6, 3))


@dataclass(frozen=True, eq=False)
class LayerwiseProbe:
    """The result of `layerwise_probe`, for L layers and S strengths.

    Attributes:
        layers: the names of the layers, in the order in which they return. The n-th call of a module in one forward
            pass is called "name:n" for n > 1.
        strengths: the S strengths, relative to the scale of each layer.
        accuracy: (L, S), float64 on the CPU, the share of held-out samples that are classified right.
        alphas: (L, S), float64 on the CPU, the strengths in the units of `sklearn.linear_model.RidgeClassifier(alpha)`.
        n_features: the number of features D of each layer.
        n_train, n_test: the numbers of samples. With folds, every sample is in both.
        classes: the labels, sorted.
        left_out: the name of each module that was not probed -> why. Always empty if `layers` was given.
        model: the network, not a copy.
    """

    layers: tuple[str, ...]
    strengths: tuple[float, ...]
    accuracy: Tensor
    alphas: Tensor = field(repr=False)
    n_features: tuple[int, ...]
    n_train: int
    n_test: int
    classes: tuple[int, ...]
    left_out: dict[str, str]
    model: nn.Module = field(repr=False)
    _calls: dict[str, Call] = field(repr=False)
    _pool: Pool = field(repr=False)

    @property
    def best_accuracy(self) -> Tensor:
        """The accuracy of each layer at its best strength; (L,)."""
        return self.accuracy.amax(1)

    @property
    def best_strengths(self) -> tuple[float, ...]:
        """The best strength of each layer; of equal ones, the largest."""
        best = self.best_accuracy.tolist()
        pairs = zip(self.accuracy.tolist(), best, strict=True)
        return tuple(max(s for s, a in zip(self.strengths, row, strict=True) if a == top) for row, top in pairs)

    @property
    def best_layer(self) -> str:
        """The layer with the best accuracy; of equal ones, the first."""
        return self.layers[int(self.best_accuracy.argmax())]

    @property
    def truncated(self) -> nn.Module:
        """The network, cut after the best layer: `truncate()`."""
        return self.truncate()

    def truncate(self, layer: str | None = None, *, pooled: bool = False) -> nn.Module:
        """The network, cut after a layer. It shares parameters, buffers and modules with `model`.

        A chain of `nn.Sequential` becomes a shorter one. Another network is traced by `torch.fx`, if it has one graph
        for training and evaluation, and becomes a `GraphModule` without the modules that come later. What cannot be
        traced becomes a module that runs `model` as far as the layer; it holds all parameters.

        Args:
            layer: one of `layers`; None is the best one.
            pooled: False returns the output of the layer, of which it takes the first tensor if there are several.
                True returns the features (N, D) that were probed.
        """
        layer = self.best_layer if layer is None else layer
        checks.one_of("layer", layer, self.layers)
        checks.flag("pooled", pooled)
        return truncated(self.model, self._calls[layer], self._pool if pooled else None)

    def table(self) -> str:
        """The accuracy of each layer at its best strength, as aligned text."""
        rows = [("layer", "features", "strength", "accuracy", "")]
        columns = zip(self.layers, self.n_features, self.best_strengths, self.best_accuracy.tolist(), strict=True)
        for layer, features, strength, accuracy in columns:
            mark = "best" if layer == self.best_layer else ""
            rows.append((layer, f"{features}", f"{strength:g}", f"{accuracy:.3f}", mark))
        return table(rows)

    def plot(self, ax: Any = None) -> Any:
        """Draw the accuracy of each layer at its best strength. Returns the axes."""
        ax, places, best = axes(ax), range(len(self.layers)), self.best_accuracy.tolist()
        ax.plot(places, best, ".-")
        top = self.layers.index(self.best_layer)
        ax.plot([top], [best[top]], "o", color="C1", label=f"best: {self.best_layer}")
        ax.set(xlabel="layer", ylabel="held-out accuracy", xticks=list(places))
        ax.set_xticklabels(self.layers, rotation=90, fontsize=8 if len(places) < 30 else 5)
        ax.legend(frameon=False)
        return ax


@torch.no_grad()
def layerwise_probe(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str] | None = None,
    *,
    validation: Iterable[Any] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    pool: str | int | Callable[[Tensor], Tensor] = "mean",
    channel_dim: int | None = None,
    folds: int = 5,
    group: Group = None,
) -> LayerwiseProbe:
    r"""Train a ridge classifier on the features of every layer, and find the layer where a network is best cut.

    For the centred features X (N x D) of a layer and the one-hot classes Y, the classifier for x is

        argmax_c  [(x - mean)'(X'X + alpha I)^-1 X'Y + share]_c,      alpha = strength * trace(X'X) / min(D, N - 1)

    which is that of `sklearn.linear_model.RidgeClassifier(alpha)`:

        probe = layerwise_probe(network, train_loader, validation=test_loader)
        print(probe.table())
        encoder = probe.truncated  # the network as far as its best layer

    X'X and X'Y of all layers are added up during one forward pass, in float64 and centred; the features are not stored.
    One eigendecomposition of X'X gives the classifiers of a layer for all strengths. A layer with at least as many
    features as samples takes that of the N x N matrix XX' instead, from its features, which are kept until they are
    more than D. So the memory of a layer is that of a few D x D matrices for any N, and the solution takes time in
    proportion to min(D, N)^3: "flatten" is for small maps.

    The accuracy needs predictions, so it takes a second forward pass. It is measured on `validation`. Without it, the
    samples of each class are dealt to `folds` folds in turn as they come, and `loader` is read again: each sample is
    classified by the classifier of the other folds. This takes `folds` times the memory and the eigendecompositions.

    The accuracy of the best strength or of the best layer was chosen on the samples on which it was measured. It is a
    little too high; measure the layer that you choose on other samples.

    Args:
        model: any network. It runs in evaluation mode without gradients, one batch after the other; modes, parameters,
            buffers, hooks and torch's random numbers are left as they were. A compiled model runs uncompiled.
        loader: pairs (x, y) of a tensor for the model and integer labels (N,), as from a DataLoader. Every integer is a
            class. x is moved to the device of the model. Without `validation`, it must give the same batches twice.
        layers: names of modules as in `model.named_modules()`. None takes all modules but for containers, Dropout,
            Flatten and Identity; blocks with layers of their own are taken unless they return the output of one of
            them unchanged. Modules that are not called, or do not return one row for each row of x, are left out; the
            result says why. Of an output with several tensors, the first is taken.
        validation: like `loader`, with the samples on which the accuracy is measured. A class that `loader` lacks
            counts as an error.
        strengths: multiples of the mean of the eigenvalues of X'X that can differ from 0; numbers > 0.
        pool: how an output with more than two dimensions becomes features. "mean" and "max" pool over the places,
            "flatten" takes all numbers, an integer averages over a grid of this many cells in each dimension, and
            a function gets every output (N, ...) and returns (N, D).
        channel_dim: the dimension of the channels, 1 or -1. None takes 1 of images (N, C, H, W) and -1 of tokens
            (N, T, D), and asks for it where the network tells otherwise.
        folds: an integer >= 2, for a call without `validation`.
        group: the ranks that have parts of the samples. Each passes its own loaders, which may be of different
            lengths; the result is that of all samples, on every rank. The features of layers in the dual form are
            gathered, and otherwise D x D sums are added up.

    Returns:
        A `LayerwiseProbe`.

    Raises:
        TypeError, ValueError: an argument is wrong; there are fewer than two classes; a named layer cannot be probed;
        features are not finite; or `loader` gives other batches when it is read again. RuntimeError: another rank has
        failed.

    Source: Bordes et al., Guillotine regularization: why removing layers is needed to improve generalization in
    self-supervised learning (2206.13378).
    """
    peers, made = peers_of(group), []

    def prepare() -> None:
        net = module("model", model)
        _check(loader, validation, folds)
        watched = Layers(net, layers, pool, channel_dim)
        made.append((Stream(net, watched, 1 if validation is not None else folds, peers), _strengths(strengths)))

    agree(peers, prepare)
    stream, chosen = made[0]
    net, watched = stream.model, stream.layers
    with evaluating(net), _same_random_numbers(stream.device):
        stream.train(loader)
        probes = stream.solve(torch.tensor(chosen, dtype=torch.float64))
        stream.test(probes, loader if validation is None else validation, again=validation is None)
    names = tuple(probes)
    accuracy = torch.stack([probes[name].hits.cpu().double() / stream.tested for name in names])
    return LayerwiseProbe(
        names,
        chosen,
        accuracy,
        torch.stack([probes[name].alphas.cpu() for name in names]),
        tuple(stream.features[name] for name in names),
        stream.rows,
        stream.tested,
        tuple(stream.classes),
        watched.left_out,
        net,
        watched.calls,
        watched.pool,
    )


def _strengths(strengths: Any) -> tuple[float, ...]:
    if isinstance(strengths, str) or not isinstance(strengths, Iterable):
        raise TypeError(f"strengths must be a sequence of numbers > 0, got {strengths!r}.")
    found = tuple(checks.positive_number("each of strengths", float(s) if hasattr(s, "item") else s) for s in strengths)
    if not found:
        raise ValueError("strengths must have at least one number.")
    return found


def _check(loader: Any, validation: Any, folds: Any) -> None:
    checks.positive("folds", folds)
    if folds < 2:
        raise ValueError(f"folds must be an integer >= 2, got {folds}.")
    for name, value in (("loader", loader), ("validation", loader if validation is None else validation)):
        if not isinstance(value, Iterable):
            raise TypeError(f"{name} must be an iterable of pairs (x, y), got {type(value).__name__}.")
    if validation is None and isinstance(loader, Iterator):
        raise ValueError("loader must be readable twice if there is no validation, but it is an iterator: pass a list.")
    if validation is None and isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
        raise ValueError("loader must give the same batches twice if there is no validation, but it shuffles.")


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Set the generators of torch back that the forward pass and the loaders use."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
