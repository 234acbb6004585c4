"""`python -m bench.analysis_conditioning`: extreme singular values of a residual layer without its matrix.

The layer is phi(W x) + x with a leaky ReLU phi of slope 0.1 and a normal W of norm 0.6, in float32: once dense, once a
convolution of 3 x 3. "sslkern" is `extreme_singular_values` of the layer's local map. "dense" forms the local matrix
and calls `torch.linalg.svdvals`. "scipy" is `scipy.sparse.linalg.svds` on the same products, once for each end.

Times are CPU seconds of the process, summed over its threads, and include the local map. They are medians of
alternating rounds, but the dense method runs once; "of it SVD" is the time of its SVD alone. Memory is the peak of the
bytes that torch allocates beyond those allocated before; SciPy's own arrays are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from sslkern.analysis import extreme_singular_values, local_affine

from .run import allocated, machine, save, wait_for_quiet

SLOPE, NORM = 0.1, 0.6
UNITS = {"dense layer": 4096, "convolution": 4096}
QUICK = {"dense layer": 256, "convolution": 256}
CHANNELS = 16


class Residual(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.layer(x), SLOPE) + x


def residual(kind: str, units: int) -> tuple[nn.Module, Tensor]:
    """A layer with this number of units, and an input."""
    torch.manual_seed(0)
    if kind == "dense layer":
        layer: nn.Module = nn.Linear(units, units, bias=False)
        shape, inputs = (1, units), units
    else:
        side = round((units / CHANNELS) ** 0.5)
        layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular", bias=False)
        shape, inputs = (1, CHANNELS, side, side), 9 * CHANNELS
    nn.init.normal_(layer.weight, std=NORM / 2 / inputs**0.5)  # the norm of a square normal matrix is twice this n^0.5
    return Residual(layer), torch.randn(shape)


def methods(net: nn.Module, x: Tensor) -> dict[str, Callable[[], dict]]:
    """Name -> a function that returns the largest and the smallest singular value, and the number of products."""

    def ours() -> dict:
        found = extreme_singular_values(local_affine(net, x)[0])
        assert found.converged
        return {
            "largest": float(found.largest), "smallest": float(found.smallest), "products": found.n_products
        }  # fmt: skip

    def dense() -> dict:
        matrix = local_affine(net, x)[0].matrix()
        start = time.process_time()
        s = torch.linalg.svdvals(matrix)
        took = time.process_time() - start
        return {"largest": float(s[0]), "smallest": float(s[-1]), "products": len(matrix), "svd_cpu_seconds": took}

    def scipy() -> dict:
        a, count = local_affine(net, x)[0].as_linear_operator(), 0

        def counted(product: Callable) -> Callable:
            def call(v):
                nonlocal count
                count += 1
                return product(v)

            return call

        kind = type(a)
        counting = kind(a.shape, matvec=counted(a.matvec), rmatvec=counted(a.rmatvec), dtype=a.dtype)
        ends = [svds(counting, 1, which=which, return_singular_vectors=False, rng=0)[0] for which in ("LM", "SM")]
        return {"largest": float(ends[0]), "smallest": float(ends[1]), "products": count}

    return {"sslkern": ours, "scipy": scipy, "dense": dense}


def measure(kind: str, units: int, rounds: int, patience: float) -> list[dict]:
    net, x = residual(kind, units)
    calls = methods(net, x)
    calls["sslkern"]()  # libraries allocate what they keep in their first call
    busy = wait_for_quiet(patience=patience)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in ("sslkern", "scipy"):
            start = time.process_time()
            calls[name]()
            seconds[name].append(time.process_time() - start)
    rows = []
    for name, call in calls.items():
        start = time.process_time()
        peak, _, found = allocated(call)
        seconds[name] = seconds[name] or [time.process_time() - start]
        row = {"kind": kind, "units": units, "implementation": name, "median": statistics.median(seconds[name])}
        rows.append(row | {"cpu_seconds": seconds[name], "peak_bytes": peak, "busy": round(busy, 3)} | found)
    truth = rows[-1]
    for row in rows:
        row["difference"] = max(abs(row[end] / truth[end] - 1) for end in ("largest", "smallest"))
    return rows


def print_table(rows: list[dict]) -> None:
    print(f"{'layer':<14}{'units':>6}  {'method':<10}{'CPU s':>9}{'of it SVD':>11}{'ratio':>8}{'peak MB':>9}", end="")
    print(f"{'products':>10}{'largest':>10}{'smallest':>10}{'difference':>12}")
    for row in rows:
        svd = f"{row['svd_cpu_seconds']:.3f}" if "svd_cpu_seconds" in row else ""
        dense = next(r for r in rows if r["kind"] == row["kind"] and r["implementation"] == "dense")
        print(
            f"{row['kind']:<14}{row['units']:>6}  {row['implementation']:<10}{row['median']:>9.3f}{svd:>11}"
            f"{row['median'] / dense['median']:>8.4f}{row['peak_bytes'] / 1e6:>9.1f}{row['products']:>10}"
            f"{row['largest']:>10.5f}{row['smallest']:>10.5f}{row['difference']:>12.1e}"
        )
    print("ratio: time over that of the dense method; difference: relative to it, the larger of both ends")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.analysis_conditioning", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="256 units, one round; not for publication")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; default all")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes, rounds, patience = (QUICK, 1, 0.5) if args.quick else (UNITS, 5, 30.0)
    rows = [row for kind, units in sizes.items() for row in measure(kind, units, rounds, patience)]
    print_table(rows)
    save(args.out, machine("cpu") | {"quick": args.quick}, rows)


if __name__ == "__main__":
    main()
