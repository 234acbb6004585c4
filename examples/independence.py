"""Decorrelated features of a random projector make its inputs independent: ICA, and the width of a projector.

First, `VCRegICA` separates four families of sources and is compared with scikit-learn's FastICA: the Amari distance
between the unmixing and the mixing matrix, and the CPU time. Second, an encoder of 8 features is trained on
scikit-learn's digits by VCReg behind a random, fixed projector. The normalised HSIC of its features, averaged over all
pairs, is measured on held-out digits for projectors of growing width. Without a projector, VCReg decorrelates the
features themselves.

    python examples/independence.py            about 10 minutes on two cores
    python examples/independence.py --quick    fewer seeds and steps

Paper: Mialon et al., Variance-covariance regularization enforces pairwise independence (2209.14905).
"""

import argparse
import statistics
import sys
import time
import warnings
from itertools import pairwise

import matplotlib
import numpy as np
import torch
from _flags import add_run_flags, check_run_flags, parse
from sklearn.datasets import load_digits
from sklearn.decomposition import FastICA
from torch import nn

from sslkern.decomposition import VCRegICA
from sslkern.losses import vcreg_loss
from sslkern.metrics import amari_distance, pairwise_hsic

matplotlib.use("Agg")
import matplotlib.pyplot as plt

AMARI, RATIO = 0.03, 2.0  # bounds on the median of VCRegICA, and on its ratio to that of FastICA
FAMILIES = ("uniform", "laplace", "bimodal", "exponential")
WIDTHS = (0, 32, 128, 512)  # 0: no projector
FEATURES, HIDDEN, BATCH, TRAINING = 8, 128, 512, 1198
LARGE = (20_000, 16)  # one of each family in turn


def source(family, n, random):
    if family == "bimodal":
        return random.choice((-1.0, 1.0), n) + 0.4 * random.standard_normal(n)
    return {"uniform": random.uniform, "laplace": random.laplace, "exponential": random.exponential}[family](size=n)


def mixture(families, n, seed):
    """Mixed sources of variance 1, (n, d), and their mixing matrix (d, d) of normal numbers."""
    random = np.random.default_rng(seed)
    s = np.stack([source(family, n, random) for family in families], 1)
    mixing = random.standard_normal((len(families), len(families)))
    return (s - s.mean(0)) / s.std(0) @ mixing.T, mixing


def separate(families, n, seed):
    """The Amari distance and the CPU seconds of both methods, and the distance of the whitening alone."""
    x, mixing = mixture(families, n, seed)
    found = {}
    for name, method in (
        ("VCRegICA", VCRegICA(random_state=seed)),
        ("FastICA", FastICA(whiten="unit-variance", max_iter=1000, random_state=seed)),
    ):
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method.fit(x)
        seconds = time.process_time() - start
        found[name] = (distance(method.components_, mixing), seconds)
    found["whitening"] = (distance(method.whitening_, mixing), 0.0)
    return found


def distance(unmixing, mixing):
    return amari_distance(torch.from_numpy(unmixing), torch.from_numpy(mixing)).item()


def compare(args):
    """Runs by row of the table: {(family, n, d): [results of a seed]}."""
    rows = {(family, args.samples, d): [family] * d for d in args.sources for family in FAMILIES}
    rows |= {("mixed", args.samples, d): [FAMILIES[k % 4] for k in range(d)] for d in args.sources}
    if not args.quick:
        rows[("mixed", *LARGE)] = [FAMILIES[k % 4] for k in range(LARGE[1])]
    runs = {}
    print(f"\n{'sources':<12}{'N':>7}{'d':>4}{'Amari distance, median (range)':^48}{'CPU seconds':>24}{'whitened':>10}")
    print(f"{'':<23}{'VCRegICA':^24}{'FastICA':^24}{'VCRegICA':>12}{'FastICA':>12}")
    for (family, n, d), families in rows.items():
        seeds = range(args.seed, args.seed + (args.seeds if n != LARGE[0] else min(2, args.seeds)))
        runs[family, n, d] = found = [separate(families, n, seed) for seed in seeds]
        cells = "".join(f"{spread([run[name][0] for run in found]):^24}" for name in ("VCRegICA", "FastICA"))
        times = "".join(f"{median(found, name, 1):>12.3f}" for name in ("VCRegICA", "FastICA"))
        print(f"{family:<12}{n:>7}{d:>4}{cells}{times}{median(found, 'whitening', 0):>10.2f}", flush=True)
    print("Whitened: the Amari distance of the whitening alone.")
    return runs


def median(found, name, k):
    return statistics.median(run[name][k] for run in found)


def spread(values):
    return f"{statistics.median(values):.4f} ({min(values):.4f}-{max(values):.4f})"


def encode(width, steps, seed):
    """Held-out features (599, 8) of an encoder that was trained behind a random projector of this width."""
    torch.manual_seed(seed)
    images = torch.from_numpy(load_digits().data / 16).float()[torch.randperm(1797)]
    encoder = nn.Sequential(
        *(nn.Linear(64, HIDDEN), nn.ReLU()), *(nn.Linear(HIDDEN, FEATURES), nn.BatchNorm1d(FEATURES, affine=False))
    )
    projector = nn.Sequential()
    if width:
        projector = nn.Sequential(
            *(nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width, affine=False)),
        )
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = vcreg_loss(projector(encoder(images[torch.randint(TRAINING, (BATCH,))])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return encoder.eval()(images[TRAINING:])


def dependence(z, kernel):
    hsic = pairwise_hsic(z, kernel, normalized=True)
    return ((hsic.sum() - hsic.trace()) / (len(hsic) * (len(hsic) - 1))).item()


def widen(args):
    """{width: [(HSIC, squared correlation, HSIC of shuffled features) of a seed]}."""
    found = {}
    print(f"\n{'projector':<12}{'normalised HSIC':^28}{'squared correlation':^28}{'HSIC, features shuffled':^28}")
    for width in WIDTHS:
        found[width] = []
        for seed in range(args.seed, args.seed + args.seeds):
            z = encode(width, args.steps, seed)
            shuffled = z.gather(0, torch.rand(z.shape).argsort(0))
            found[width].append((dependence(z, "rbf"), dependence(z, "linear"), dependence(shuffled, "rbf")))
        cells = "".join(f"{spread(values):^28}" for values in zip(*found[width], strict=True))
        print(f"{width or 'none':<12}{cells}", flush=True)
    print("HSIC of shuffled features, which are independent, is the bias of the estimate.")
    return found


def plot(args, runs, widths):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    labels = [f"{family}\nd = {d}" + ("" if n == args.samples else f"\nN = {n}") for family, n, d in runs]
    for name, shift, color in (("VCRegICA", -0.15, "C0"), ("FastICA", 0.15, "C1")):
        for k, found in enumerate(runs.values()):
            values = [run[name][0] for run in found]
            left.plot([k + shift] * len(values), values, "o", ms=3, color=color, alpha=0.5)
            left.plot(k + shift, statistics.median(values), "_", ms=14, mew=2, color=color, label=None if k else name)
    left.axhline(AMARI, color="black", ls=":", lw=1, label=f"bound on the median, {AMARI}")
    left.set_xticks(range(len(labels)), labels, fontsize=7, rotation=60)
    left.set(title=f"Error of ICA, N = {args.samples}", ylabel="Amari distance (0 exact, 1 at most)", yscale="log")
    left.legend(frameon=False, fontsize=8)
    places = range(len(widths))
    for k, (label, style) in enumerate((("HSIC", "o-C0"), ("squared correlation", "s--C2"), ("shuffled", "^:k"))):
        values = [[run[k] for run in found] for found in widths.values()]
        right.plot(places, [statistics.median(v) for v in values], style, label=label)
        low, high = [min(v) for v in values], [max(v) for v in values]
        right.fill_between(places, low, high, color=style[-2:].strip(":"), alpha=0.15)
    right.set_xticks(places, [str(width or "none") for width in widths])
    right.set(title=f"Pairs of {FEATURES} features of an encoder of digits", xlabel="width of the random projector")
    right.set(ylabel="mean over pairs, normalised (0 to 1)", yscale="log")
    right.legend(frameon=False, fontsize=8, title="median and range")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    print(args.out)


def verdict(args, runs, widths):
    """Print one line for ICA and one for the widths; True if both hold."""
    small = {key: found for key, found in runs.items() if key[1] == args.samples}
    worst = max(median(found, "VCRegICA", 0) for found in small.values())
    ratio = max(median(found, "VCRegICA", 0) / median(found, "FastICA", 0) for found in small.values())
    medians = [statistics.median(run[0] for run in widths[width]) for width in WIDTHS[1:]]
    separated = worst < AMARI and ratio <= RATIO
    falls = all(low < high for high, low in pairwise(medians))
    print(f"ICA: largest median {worst:.4f} (bound {AMARI}), largest ratio to FastICA's {ratio:.2f} (bound {RATIO})")
    print(
        f"{'PASS' if separated and falls else 'FAIL'}: ICA {'within' if separated else 'out of'} its bounds; HSIC by "
        f"width {', '.join(f'{m:.4f}' for m in medians)} {'falls' if falls else 'does not fall'} monotonically"
    )
    return separated and falls


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="of each mixture; default 2000")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of the encoder; default 200")
    add_run_flags(parser, "out/independence.png")
    args = parse(parser, {"seeds": 3, "steps": 60}, "3 sources, no large mixture")
    args.sources = (3,) if args.quick else (3, 4)
    check_run_flags(parser, args, {"seeds": 1, "samples": 10, "steps": 1})
    return args


def main():
    args = parse_arguments()
    runs = compare(args)
    widths = widen(args)
    plot(args, runs, widths)
    return 0 if verdict(args, runs, widths) else 1


if __name__ == "__main__":
    sys.exit(main())
