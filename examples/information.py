"""What VICReg maximizes: bounds of an entropy, the Gaussian assumption behind them, and losses that use them.

1. A mixture of 200 Gaussians in 6 dimensions, over six noises: a Monte Carlo estimate of its entropy must lie between
   the pairwise lower bound and the upper bounds, in the order of the paper, for every seed.
2. Random networks on digits with noise on the input: how often a test of level 5 % rejects that an output is Gaussian.
   It must be near 5 % for little noise and far above it for much.
3. Training on digits with two augmented views: VICReg against its entropy form with two estimators; a linear probe on
   the encoder's output, from all labels and from 5 per class. The bound only says that the entropy form may not lose
   more than 2 points to VICReg; the difference is printed with its range over the seeds.

    python examples/information.py            about a minute on two idle cores, 5 seeds
    python examples/information.py --quick    under a minute, 2 seeds; the same bounds

Shwartz-Ziv and LeCun (2207.10081); Kolchinsky and Tracey (1706.02419); Bardes et al., VICReg (2105.04906).
"""

import argparse
import math
import statistics
import sys
from functools import partial
from itertools import pairwise

import matplotlib
import numpy as np
import torch
from _digits import Normalize, features, split_digits, two_views
from _flags import add_flags, check_flags, judge, parse
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

from sslkern.analysis import normality_test_of
from sslkern.losses import info_vicreg_loss, vicreg_loss
from sslkern.metrics import entropy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = {"hidden": 256, "width": 64, "batch": 256, "steps": 300, "seeds": 5, "inputs": 100}
QUICK = {"steps": 60, "seeds": 2, "inputs": 50}
COMPONENTS, DIMENSIONS, DRAWS, SPREADS = 200, 6, 20000, (0.1, 0.2, 0.4, 0.6, 0.8, 1.6)
BOUNDS = {
    "pairwise, lower": "pairwise-bhattacharyya",
    "pairwise, upper": "pairwise-kl",
    "moment": "moment",
    "diagonal": "diagonal",
}
SAMPLES = 500  # of each output
NOISES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of pixels in [0, 1]
SMALL, LARGE, LOST = 0.08, 0.25, 0.02  # rejection at the least noise and at the most; accuracy
LOSSES = {
    "VICReg": vicreg_loss,
    "logdet": partial(info_vicreg_loss, entropy="logdet"),
    "pairwise-kl": partial(info_vicreg_loss, entropy="pairwise-kl"),
}


def mixture_entropies(seed, noise):
    """Monte Carlo, its standard error, and the bounds, in nats."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(COMPONENTS, DIMENSIONS, generator=generator, dtype=torch.float64)
    z = z @ (torch.eye(DIMENSIONS, dtype=torch.float64) + 0.2)
    drawn = torch.randn(DRAWS, DIMENSIONS, generator=generator, dtype=torch.float64)
    samples = z[torch.randint(COMPONENTS, (DRAWS,), generator=generator)] + noise * drawn
    exponents = -torch.cdist(samples, z).square() / (2 * noise**2)
    log_density = exponents.logsumexp(-1) - math.log(COMPONENTS) - DIMENSIONS / 2 * math.log(2 * math.pi * noise**2)
    # less what the noise alone adds to each sample, whose mean is 0: a control variate
    values = DIMENSIONS / 2 - log_density - drawn.square().sum(-1) / 2
    bounds = {name: entropy(z, estimator, noise).item() for name, estimator in BOUNDS.items()}
    return values.mean().item(), values.std().item() / DRAWS**0.5, bounds


def ordered(monte_carlo, error, bounds):
    """Whether lower <= Monte Carlo <= both upper bounds, up to four standard errors and 0.001 nats for the rare samples
    between components, and moment <= diagonal. The upper bounds have no order of their own: the pairwise one is tighter
    for little noise."""
    low, high, moment, diagonal = bounds.values()
    slack = 4 * error + 0.001
    return low <= monte_carlo + slack and monte_carlo <= min(high, moment) + slack and moment <= diagonal


def build_network(args, seed):
    """Encoder to 128 features, projector hidden-width. The same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = [Normalize(), nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
        projector = [nn.Linear(128, args.hidden), nn.LayerNorm(args.hidden), nn.ReLU()]
        projector += [nn.Linear(args.hidden, args.width)]
        return nn.Sequential(nn.Sequential(*encoder), nn.Sequential(*projector)).to(args.device)


def random_network(seed):
    """An MLP with torch's initialization, from 64 pixels to 10 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Flatten()]
        for before, after in pairwise((64, 64, 64, 10)):
            layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rejections(args, seed, images):
    """The rejection rate for every noise, of one direction for each input."""
    net = random_network(seed)
    test = partial(normality_test_of, net, images[: args.inputs], directions=1, resamples=1999, random_state=seed)
    return [test(noise, SAMPLES).rejection_rate for noise in NOISES]


def probe(train_x, test_x, train_y, test_y, draws=5):
    """Accuracy of a ridge classifier on held-out digits, from all labels and from 5 per class (mean of the draws)."""

    def accuracy(rows):
        classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-2, 4, 13)))
        return classifier.fit(train_x[rows], train_y[rows]).score(test_x, test_y)

    few = []
    for draw in range(draws):
        random = np.random.default_rng(draw)
        few.append([i for c in range(10) for i in random.choice(np.flatnonzero(train_y == c), 5, replace=False)])
    return accuracy(slice(None)), statistics.mean(map(accuracy, few))


def trained(args, seed, loss, data):
    """The accuracies of a linear probe on the encoder, from all labels and from 5 per class."""
    network = build_network(args, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(args.steps):
        value = loss(*(network(view) for view in two_views(data[0], args.batch, generator, args.device)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return probe(*features(network, *data[:2]), *data[2:])


def measure(args):
    """All measurements: entropies by noise and seed, rejection rates by seed and noise, accuracies by loss and seed."""
    seeds = range(args.seed, args.seed + args.seeds)
    chains = {noise: [mixture_entropies(seed, noise) for seed in seeds] for noise in SPREADS}
    rates, accuracies = [], {name: [] for name in ("raw pixels", "untrained", *LOSSES)}
    for seed in tqdm(seeds, desc="seeds", ncols=110):
        data = split_digits(seed)
        rates.append(rejections(args, seed, data[0]))
        accuracies["raw pixels"].append(probe(*(images.flatten(1).numpy() for images in data[:2]), *data[2:]))
        network = build_network(args, seed)
        accuracies["untrained"].append(probe(*features(network, *data[:2]), *data[2:]))
        for name, loss in LOSSES.items():
            accuracies[name].append(trained(args, seed, loss, data))
    return chains, rates, accuracies


def spread(values, digits):
    values = list(values)
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def print_tables(chains, rates, accuracies):
    print(f"\nEntropy of a mixture of {COMPONENTS} Gaussians, nats, median over the seeds")
    names = ["pairwise, lower", "Monte Carlo", *list(BOUNDS)[1:]]
    print(f"{'noise':>6}" + "".join(f"{name:>18}" for name in names) + f"{'in order':>12}")
    for noise, seen in chains.items():
        values = {"Monte Carlo": [s[0] for s in seen]} | {name: [s[2][name] for s in seen] for name in BOUNDS}
        middle = "".join(f"{statistics.median(values[name]):>18.2f}" for name in names)
        print(f"{noise:>6}{middle}{sum(ordered(*s) for s in seen):>9}/{len(seen)}")
    print("\nRejections of a Gaussian output of a random MLP at 5 %, median and range over the networks")
    for k, noise in enumerate(NOISES):
        print(f"{noise:>6}{spread((r[k] for r in rates), 2):>24}")
    print("\nLinear probe on held-out digits, median and range over the seeds")
    print(f"{'':<12}{'all labels':>28}{'5 per class':>28}")
    for name, seen in accuracies.items():
        print(f"{name:<12}" + "".join(f"{spread((s[k] for s in seen), 3):>28}" for k in (0, 1)))
    for name in list(LOSSES)[1:]:
        paired = list(zip(accuracies[name], accuracies["VICReg"], strict=True))
        gains = [[100 * (x[k] - y[k]) for x, y in paired] for k in (0, 1)]
        print(f"{name} - VICReg, points, paired: {spread(gains[0], 1)}; 5 per class {spread(gains[1], 1)}")


def plot(args, chains, rates, accuracies):
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for name, marker in zip(BOUNDS, "vos^", strict=True):
        gaps = [statistics.median(s[2][name] - s[0] for s in seen) for seen in chains.values()]
        axes[0].plot(list(chains), gaps, f"{marker}-", label=name)
    axes[0].axhline(0, color="black", linestyle=":", label="Monte Carlo")
    axes[0].set(title="Bounds of the entropy of a mixture", xlabel="noise", ylabel="bound - Monte Carlo, nats")
    for r in rates:
        axes[1].plot(NOISES, r, ".-", color="C0", alpha=0.6)
    axes[1].axhline(0.05, color="black", linestyle=":", label="level of the test")
    title = "Z | x of random MLPs: test of normality"
    axes[1].set(title=title, xlabel="noise of the pixels", ylabel="share rejected", ylim=(0, 1))
    axes[1].set(xscale="log")
    names = list(accuracies)
    for k, (label, color) in enumerate((("all labels", "C0"), ("5 per class", "C1"))):
        for row, name in enumerate(names):
            values = [seen[k] for seen in accuracies[name]]
            axes[2].plot(values, [-row] * len(values), "o", color=color, alpha=0.6, label="" if row else label)
    axes[2].set(title="Linear probe, each seed", xlabel="accuracy", yticks=[-r for r in range(len(names))])
    axes[2].set(yticklabels=names)
    for axis in axes:
        axis.legend(frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)
    print(args.out)


def verdict(chains, rates, accuracies):
    """One line for each claim; True if all hold."""
    chain = all(ordered(*s) for seen in chains.values() for s in seen)
    small, large = (statistics.median(r[k] for r in rates) for k in (0, -1))
    middle = {name: statistics.median(s[0] for s in seen) for name, seen in accuracies.items()}
    best = max(middle[name] for name in list(LOSSES)[1:])
    claims = (
        (chain, "lower <= Monte Carlo <= upper and moment <= diagonal, for every noise and seed"),
        (
            small <= SMALL and large >= LARGE,
            f"rejected {small:.2f} at noise {NOISES[0]} (at most {SMALL}), {large:.2f} at {NOISES[-1]} "
            f"(at least {LARGE})",
        ),
        (
            best >= middle["VICReg"] - LOST,
            f"probe {best:.3f} by the better estimator, {middle['VICReg']:.3f} by VICReg (at most {LOST} below)",
        ),
    )
    return judge(claims)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, SIZES, "out/information.png")
    args = parse(parser, QUICK)
    check_flags(parser, args, {"hidden": 1, "width": 1, "batch": 2, "steps": 1, "seeds": 1, "inputs": 1})
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    found = measure(args)
    print_tables(*found)
    plot(args, *found)
    return 0 if verdict(*found) else 1


if __name__ == "__main__":
    sys.exit(main())
