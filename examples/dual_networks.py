"""Contrastive learning on a hierarchical latent tree: does a network find the root, and why does BYOL?

The data are the 32 leaves of a binary tree of +-1 variables. Two views of a sample share the root of the tree, and
nothing else. The network is a ReLU network of the same shape, with 10, 5 or 2 units for each latent variable. It sees
no label: roots only serve to measure, on 2000 new samples, the largest correlation of an output unit with the root.

1. The update of the simple contrastive loss is the covariance operator of the layer times its weight, in every layer.
2. With this loss, the correlation rises during training, and more so with more units.
3. BYOL, with and without batch norm (centring) and a fixed scalar predictor p: the implicit contrastive term is there
   only with both, and so is learning. The share is the part of the leading direction of the term that differs between
   samples. From the operator before training follows how small p must be, as p (1 - p) is the factor of this term,
   and p^2 that of the other one; training with larger p tests that.
4. The same four settings as people train them, beyond the theory: batch norm also scales, outputs have unit length, and
   the predictor is learned.

    python examples/dual_networks.py            three minutes, 10 seeds
    python examples/dual_networks.py --quick    half a minute, 2 seeds; only p = 0.2, no part 4; the same bounds

Tian, Yu, Chen and Ganguli, Understanding self-supervised learning with dual deep networks (2010.00578).
"""

import argparse
import copy
import statistics
import sys

import matplotlib
import torch
from _dual_losses import Contrastive, FullBYOL, PlainBYOL
from _flags import add_run_flags, add_sizes, check_run_flags, judge, parse
from _latent_tree import DEPTH, LatentTree, TreeNetwork, correlation
from tqdm import tqdm

from sslkern.analysis import byol_covariance_operator, covariance_operator
from sslkern.losses import simple_contrastive_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POLARITY, TESTS = 0.85, 2000
PREDICTOR, LARGER = 0.2, (0.5, 0.8)
UNITS, LAYER = (10, 5, 2), f"layers.{DEPTH // 2}"
SETTINGS = {  # name: (batch norm, predictor)
    "neither": (False, False),
    "predictor only": (False, True),
    "batch norm only": (True, False),
    "batch norm and predictor": (True, True),
}
BOTH = "batch norm and predictor"
EXACT = 1e-12  # relative difference of operator times weight and autograd
LEARNED, CLOSED, AHEAD = 0.65, 0.25, 0.2  # correlation after training, share of its gap to the best, lead over 2 units
SHARE = 0.5  # of the leading direction of the term without batch norm that may differ between samples


def train(args, network, loss, seed):
    """Correlations with the root before, during and after training."""
    tree = LatentTree(POLARITY, seed)
    roots = tree.roots(TESTS)
    tests = tree.leaves(roots)
    optimizer = torch.optim.SGD([*network.parameters(), *loss.parameters()], loss.rate)
    curve = []
    for step in range(args.steps + 1):
        if step % args.every == 0 or step == args.steps:
            with torch.no_grad():
                curve.append((step, correlation(network(tests), roots)))
        views = tree.leaves(tree.roots(args.batch).repeat(2))
        value = loss(*network(views).chunk(2))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        for layer in network.layers:
            layer.rescale()
    return curve


def exactness(seed):
    """The largest relative difference of the operator times the weight and autograd's update, over all layers."""
    network, views = TreeNetwork(UNITS[1], seed).double(), views_of(seed, 64)
    loss = simple_contrastive_loss(*(network(x) for x in views))
    worst = 0.0
    for k in range(DEPTH):
        update = -torch.autograd.grad(loss, network.layers[k].weight, retain_graph=True)[0]
        product = covariance_operator(network, views, f"layers.{k}", pairs="distinct").apply()
        worst = max(worst, float((product - update).abs().max() / update.abs().max()))
    return worst


def views_of(seed, n=256):
    tree = LatentTree(POLARITY, seed)
    return tree.leaves(tree.roots(n).repeat(2)).unflatten(0, (2, n)).double()


def contrastive_terms(network, seed):
    """For each setting of BYOL: the norm of the term of the view means, in the middle layer, and the share of its
    leading direction that differs between samples."""
    network, views, found = copy.deepcopy(network).double(), views_of(seed), {}
    for name, (batch_norm, predictor) in SETTINGS.items():
        p = PREDICTOR if predictor else 1.0
        term = byol_covariance_operator(network, p, views, LAYER, batch_norm=batch_norm).between
        if not predictor:
            found[name] = term.norm(), None
            continue
        value, vector = term.eigenvectors(1)
        centred = byol_covariance_operator(network, p, views, LAYER).between.apply(vector[0])
        found[name] = float(value), float((vector[0] * centred).sum() / value)
    return found


def largest_predictor(network, seed):
    """The p below which BYOL with batch norm grows the direction that the contrastive loss grows most.

    Its growth is p c - p^2 (c + v), where c is its covariance between samples, and v that between views of a sample.
    """
    network, views = copy.deepcopy(network).double(), views_of(seed)
    n = views.shape[1]
    value, vector = covariance_operator(network, views, LAYER, pairs="distinct").eigenvectors(1)
    terms = byol_covariance_operator(network, 0.5, views, LAYER)
    total = 4 * (vector[0] * (terms.between.apply(vector[0]) - terms.within.apply(vector[0]))).sum()
    return float(value[0] * (n - 1) / (2 * n) / total)


def measure(args):
    """Curves by units, by setting and by predictor, per seed; terms by setting, per seed; exactness; the correlation of
    the best function of the leaves with the root, and of a network with other roots."""
    simple, plain, larger, full = ({key: [] for key in keys} for keys in (UNITS, SETTINGS, LARGER, SETTINGS))
    terms, limits, best, chance, exact = [], [], [], [], []
    for seed in tqdm(range(args.seed, args.seed + args.seeds), desc="seeds", ncols=100):
        for units in UNITS:
            simple[units].append(train(args, TreeNetwork(units, seed), Contrastive(), seed))
        network = TreeNetwork(UNITS[0], seed)
        terms.append(contrastive_terms(network, seed))
        limits.append(largest_predictor(network, seed))
        exact.append(exactness(seed))
        for name, (batch_norm, predictor) in SETTINGS.items():
            loss = PlainBYOL(batch_norm, PREDICTOR if predictor else 1.0)
            plain[name].append(train(args, TreeNetwork(UNITS[0], seed), loss, seed))
        for p in () if args.quick else LARGER:
            larger[p].append(train(args, TreeNetwork(UNITS[0], seed), PlainBYOL(True, p), seed))
        for name, setting in [] if args.quick else SETTINGS.items():
            torch.manual_seed(seed)  # of the learned predictor
            full[name].append(train(args, TreeNetwork(UNITS[0], seed), FullBYOL(*setting, UNITS[0]), seed))
        tree = LatentTree(POLARITY, seed)
        roots = tree.roots(TESTS)
        leaves = tree.leaves(roots)
        best.append(correlation(tree.posterior_mean(leaves)[:, None], roots))
        chance.append(correlation(network(leaves), tree.roots(TESTS)))
    return simple, plain, larger, full, terms, limits, max(exact), statistics.median(best), statistics.median(chance)


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def print_tables(args, simple, plain, larger, full, terms, limits, exact, best, chance):
    print(
        f"\nSeeds {args.seed} to {args.seed + args.seeds - 1}; medians and ranges; {args.steps} steps of {args.batch}"
    )
    print(f"\n1. Operator times weight against autograd, all layers, float64: {exact:.1e} relative")
    print(
        f"\n2. Simple contrastive loss: correlation with the root; at best {best:.2f}, with other roots {chance:.2f}\n"
    )
    print(f"{'units':<26}{'before':>22}{'after':>22}")
    for units, curves in simple.items():
        print_row(units, curves)
    print(f"\n3. BYOL, {UNITS[0]} units, p = {PREDICTOR} or none; the term in layer {DEPTH // 2 + 1} before training\n")
    print(f"{'':<26}{'before':>22}{'after':>22}{'norm of the term':>22}{'share':>22}")
    for name, curves in plain.items():
        norm = spread([t[name][0] for t in terms])
        share = "" if terms[0][name][1] is None else spread([t[name][1] for t in terms])
        print_row(name, curves, norm, share)
    print(f"\nBy the operator of that layer, the leading direction grows for p below {spread(limits)}\n")
    if args.quick:
        return
    for p, curves in larger.items():
        print_row(f"both, p = {p}", curves)
    print("\n4. BYOL with scaling, unit rows and a learned predictor\n")
    print(f"{'':<26}{'before':>22}{'after':>22}")
    for name, curves in full.items():
        print_row(name, curves)


def print_row(name, curves, *more):
    columns = (*(spread([curve[k][1] for curve in curves]) for k in (0, -1)), *more)
    print(f"{name:<26}" + "".join(f"{column:>22}" for column in columns))


def plot(args, simple, plain, terms, best):
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", facecolor="white")
    panels = ((axes[0], {f"{u} units": c for u, c in simple.items()}), (axes[1], plain))
    for axis, rows in panels:
        looks = list(zip(("C3", "C1", "C0", "C2"), ("-", "-", "--", "-"), strict=True))[-len(rows) :]
        for (color, style), (name, curves) in zip(looks, rows.items(), strict=True):
            steps = [step for step, _ in curves[0]]
            values = torch.tensor([[value for _, value in curve] for curve in curves])
            axis.plot(steps, values.quantile(0.5, 0), color=color, label=name, linestyle=style)
            axis.fill_between(steps, values.amin(0), values.amax(0), color=color, alpha=0.15, linewidth=0)
        axis.axhline(best, color="black", linestyle=":", linewidth=1, label="best possible")
        axis.set(xlabel="step", ylabel="correlation with the root", ylim=(0, 1))
        axis.legend(fontsize=8, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0].set_title("Simple contrastive loss, median and range")
    axes[1].set_title("BYOL, median and range")
    for row, (name, color) in enumerate(zip(SETTINGS, ("C3", "C1", "C0", "C2"), strict=True)):
        norm = statistics.median(t[name][0] for t in terms)
        share = statistics.median(t[name][1] or 0.0 for t in terms)
        axes[2].barh(-row, norm, color=color, alpha=0.3)
        axes[2].barh(-row, share * norm, color=color)
        axes[2].text(norm, -row, f"  {norm:.2g}", va="center", fontsize=8)
    axes[2].set(
        title="BYOL, term of the view means at the start",
        xlabel="norm; dark: differs between samples",
        yticks=[-k for k in range(len(SETTINGS))],
    )
    axes[2].set_yticklabels([name.replace(" and", "\nand") for name in SETTINGS])
    axes[2].margins(x=0.15)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=80)
    print(f"\n{args.out}")


def verdict(simple, plain, terms, exact, best):
    """One line for each claim; True if all hold."""

    def median(curves, k):
        return statistics.median(curve[k][1] for curve in curves)

    many, some, few = (simple[units] for units in UNITS)
    closed = min((median(c, -1) - median(c, 0)) / (best - median(c, 0)) for c in (many, some))
    lead = median(many, -1) - median(few, -1)
    others = max(median(c, -1) - median(c, 0) for name, c in plain.items() if name != BOTH)
    share = statistics.median(t["predictor only"][1] for t in terms)
    none = max(t[name][0] for t in terms for name in ("neither", "batch norm only"))
    claims = (
        (exact <= EXACT, f"operator times weight equals autograd to {exact:.1e} (at most {EXACT:g})"),
        (
            median(many, -1) >= LEARNED and closed >= CLOSED and lead >= AHEAD,
            f"{UNITS[0]} units end at {median(many, -1):.2f} (at least {LEARNED}); {UNITS[0]} and {UNITS[1]} units "
            f"close {closed:.2f} of the gap to the best (at least {CLOSED}); {UNITS[0]} lead {UNITS[2]} by {lead:.2f} "
            f"(at least {AHEAD})",
        ),
        (
            none == 0 and share <= SHARE,
            f"the term is {none:g} without a predictor (0); the share of its leading direction that differs between "
            f"samples is {share:.2f} without batch norm (at most {SHARE})",
        ),
        (
            median(plain[BOTH], -1) >= LEARNED and others <= 0,
            f"BYOL with both ends at {median(plain[BOTH], -1):.2f} (at least {LEARNED}); the others change by "
            f"{others:.2f} or less (at most 0)",
        ),
    )
    return judge(claims)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, {"seeds": 10, "steps": 300, "batch": 128, "every": 10})
    add_run_flags(parser, "out/dual_networks.png")
    parser.set_defaults(seed=100)
    args = parse(parser, {"seeds": 2, "every": 50}, "only one predictor, without part 4")
    check_run_flags(parser, args, {"seeds": 1, "steps": 1, "batch": 2, "every": 1})
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    simple, plain, larger, full, terms, limits, exact, best, chance = measure(args)
    print_tables(args, simple, plain, larger, full, terms, limits, exact, best, chance)
    plot(args, simple, plain, terms, best)
    return 0 if verdict(simple, plain, terms, exact, best) else 1


if __name__ == "__main__":
    sys.exit(main())
