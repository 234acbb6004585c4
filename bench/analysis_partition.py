"""`python -m bench.analysis_partition`: distances to the boundaries of linear regions, against Jacobians.

The distance of a point is the least |h_k|/|a_k| over all units k, where a_k is the gradient of the pre-activation h_k.
The plain ways compute a_k for all units as a Jacobian: of a chunk of points by `vmap(jacfwd)`, with the fastest of
several chunk sizes; of each point by `jacfwd`, in a loop; of each point by `torch.autograd.functional.jacobian`, one
gradient for each unit (not for the convolutions, where it takes a minute for a point). The loops run on fewer points,
so all times are given for each point.

Times are medians over rounds in which all but the loops alternate. CPU seconds, over all threads, are given too, since
they depend less on what else the machine does. Memory is the peak of the bytes allocated in one call of at most 256
points, as in `bench.run`; that of a loop is of one point. Differences are the largest to the distances in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from sslkern.analysis import partition_distance

from .run import allocated, machine, save, wait_for_quiet

OURS, CHUNKS, LOOP, GRADIENTS = "sslkern", "vmap(jacfwd)", "jacfwd, each point", "jacobian, each point"
LOOPS = (LOOP, GRADIENTS)


def mlp(inputs: int, width: int, depth: int = 4) -> nn.Sequential:
    widths = [inputs] + [width] * depth
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10)).eval()


def convnet(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise((3, width, width, width)):
        layers += [nn.Conv2d(a, b, 3, padding=1, stride=2 if layers else 1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10)).eval()


def trained(net: nn.Sequential) -> tuple[nn.Sequential, Tensor]:
    """The network after 600 steps of Adam on scikit-learn's digits, and their images."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(600):
        rows = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    return net, images


def preactivations(net: nn.Sequential, x: Tensor) -> Tensor:
    """The inputs of all ReLUs, (N, units)."""
    found = []
    for part in net:
        if isinstance(part, nn.ReLU):
            found.append(x.flatten(1))
        x = part(x)
    return torch.cat(found, 1)


def least(h: Tensor, jacobian: Tensor) -> Tensor:
    """The distance from pre-activations (N, units) and their Jacobian (N, units, ...)."""
    norms = jacobian.flatten(2).norm(dim=2)
    return torch.where(norms > 0, h.abs() / norms, torch.inf).amin(1)


def plain_ways(net: nn.Sequential, sizes: tuple[int, ...]) -> dict[str, Callable[[Tensor], Tensor]]:
    def one(row: Tensor) -> Tensor:
        return preactivations(net, row[None])[0]

    def chunked(size: int) -> Callable[[Tensor], Tensor]:
        batched = vmap(jacfwd(one))
        return torch.no_grad()(lambda x: torch.cat([least(preactivations(net, c), batched(c)) for c in x.split(size)]))

    def loop(jacobian: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([least(one(row)[None], jacobian(row)[None]).detach() for row in x])

    ways = {f"{CHUNKS}, chunks of {size}": chunked(size) for size in sizes}
    ways[LOOP] = torch.no_grad()(loop(jacfwd(one)))
    ways[GRADIENTS] = loop(lambda row: torch.autograd.functional.jacobian(one, row))
    return ways


def measure(name: str, net: nn.Sequential, x: Tensor, few: int, sizes: tuple[int, ...], rounds: int) -> list[dict]:
    """One row for each way: seconds for each point, peak bytes, largest difference to float64."""
    net(x[:1])  # which makes the lazy layer
    truth = partition_distance(net.double(), x.double()).distance
    net.float()
    ways: dict[str, Callable[[Tensor], Tensor]] = {OURS: lambda x: partition_distance(net, x).distance}
    ways |= plain_ways(net, sizes)
    if any(isinstance(part, nn.Conv2d) for part in net):
        del ways[GRADIENTS]
    points = {way: x[:few] if way in LOOPS else x for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    rows = {}
    for way in ways:
        own = points[way][:1] if way in LOOPS else x[:256]
        peak, _, found = allocated(partial(ways[way], own))
        difference = float((found - truth[: len(found)]).abs().max())
        rows[way] = {"case": name, "implementation": way, "peak_bytes": peak, "difference": difference}
    busy = wait_for_quiet(patience=2 if rounds < 3 else 10)
    for k in range(rounds):
        for way in list(ways)[:: 1 - 2 * (k % 2)]:
            if k and way in LOOPS:
                continue
            start, busy_start = time.perf_counter(), time.process_time()
            found = ways[way](points[way])
            seconds[way].append(time.perf_counter() - start)
            cpu[way].append(time.process_time() - busy_start)
            rows[way]["difference"] = max(rows[way]["difference"], float((found - truth[: len(found)]).abs().max()))
    for way, row in rows.items():
        row |= {"points": len(points[way]), "seconds": seconds[way], "cpu": cpu[way], "busy": round(busy, 3)}
        row["per_point"] = statistics.median(seconds[way]) / row["points"]
        row["cpu_per_point"] = statistics.median(cpu[way]) / row["points"]
    return list(rows.values())


def table(rows: list[dict]) -> None:
    ours = {row["case"]: row for row in rows if row["implementation"] == OURS}
    head = (
        f"{'points':>8}{'us each':>11}{'/ sslkern':>11}{'CPU us':>11}{'/ sslkern':>11}{'peak MB':>9}{'difference':>12}"
    )
    print(f"{'case':<22}{'way':<28}{head}")
    for row in rows:
        wall, cpu = (row[key] / ours[row["case"]][key] for key in ("per_point", "cpu_per_point"))
        print(
            f"{row['case']:<22}{row['implementation']:<28}{row['points']:>8}"
            f"{1e6 * row['per_point']:>11.1f}{wall:>11.1f}{1e6 * row['cpu_per_point']:>11.1f}{cpu:>11.1f}"
            f"{row['peak_bytes'] / 1e6:>9.1f}{row['difference']:>12.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.analysis_partition", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small networks, few points; not for publication")
    parser.add_argument("--out", type=Path, help="result file; nothing is written without it")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.quick:
        rounds = 1
        cases = [
            ("mlp 16 - 4 x 16", mlp(16, 16), torch.randn(64, 16), 2, (32,)),
            ("mlp 128 - 4 x 16", mlp(128, 16), torch.randn(8, 128), 1, (4,)),
            ("convnet 3 x 8 x 8", convnet(2), torch.randn(4, 3, 8, 8), 1, (4,)),
        ]
    else:
        rounds = 3
        cases = [
            ("mlp 64 - 4 x 256", mlp(64, 256), torch.randn(4096, 64), 256, (64, 128)),
            ("the same, trained", *trained(mlp(64, 256)), 8, (128,)),
            ("mlp 3072 - 4 x 256", mlp(3072, 256), torch.randn(64, 3072), 2, (16,)),
            ("convnet 3 x 16 x 16", convnet(16), torch.randn(16, 3, 16, 16), 2, (4,)),
        ]
    rows: list[dict] = []
    for case in cases:
        rows += measure(*case, rounds)
        if args.out:
            save(args.out, {**machine("cpu"), "quick": args.quick}, rows)
    table(rows)


if __name__ == "__main__":
    main()
