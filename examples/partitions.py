"""Batch norm moves the boundaries of a ReLU network to the samples: before and after, on digits.

Random 4 x 64 ReLU networks (He's weights) with zero biases, with random biases (torch's, uniform in +-1/8), and with
batch norms whose statistics are fitted to the samples once. To tell what matters, also with their offsets alone, with
their scales alone, and with both folded into weights and biases, which leaves no further parameters.

1. Offsets: the sum of squared distances from the samples to the boundaries of each layer, by its minimum over the
   offsets. Fitted statistics must attain the minimum.
2. Partitions: how many units have their boundary within 0.1 of a sample, and how far the region of a sample reaches.
   Fitted statistics must have at least twice as many as zero and random biases, for every seed.
3. Jitter: the standard deviation of the offset over mini-batches by sigma / sqrt(B). It must be 1 within 2 % by running
   statistics. In training, later layers are reported only.
4. A smart initialization: SGD with momentum 0.9 from these networks, the fitted statistics frozen. The score is the
   accuracy on held-out digits, averaged over the first 100 steps. Fitted statistics must have the higher median at
   the same learning rate, 0.01, by at least 3 points, and at the best learning rate of each network by any amount,
   folded too. The parts alone, and batch norm in training mode, are reported only.

    python examples/partitions.py            about a minute on two idle cores, 5 seeds
    python examples/partitions.py --quick    2 seeds, two learning rates; the same bounds

Balestriero and Baraniuk, Batch normalization explained (2209.14778).
"""

import argparse
import io
import statistics
import sys

import matplotlib
import torch
import torch.nn.functional as F
from _digits import split_digits
from _flags import add_run_flags, add_sizes, check_run_flags, judge, parse
from PIL import Image
from torch import nn
from tqdm import tqdm

from sslkern.analysis import boundary_jitter, fit_batch_norm_, partition_distance, plot_partition, tls_distance

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RIVALS, FITTED, FOLDED = ("zero biases", "random biases"), "fitted, frozen", "fitted, folded"
KINDS = (*RIVALS, "offsets only", "scales only", FITTED, FOLDED, "batch norm")
RADII = (0.02, 0.05, 0.1, 0.2, 0.5)  # pixels are in [0, 1]
BATCHES, STEPS, EVERY = (8, 32, 128), 100, 5
RATES, SAME_RATE = (0.003, 0.01, 0.03, 0.1), 0.01
QUICK_RATES = (0.01, 0.03)
AT_LEAST, JITTER, POINTS = 2.0, 0.02, 0.03
score = statistics.mean  # of a learning curve


def build_network(kind, seed, images, depth=4, width=64):
    """A random ReLU network from 64 pixels to 10 classes. The weights of a seed are the same for all kinds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers, inputs = [], images.shape[1]
        for outputs in [width] * depth:
            linear = nn.Linear(inputs, outputs)
            nn.init.kaiming_normal_(linear.weight)
            if kind != "random biases":
                nn.init.zeros_(linear.bias)
            norm = [nn.BatchNorm1d(outputs)] if kind in (FITTED, "batch norm") else []
            layers += [linear, *norm, nn.ReLU()]
            inputs = outputs
        net = nn.Sequential(*layers, nn.Linear(inputs, 10))
        nn.init.kaiming_normal_(net[-1].weight)
    if kind in ("offsets only", "scales only", FOLDED):
        fit_biases_and_weights(net, images, kind)
    if kind == FITTED:
        fit_batch_norm_(net, images)
    return net.eval()


@torch.no_grad()
def fit_biases_and_weights(net, images, kind):
    """Scale the pre-activation of each hidden unit to a variance of 1, move its boundary to the mean, or both."""
    h = images
    for part in net[:-1]:
        if isinstance(part, nn.Linear):
            if kind != "offsets only":
                part.weight.div_(part(h).std(0).clamp_min(1e-5)[:, None])
            if kind != "scales only":
                part.bias.sub_(part(h).mean(0))
        h = part(h)


@torch.no_grad()
def excess(net, images):
    """For each hidden layer, the sum of squared distances to its boundaries by the least possible."""
    h, ratios = images.double(), []
    for k, part in enumerate(net.double()[:-1]):
        if isinstance(part, nn.Linear):
            norm = net[k + 1] if isinstance(net[k + 1], nn.BatchNorm1d) else None
            offset = -part.bias if norm is None else norm.running_mean - part.bias
            found, least = tls_distance(h, part.weight, offset), tls_distance(h, part.weight)
            ratios.append(float(found.sum() / least.sum()))
        h = part(h)
    net.float()
    return ratios


def train(kind, seed, rate, data):
    """Accuracy on held-out digits every few steps."""
    images, held_out, labels, held_out_labels = data
    net = build_network(kind, seed, images)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                curve.append(float((net.eval()(held_out).argmax(1) == held_out_labels).double().mean()))
        rows = torch.randint(len(images), (64,), generator=generator)
        net.train(kind == "batch norm")  # frozen statistics: evaluation mode
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    return curve


def digits(seed):
    images, held_out, labels, held_out_labels = split_digits(seed)
    return images.flatten(1), held_out.flatten(1), torch.as_tensor(labels), torch.as_tensor(held_out_labels)


def measure(args):
    """All figures, by kind and seed."""
    found = {"excess": {}, "counts": {}, "distance": {}, "curves": {}, "jitter": {}}
    rates = QUICK_RATES if args.quick else RATES
    for seed in tqdm(range(args.seed, args.seed + args.seeds), desc="seeds", ncols=110):
        data = digits(seed)
        for kind in KINDS[:5]:
            net = build_network(kind, seed, data[0])
            found["excess"].setdefault(kind, []).append(excess(net, data[0]))
            result = partition_distance(net, data[0], within=RADII)
            found["counts"].setdefault(kind, []).append(result.counts.double().mean(0).tolist())
            found["distance"].setdefault(kind, []).append(float(result.distance.median()))
        net = build_network(FITTED, seed, data[0]).double()
        for size in BATCHES:
            for training in (False, True):
                count = args.batches // 5 if training else args.batches
                jitter = boundary_jitter(
                    net, data[0].double(), size, n_batches=count, training=training, random_state=seed
                )
                found["jitter"].setdefault((size, training), []).append(jitter.ratio.tolist())
        for kind in KINDS:
            for rate in rates:
                found["curves"].setdefault((kind, rate), []).append(train(kind, seed, rate, data))
    return found


def spread(values, digits=1):
    values = sorted(values)
    return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})"


def best_rates(curves):
    """For each kind, the learning rate of the highest median score."""
    rates = sorted({rate for _, rate in curves})
    return {
        kind: max(rates, key=lambda rate: statistics.median(map(score, curves[kind, rate])))
        for kind in dict.fromkeys(kind for kind, _ in curves)
    }


def paired_gains(curves, fitted, rate_of):
    """For each seed, the score of `fitted` less the better one of zero and random biases, in points."""
    seeds = zip(*(map(score, curves[kind, rate_of(kind)]) for kind in (fitted, *RIVALS)), strict=True)
    return [100 * (fitted - max(rivals)) for fitted, *rivals in seeds]


def print_tables(found):
    print("\nMedian and range over the seeds")
    print(f"{'':<16}{'squared distances':>20}{'units within 0.1':>28}{'distance to boundary':>32}")
    for kind in KINDS[:5]:
        ratio = statistics.median(statistics.mean(layers) for layers in found["excess"][kind])
        counts = spread(c[RADII.index(0.1)] for c in found["counts"][kind])
        print(f"{kind:<16}{ratio:>18.3f} x{counts:>28}{spread(found['distance'][kind], 5):>32}")
    print("\nJitter of the offset by sigma / sqrt(B), for each layer, median over the seeds")
    for (size, training), seen in found["jitter"].items():
        layers = "".join(f"{statistics.median(layer):>8.3f}" for layer in zip(*seen, strict=True))
        print(f"B = {size:<4}{'in training' if training else 'by running statistics':<24}{layers}")
    curves, best = found["curves"], best_rates(found["curves"])
    print(f"\nAccuracy on held-out digits, mean over the first {STEPS} steps")
    print(f"{'':<16}{f'rate {SAME_RATE}':>26}{'best rate':>34}{'after 100 steps':>28}")
    for kind in KINDS:
        same, own = curves[kind, SAME_RATE], curves[kind, best[kind]]
        print(
            f"{kind:<16}{spread(map(score, same), 3):>26}{f'{best[kind]}: {spread(map(score, own), 3)}':>34}"
            f"{spread((c[-1] for c in own), 3):>28}"
        )
    print(f"Less the better one of {' and '.join(RIVALS)}, points, paired")
    for kind in (FITTED, FOLDED):
        same, own = (spread(paired_gains(curves, kind, f)) for f in (lambda _: SAME_RATE, best.get))
        print(f"{kind:<16}{same:>26}{own:>34}")


def plot(args, found):
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(13, 8.4), layout="constrained")
    images = digits(args.seed)[0]
    for ax, kind in zip(axes[0], ("zero biases", "random biases", FITTED), strict=True):
        net = build_network(kind, args.seed, images, depth=2)
        plot_partition(net, images[:150], through=images[:3], resolution=300, ax=ax)
        ax.set_title(f"Boundaries of 2 x 64 units: {kind}")
    for k, kind in enumerate(KINDS[:5]):
        middle = [statistics.median(c) for c in zip(*found["counts"][kind], strict=True)]
        axes[1, 0].plot(RADII, middle, "o-", color=f"C{k}", label=kind)
    axes[1, 0].set(xscale="log", xlabel="radius around a sample, units of the input", ylabel="units within, of 256")
    axes[1, 0].set_xticks(RADII, [f"{radius:g}" for radius in RADII])
    axes[1, 0].set_title("Partitions near the samples")
    for training, marker in ((False, "o-"), (True, "s--")):
        for layer, color in ((0, "C0"), (3, "C1")):
            middle = [statistics.median(r[layer] for r in found["jitter"][size, training]) for size in BATCHES]
            label = f"layer {layer + 1}, {'in training' if training else 'running statistics'}"
            axes[1, 1].plot(BATCHES, middle, marker, color=color, label=label)
    axes[1, 1].set(xscale="log", xlabel="mini-batch size B", ylabel="jitter by sigma / sqrt(B)", ylim=(0, 1.3))
    axes[1, 1].set_xticks(BATCHES, [str(size) for size in BATCHES])
    axes[1, 1].set_title("Jitter of the boundaries")
    steps = range(0, STEPS + 1, EVERY)
    for k, kind in enumerate(KINDS):
        if kind in ("offsets only", "scales only"):
            continue
        curves = found["curves"][kind, best_rates(found["curves"])[kind]]
        values = list(zip(*curves, strict=True))
        axes[1, 2].plot(steps, list(map(statistics.median, values)), color=f"C{k}", label=kind)
        axes[1, 2].fill_between(steps, list(map(min, values)), list(map(max, values)), color=f"C{k}", alpha=0.12)
    axes[1, 2].set(xlabel="steps of SGD, best learning rate of each", ylabel="accuracy on held-out digits")
    axes[1, 2].set_title("Learning curves")
    for ax in axes[1]:
        ax.minorticks_off()
        ax.legend(frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=75)
    image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # a quarter of the size
    image.save(args.out, optimize=True)
    print(args.out)


def verdict(found):
    """One line for each claim; True if all hold."""
    least = max(ratio for layers in found["excess"][FITTED] for ratio in layers)
    at = RADII.index(0.1)
    rivals = map(max, *([c[at] for c in found["counts"][rival]] for rival in RIVALS))
    ratios = [fitted[at] / rival for fitted, rival in zip(found["counts"][FITTED], rivals, strict=True)]
    jitter = [statistics.median(layer) for size in BATCHES for layer in zip(*found["jitter"][size, False], strict=True)]
    off = max(abs(ratio - 1) for ratio in jitter)
    curves, best = found["curves"], best_rates(found["curves"])

    def gain(fitted, rate_of):
        middle = {kind: statistics.median(map(score, curves[kind, rate_of(kind)])) for kind in (fitted, *RIVALS)}
        return middle[fitted] - max(middle[rival] for rival in RIVALS)

    same, own, folded = gain(FITTED, lambda _: SAME_RATE), gain(FITTED, best.get), gain(FOLDED, best.get)
    claims = (
        (least < 1 + 1e-6, f"fitted offsets have the least squared distances (up to {least - 1:.0e}, at most 1e-6)"),
        (
            min(ratios) >= AT_LEAST,
            f"{min(ratios):.2f} to {max(ratios):.2f} times as many units within 0.1 (at least {AT_LEAST:g})",
        ),
        (off <= JITTER, f"jitter within {100 * off:.1f} % of sigma / sqrt(B) (at most {100 * JITTER:g} %)"),
        (same >= POINTS, f"score {100 * same:.1f} points higher at rate {SAME_RATE} (at least {100 * POINTS:g})"),
        (
            min(own, folded) > 0,
            f"score {100 * own:.1f} points higher at the best rates, {100 * folded:.1f} folded (more than 0)",
        ),
    )
    return judge(claims)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, {"seeds": 5})
    add_run_flags(parser, "out/partitions.png")
    args = parse(parser, {"seeds": 2}, "two learning rates, fewer mini-batches")
    check_run_flags(parser, args, {"seeds": 1})
    args.batches = 1000 if args.quick else 4000
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    found = measure(args)
    print_tables(found)
    plot(args, found)
    return 0 if verdict(found) else 1


if __name__ == "__main__":
    sys.exit(main())
