"""Accuracy after training by lightly's losses and by ours through `patch`: SimCLR, VICReg and Barlow Twins on digits.

Each loss trains the same small network from the same weights on the same views twice: by lightly's class, and inside
`sslkern.train.patch("lightly")`. Rounding errors grow during a training, so the trained networks are not equal bit for
bit, and one seed says little. The table has the accuracy of a linear probe on held-out digits over several seeds, and
the paired difference with its 95 % interval.

    python examples/peers/parity.py            a quarter of an hour on two cores; needs lightly
    python examples/peers/parity.py --quick    two seeds of 20 steps, with a wider limit
    python examples/peers/parity.py --docs     write bench/results/parity.json and the table in docs/migration.md too

Digits: scikit-learn.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import lightly.loss
import matplotlib
import torch
from tqdm import tqdm

sys.path.insert(1, str(Path(__file__).parents[1]))  # the parts that all examples share
sys.path.insert(2, str(Path(__file__).parents[2]))  # the reports of the bench
from _digits import build_network, features, linear_accuracy, split_digits, two_views
from _flags import add_flags, check_flags, judge, parse
from _switch import POINTS

import sslkern
from bench.report import into_document
from bench.run import machine

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSSES = {
    "SimCLR": ("NTXentLoss", {"temperature": 0.2}),
    "VICReg": ("VICRegLoss", {}),
    "Barlow Twins": ("BarlowTwinsLoss", {}),
}
SIZES = {"hidden": 512, "width": 512, "batch": 256, "steps": 150, "seeds": 10}
QUICK = {"steps": 20, "seeds": 2}
QUANTILE = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # of t, at 97.5 %
ROUGH = 0.01  # the limit of the short form
RESULTS, DOCUMENT = Path("bench/results/parity.json"), Path("docs/migration.md")


def train(args, criterion, train_x, seed):
    """A network trained from the weights and on the views of this seed, and its last loss."""
    args.seed = seed
    network = build_network(args)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        a, b = two_views(train_x, args.batch, generator, args.device)
        loss = criterion(network(a), network(b))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, loss.item()


def accuracies(args, name, bar):
    """The accuracies by lightly's loss and by ours, for each seed."""
    kind, settings = LOSSES[name]
    found = {"lightly": [], "sslkern": []}
    for seed in range(args.seeds):
        train_x, test_x, train_y, test_y = split_digits(seed)
        for whose, accuracy in found.items():
            if whose == "sslkern":
                with sslkern.train.patch("lightly", quiet=True):
                    criterion = getattr(lightly.loss, kind)(**settings)
                assert type(criterion).__module__.startswith("sslkern")
            else:
                criterion = getattr(lightly.loss, kind)(**settings)
            network, _ = train(args, criterion, train_x, seed)
            accuracy.append(linear_accuracy(*features(network, train_x, test_x), train_y, test_y))
            bar.update()
    return found


def paired(found):
    """The mean of the differences, ours less lightly's, and half of its 95 % interval."""
    differences = [ours - theirs for theirs, ours in zip(found["lightly"], found["sslkern"], strict=True)]
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), QUANTILE[len(differences)] * spread


def table(results):
    """The accuracies in Markdown."""
    lines = [
        "| loss | lightly's, mean (range) | patched, mean (range) | difference, 95 % interval |",
        "|" + " --- |" * 4,
    ]
    for name, found in results["accuracies"].items():
        mean, half = paired(found)
        shown = (f"{statistics.mean(x):.4f} ({min(x):.4f}-{max(x):.4f})" for x in found.values())
        lines.append(f"| {name} | {' | '.join(shown)} | {mean:+.4f} +- {half:.4f} |")
    m, sizes = results["machine"], results["sizes"]
    lines += [
        "",
        f"{sizes['seeds']} seeds, {sizes['steps']} steps of {sizes['batch']} digits, embeddings of {sizes['width']}, "
        f"Adam. {m['device']}, {m['threads']} threads, torch {m['torch']} (`{RESULTS}`).",
    ]
    return "\n".join(lines) + "\n"


def plot(out, results):
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for k, found in enumerate(results["accuracies"].values()):
        for theirs, ours in zip(found["lightly"], found["sslkern"], strict=True):
            axis.plot([k - 0.15, k + 0.15], [theirs, ours], ".-", color="0.6", ms=8, lw=1)
    axis.set(
        title="Each line is a seed: lightly's loss (left), patched (right)", ylabel="linear probe, held-out digits"
    )
    axis.set_xticks(range(len(LOSSES)), LOSSES)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write the results and the table of the document")
    add_flags(parser, SIZES, "out/parity.png")
    args = parse(parser, QUICK)
    check_flags(parser, args, {"hidden": 1, "width": 2, "batch": 2, "steps": 1, "seeds": 2})
    if args.seeds > max(QUANTILE):
        parser.error(f"--seeds must be at most {max(QUANTILE)}, got {args.seeds}.")
    sizes = {name: getattr(args, name) for name in SIZES}
    with tqdm(total=2 * args.seeds * len(LOSSES), ncols=90) as bar:
        found = {name: accuracies(args, name, bar) for name in LOSSES}
    results = {"machine": machine("cpu"), "lightly": lightly.__version__, "sizes": sizes, "accuracies": found}
    print("\n" + table(results))
    plot(args.out, results)
    if args.docs:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        into_document(DOCUMENT, "parity", table(results))
    claims = []
    for name, pair in found.items():
        mean, half = paired(pair)
        limit = ROUGH if args.quick else POINTS
        same = abs(mean) <= limit and (args.quick or abs(mean) <= max(half, 1e-9))
        claims.append((same, f"{name}: {mean:+.4f} +- {half:.4f} (limit {limit}, and 0 inside the interval)"))
    return 0 if judge(claims) else 1


if __name__ == "__main__":
    sys.exit(main())
