"""`python -m bench.analysis_layerwise_probe`: ridge probes of all layers of a ResNet-18, against storing the features.

"forward" runs the network over the training and the held-out images in evaluation mode, without gradients. "sslkern" is
`layerwise_probe` on the same images; its eigendecompositions are also told separately. "stored" keeps the pooled
features of all layers and fits scikit-learn's RidgeClassifier for each layer and strength, in float64: in float32 its
matrices are too ill-conditioned.

Times are seconds of the processor in one thread, not of the clock, since other work may run beside them: the median of
rounds in which the first two take turns, and one round of the third. Memory is the peak of the bytes that torch
allocates beyond those that it had before, less that of the forward pass; NumPy's and LAPACK's are not counted. It is
measured on images of 8 x 8 pixels, of which the features are as many. It grows until the layers have twice as many
images as features, and is constant from then on. The largest difference is that of the accuracies.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from sslkern.analysis import LayerwiseProbe, layerwise_probe

from .run import allocated, machine, save

SIZES = {"width": 64, "side": 32, "batch": 64, "train": 768, "test": 192, "rounds": 3}
QUICK = {"width": 2, "side": 8, "batch": 16, "train": 64, "test": 16, "rounds": 1}
CLASSES = 10
BANK = 256  # images that are made; a loader repeats them with other brightness


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.shortcut = nn.ReLU(inplace=True), nn.Identity()
        if stride > 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int) -> nn.Module:
    """A ResNet-18 for small images: a 3 x 3 stem without pooling, and 8 times `width` features per image."""
    torch.manual_seed(0)
    widths = (width, width, 2 * width, 4 * width, 8 * width)
    blocks = [
        Block(i if k == 0 else w, w, 2 if k == 0 and n else 1)
        for n, (i, w) in enumerate(pairwise(widths))
        for k in range(2)
    ]
    stem = (nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, CLASSES)).eval()


class Images:
    """Batches of noisy images of ten patterns. They are made as they are read, so they take no memory."""

    def __init__(self, count: int, batch: int, side: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        generator = torch.Generator().manual_seed(0)
        self.patterns = torch.randn(CLASSES, 3, side, side, generator=generator)
        self.noise = torch.randn(BANK, 3, side, side, generator=generator)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.count, self.batch):
            n = min(self.batch, self.count - start)
            y = torch.randint(CLASSES, (n,), generator=generator)
            rows = torch.randint(BANK, (n,), generator=generator)
            yield 0.2 * self.patterns[y] + self.noise[rows] * (0.5 + torch.rand(n, 1, 1, 1, generator=generator)), y


@torch.no_grad()
def forward(net: nn.Module, *loaders: Images) -> None:
    for loader in loaders:
        for x, _ in loader:
            net(x)


@torch.no_grad()
def stored(net: nn.Module, train: Images, test: Images, probe: LayerwiseProbe) -> np.ndarray:
    """The accuracies (L, S) of scikit-learn's classifiers for the layers and the alphas of a probe."""
    kept: dict[str, list[Tensor]] = {}
    calls: dict[str, int] = {}

    def hooked(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, inputs: Any, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            layer = name if calls[name] == 1 else f"{name}:{calls[name]}"
            kept.setdefault(layer, []).append(output.mean((2, 3)) if output.dim() == 4 else output.clone())

        return hook

    names = {name.partition(":")[0] for name in probe.layers}
    handles = [net.get_submodule(name).register_forward_hook(hooked(name)) for name in names]
    sets = []
    for loader in (train, test):
        labels = []
        for x, y in loader:
            calls.clear()
            net(x)
            labels.append(y)
        sets.append(({name: torch.cat(kept.pop(name)).numpy() for name in list(kept)}, torch.cat(labels).numpy()))
    for handle in handles:
        handle.remove()
    (x, y), (held, labels) = sets
    found = np.empty(probe.accuracy.shape)
    for row, (name, alphas) in enumerate(zip(probe.layers, probe.alphas.tolist(), strict=True)):
        features, others = (side[name].astype(np.float64) for side in (x, held))
        for column, alpha in enumerate(alphas):
            found[row, column] = RidgeClassifier(alpha).fit(features, y).score(others, labels)
    return found


@contextmanager
def eigh_seconds() -> Iterator[list[float]]:
    """The processor's seconds of each eigendecomposition inside."""
    spent: list[float] = []
    eigh = torch.linalg.eigh

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        found = eigh(*args, **kwargs)
        spent.append(time.process_time() - start)
        return found

    with patch("torch.linalg.eigh", timed):
        yield spent


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def times(args: argparse.Namespace) -> dict[str, Any]:
    """One row: medians of the seconds of the three ways, and the largest difference of the accuracies."""
    net = resnet18(args.width)
    train, test = Images(args.train, args.batch, args.side, 1), Images(args.test, args.batch, args.side, 2)
    layerwise_probe(net, Images(2 * CLASSES, 10, args.side, 1), validation=Images(10, 10, args.side, 2))  # warm
    spent: dict[str, list[float]] = {"forward": [], "sslkern": [], "eigh": [], "stored": []}
    for k in range(args.rounds):
        spent["forward"].append(seconds(lambda: forward(net, train, test))[0])
        with eigh_seconds() as eigh:
            took, probe = seconds(lambda: layerwise_probe(net, train, validation=test))
        spent["sslkern"].append(took)
        spent["eigh"].append(sum(eigh))
        if k == 0:  # slow, and far from the others
            took, theirs = seconds(partial(stored, net, train, test, probe))
            spent["stored"].append(took)
    middle = {name: statistics.median(values) for name, values in spent.items()}
    difference = float(np.abs(theirs - probe.accuracy.numpy()).max())
    row = {"what": "seconds", "train": args.train, "test": args.test, "layers": len(probe.layers), **middle}
    streaming = (middle["sslkern"] - middle["eigh"]) / middle["forward"]
    return {
        **row,
        "streaming / forward": streaming,
        "sslkern / forward": middle["sslkern"] / middle["forward"],
        "difference": difference,
    }


def memory(args: argparse.Namespace, train: int) -> dict[str, Any]:
    """One row: bytes beyond those of the forward pass."""
    net, side = resnet18(args.width), min(args.side, 8)
    loaders = Images(train, args.batch, side, 1), Images(args.test, args.batch, side, 2)
    base = allocated(lambda: forward(net, *loaders))[0]
    peak, _, probe = allocated(lambda: layerwise_probe(net, loaders[0], validation=loaders[1]))
    with patch(f"{__name__}.RidgeClassifier", Unfitted):
        kept = allocated(lambda: stored(net, *loaders, probe))[0]
    return {
        "what": "bytes",
        "train": train,
        "test": args.test,
        "layers": len(probe.layers),
        "sslkern": peak - base,
        "stored": kept - base,
    }


class Unfitted:
    """In place of the classifier, where only the features count."""

    def __init__(self, alpha: float) -> None: ...

    def fit(self, x: Any, y: Any) -> Unfitted:
        return self

    def score(self, x: Any, y: Any) -> float:
        return 0.0


def show(rows: list[dict[str, Any]]) -> None:
    time_row, *memory_rows = rows
    print(f"{time_row['layers']} layers, {time_row['train']} + {time_row['test']} images; seconds of the processor")
    for name in ("forward", "sslkern", "eigh", "stored"):
        print(f"{name:<10}{time_row[name]:>10.2f}{time_row[name] / time_row['forward']:>8.2f} x forward")
    print(f"sslkern without its eigendecompositions: {time_row['streaming / forward']:.2f} x forward")
    print(f"largest difference of an accuracy: {time_row['difference']:.1e}\n")
    print(f"{'images':<10}{'sslkern, MB':>14}{'stored, MB':>14}")
    for row in memory_rows:
        print(f"{row['train']:<10}{row['sslkern'] / 1e6:>14.1f}{row['stored'] / 1e6:>14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK}, unless given")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--out", type=Path, help="a .json file for the rows")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):  # of NumPy: threads that wait take time of the processor
        rows = [times(args), *(memory(args, many * args.train) for many in (1, 4, 8))]
    show(rows)
    if args.out:
        save(args.out, machine("cpu"), rows)


if __name__ == "__main__":
    main()
