"""`python -m bench.gpu.predict`: what the cases of a GPU run would take, predicted without a GPU.

Launches are noted on fake tensors (`launched.py`), kernels are compiled, and their instructions are counted
(`model.py`). Writes bench/results/predicted.json and the tables of docs/gpu.md. Cases that rest on kernels in C++
are left out. `--report` predicts nothing, and writes the tables from the file.

`--calibrate RUN.json`, in a checkout of the commit of a run, compares the model with what the run has measured, and
adds the comparison to the file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from .. import cases
from ..case import Case
from ..report import into_document
from ..run import _commit, machine
from . import model, speed
from .launched import Launch, noted, on_host

ROOT = Path(__file__).parents[2]
FILE, DOCUMENT = ROOT / "bench" / "results" / "predicted.json", ROOT / "docs" / "gpu.md"
PRECISIONS = {"": "highest", ", high": "high"}
FAMILIES = ("vicreg", "barlow", "covariance", "pairs")  # whose kernels are Triton's or torch's
SMALL = ("vicreg 256 2048", "barlow 256 2048", "pairs NT-Xent 512 128", "pairs CLIP 256 256", "pairs HSIC 256 32")
PROFILED = ("vicreg 256 8192", "pairs NT-Xent 8192 128", "covariance 1000000 16")
HOST = (16, 24)  # rows and columns at which the host's part is measured


def chosen() -> list[str]:
    """The cases of the speed phase that are predicted, and small ones."""
    return [*SMALL, *(name for name in speed.ORDER if name.split()[0] in FAMILIES)]


def case_of(name: str) -> Case:
    """A case of one of the FAMILIES, of any size."""
    family, what = name.split()[0], re.sub(r"^\S+ |(?:^| )\d+(?= |$)", "", name)
    sizes = tuple(speed.sizes_of(name))
    if family == "pairs":
        return cases.pairs_case(what, sizes, "cpu")
    return cases.covariance_case(sizes, "cpu") if family == "covariance" else cases.loss_case(family, *sizes, "cpu")


@contextmanager
def precision(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launches_of(name: str) -> list[Launch]:
    with noted() as launches:
        case = case_of(name)
        inputs = case.inputs()
        launches.clear()
        speed.Calls(case, "sslkern", [inputs]).one()
    return launches


class Predictions:
    """Kernels are compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, model.Compiled] = {}

    def time(self, launch: Launch, gpu: model.Gpu) -> model.Time:
        if launch.source is None:
            return model.operator_time(launch, gpu)
        key = launch.source.hash() + str(launch.options)
        if key not in self.known:
            self.known[key] = model.compiled(launch, self.folder)
        return model.time_of(self.known[key], launch, gpu)

    def row(self, name: str, suffix: str) -> dict:
        """What a case takes on every GPU, its launches, and the kernel with the largest share of the time."""
        with precision(PRECISIONS[suffix]):
            launches = launches_of(name)
            times = {key: [self.time(launch, gpu) for launch in launches] for key, gpu in model.GPUS.items()}
            host = host_seconds(name, [launch.name for launch in launches])
        row: dict = {"case": name + suffix, "launches": len(launches), "host": host}
        for key, gpu in model.GPUS.items():
            rates = {"copy": gpu.copy, "sgemm": gpu.sgemm, "bf16 product": gpu.bf16}
            row[key] = sum(time.seconds for time in times[key])
            row[f"{key} floor"] = speed.floor(name, rates, PRECISIONS[suffix], 4)
        first = next(iter(model.GPUS))
        kernels: dict[tuple[str, str], list[model.Time]] = {}
        for launch, spent in zip(launches, times[first], strict=True):
            kernels.setdefault((launch.name, spent.bound), []).append(spent)
        taken = {what: sum(spent.seconds for spent in each) for what, each in kernels.items()}
        most = max(taken, key=lambda what: taken[what])
        row["most"], row["bound"], row["share"] = *most, taken[most] / row[first]
        row["parts"] = largest_parts(kernels[most])
        return row


def largest_parts(times: list[model.Time], count: int = 3) -> dict[str, float]:
    """The parts that would take longest alone, of several launches together."""
    total: Counter[str] = Counter()
    for time_of_launch in times:
        total.update(time_of_launch.parts)
    return {part: float(seconds) for part, seconds in total.most_common(count) if seconds}


def host_seconds(name: str, names: list[str], calls: int = 60) -> float | None:
    """What a call takes on this machine's host: that of a small case of the same kind, whose launches of Triton go
    nowhere. None if the small case launches other kernels than `names`."""
    rows, columns = speed.sizes_of(name)[-2:]
    n, d = HOST if rows < columns else (2 * HOST[1], HOST[0])
    small = re.sub(r"\d+ \d+$", f"{n} {d}", name)
    if [launch.name for launch in launches_of(small)] != names:
        return None
    with on_host():
        case = case_of(small)
        call = speed.Calls(case, "sslkern", [case.inputs()])
        for _ in range(5):
            call.one()
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            call.one()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def calibration(run: dict, predictions: Predictions) -> list[dict]:
    """Kernels and cases that a run has measured, beside what the model says of them; at the commit of the run."""
    gpu, found = model.GPUS["H200"], []
    named = {row["case"]: row for row in run["rows"] if row.get("implementation") == "sslkern"}
    profile = [row for row in run["rows"] if row.get("ours")]
    for name in dict.fromkeys((*PROFILED, *named)):
        if name.split()[0] not in FAMILIES:
            continue
        launches = launches_of(name)
        times = [predictions.time(launch, gpu).seconds for launch in launches]
        for row in profile if name in PROFILED else ():
            own = [k for k, launch in enumerate(launches) if launch.name == row["what"]]
            same = len(own) == row["calls"]  # else kernels of other calls are among them
            if same and row["metrics"]["grid"] == statistics.mean(math.prod(launches[k].grid) for k in own):
                mean = {"predicted": statistics.mean(times[k] for k in own)}
                each = {"measured": row["metrics"]["us"] * 1e-6 / row["calls"]}
                found.append({"what": f"{row['what']}, {name}", **each, **mean})
        if "kernels" in named.get(name, {}):
            found.append({"what": name, "measured": named[name]["kernels"], "predicted": sum(times)})
    return found


PREDICTED = """\
These times are predicted, not measured. `python -m bench.gpu.predict` notes the launches of each case without a GPU,
and compiles its kernels for sm_90. Then it counts their instructions: how often each loop turns, how long the units of
a multiprocessor are busy, and how many programs share one. The products of cuBLAS and the kernels of torch count by
their flops and bytes, at the rates that were measured on the H200. The H100 is the same processor with slower memory.
Commit {commit}; forward + backward, in us:

- *floor* is the bound described above, and *ratio* is the prediction over it.
- *launches* counts the kernels of a call. *host* is the time that Python takes for them, measured on a CPU with
  launches that go nowhere, for a small case that launches the same kernels.
- *most of it* names the kernel with the largest share of the time on the H200, with its three slowest parts and the
  time that each would take alone, in us. They overlap in part. "one warp": a warp waits for its own instructions, one
  after the other. "issue", "tensor" and others: a unit of the multiprocessors is busy; "memory" is the one that loads
  and stores. "bytes" and "cache": traffic to memory and to the second-level cache. "products": flops of cuBLAS.
  "launch": the kernel is too short for anything but its launch to matter."""
COMPARED = """\
The model beside the run of commit {commit}, with the sources of that commit: kernels that were profiled, and whole
cases. The constants of the model were fitted to these rows."""
TABLE = (
    "| case | H200, us | floor | ratio | H100, us | floor | ratio | launches | host, us | most of it |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def markdown(found: dict) -> str:
    lines = [PREDICTED.format(commit=found["predicted"]), "", *TABLE]
    for row in found["rows"]:
        cells = [row["case"]]
        for key in model.GPUS:
            floor = row[f"{key} floor"]
            cells += [f"{row[key] * 1e6:.0f}", f"{floor * 1e6:.3g}", f"{row[key] / floor:#.3g}".rstrip(".")]
        parts = ", ".join(f"{part} {seconds * 1e6:.0f}" for part, seconds in row["parts"].items())
        where = f"{row['most']}, {row['share']:.0%}: {'launch' if row['bound'] == 'launch' else parts}"
        host = "" if row["host"] is None else f"{row['host'] * 1e6:.0f}"
        lines.append("| " + " | ".join([*cells, str(row["launches"]), host, where]) + " |")
    lines += ["", COMPARED.format(commit=found["commit"]), "", *_compared(found)]
    return "\n".join(lines) + "\n"


def _compared(found: dict) -> list[str]:
    lines = [f"| H200, commit {found['commit']} | measured, us | predicted, us | ratio |", "| --- | --- | --- | --- |"]
    for row in found["calibration"]:
        ratio = row["predicted"] / row["measured"]
        lines.append(f"| {row['what']} | {row['measured'] * 1e6:.1f} | {row['predicted'] * 1e6:.1f} | {ratio:.2f} |")
    return lines


def write(found: dict) -> None:
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    into_document(DOCUMENT, "predicted", markdown(found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.predict", description=__doc__)
    parser.add_argument("--report", action="store_true", help="write the tables from the file")
    parser.add_argument("--calibrate", type=Path, metavar="RUN.json", help="compare with a run, at its commit")
    args = parser.parse_args()
    found = json.loads(FILE.read_text()) if FILE.exists() else {"rows": [], "calibration": []}
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    with TemporaryDirectory() as folder:
        predictions = Predictions(Path(folder))
        if args.calibrate:
            run = json.loads(args.calibrate.read_text())
            found |= {"calibration": calibration(run, predictions), "commit": run["machine"]["commit"]}
        elif not args.report:
            plans = [(name, suffix) for name in chosen() for suffix in PRECISIONS if not suffix or name in speed.VARIED]
            found["rows"] = [predictions.row(*plan) for plan in tqdm(plans)]
            found |= {"host": machine("cpu"), "predicted": _commit()}
    write(found)


if __name__ == "__main__":
    main()
