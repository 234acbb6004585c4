"""`python -m bench.analysis_covariance_operator`: products with a covariance operator, with and without forming K.

Three ways, in float64, all through autograd:

    sslkern        one recorded graph, differentiated in both directions
    jvp and vjp    torch.func on the whole batch for every product: what one writes without forming K
    K formed       the Jacobian of every row, averaged over views: (N, D, n) numbers; then two matrix products

Set-up is what is done once: recording the graph, or forming K. Times are CPU seconds of one thread, medians. Memory is
the peak of the bytes allocated, for set-up and one product together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sslkern.analysis import covariance_operator

from .run import allocated, machine, save

Apply = Callable[[Tensor], Tensor]
Setup = Callable[[], Apply]
SHAPES = {  # name: (widths, samples, layer)
    "MLP 64-128-64-16, middle layer": ((64, 128, 64, 16), 128, "2"),
    "MLP 256-256-256-16, first layer": ((256, 256, 256, 16), 64, "0"),
    "conv 3-16-32, 8 x 8, second layer": ((3, 16, 32, 16), 128, "2"),
}
QUICK = {
    "MLP 16-24-12-4, middle layer": ((16, 24, 12, 4), 12, "2"),
    "conv 3-4-6, 8 x 8, second layer": ((3, 4, 6, 4), 8, "2"),
}
VIEWS = 2


def network(name: str, widths: tuple[int, ...], samples: int) -> tuple[nn.Module, Tensor]:
    """A network and views of random samples."""
    torch.manual_seed(0)
    a, b, c, d = widths
    if name.startswith("conv"):
        layers = [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(b, c, 3, 2, 1, bias=False), nn.ReLU()]
        net, shape = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, d)), (a, 8, 8)
    else:
        layers = [nn.Linear(a, b, bias=False), nn.ReLU(), nn.Linear(b, c, bias=False), nn.ReLU()]
        net, shape = nn.Sequential(*layers, nn.Linear(c, d)), (a,)
    shared = torch.randn(1, samples, *shape, dtype=torch.float64)
    return net.double().requires_grad_(False), shared + 0.5 * torch.randn(VIEWS, samples, *shape, dtype=torch.float64)


def ways(net: nn.Module, views: Tensor, layer: str) -> dict[str, Setup]:
    """The set-up of each way, which returns the product."""
    weight, name, n = net.get_parameter(f"{layer}.weight").detach(), f"{layer}.weight", views.shape[1]

    def outputs(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(net, {name: w}, (x,))

    def ours() -> Apply:
        return covariance_operator(net, views, layer).apply

    def by_rows() -> Apply:
        rows = views.flatten(0, 1)

        def apply(v: Tensor) -> Tensor:
            _, moved = torch.func.jvp(lambda w: outputs(w, rows), (weight,), (v,))
            mean = moved.unflatten(0, views.shape[:2]).mean(0)
            s = (2 / (n - 1) / VIEWS * (mean - mean.mean(0))).repeat(VIEWS, 1)
            return torch.func.vjp(lambda w: outputs(w, rows), weight)[1](s)[0]

        return apply

    def formed() -> Apply:
        jacobian = torch.func.vmap(torch.func.jacrev(lambda w, x: outputs(w, x[None])[0]), (None, 0))
        with torch.no_grad():
            k = sum(jacobian(weight, x).flatten(2) for x in views) / VIEWS  # (N, D, n)
            k = (k - k.mean(0)).flatten(0, 1)
        return lambda v: (2 / (n - 1) * (k.mT @ (k @ v.flatten()))).view_as(v)

    return {"sslkern": ours, "jvp and vjp": by_rows, "K formed": formed}


def seconds(call: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def _once(setup: Setup, direction: Tensor) -> Tensor:
    return setup()(direction)


def measure(shapes: dict[str, tuple], rounds: int) -> list[dict]:
    rows = []
    for name, (widths, samples, layer) in shapes.items():
        net, views = network(name, widths, samples)
        direction = torch.randn_like(net.get_parameter(f"{layer}.weight"))
        expected: Tensor | None = None
        for way, setup in reversed(ways(net, views, layer).items()):
            once = seconds(setup, rounds // 3)
            peak = allocated(partial(_once, setup, direction))[0]
            apply = setup()
            found = apply(direction)
            expected = found if expected is None else expected
            error = float((found - expected).abs().max() / expected.abs().max())
            each = seconds(partial(apply, direction), rounds)
            rows.append(
                {
                    "case": name,
                    "samples": samples,
                    "views": VIEWS,
                    "elements": direction.numel(),
                    "implementation": way,
                    "setup_seconds": once,
                    "apply_seconds": each,
                    "peak_bytes": peak,
                    "error": error,
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'':<45}{'way':>13}{'set-up, ms':>12}{'product, ms':>13}{'peak, MB':>10}{'difference':>12}"]
    for row in rows:
        first = f"{row['case']} (n = {row['elements']})" if row["implementation"] == "K formed" else ""
        times = f"{1e3 * row['setup_seconds']:>12.1f}{1e3 * row['apply_seconds']:>13.2f}"
        lines.append(
            f"{first:<45}{row['implementation']:>13}{times}{row['peak_bytes'] / 1e6:>10.1f}{row['error']:>12.0e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.analysis_covariance_operator", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small layers, few rounds; not for publication")
    parser.add_argument("--out", type=Path, help="result file; nothing is written without it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(QUICK if args.quick else SHAPES, 3 if args.quick else 9)
    print(table(rows))
    if args.out:
        save(args.out, {**machine("cpu"), "quick": args.quick}, rows)


if __name__ == "__main__":
    main()
