"""The figure of `conditioning.py`."""

import statistics

import matplotlib
from _conditioning_networks import ACTIVATIONS, KINDS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

COLORS = dict(zip(KINDS, ("C3", "C0", "C2"), strict=True))
STYLES = dict(zip(ACTIVATIONS, ("-", ":", "--"), strict=True))


def plot(args, depth, hessians, lanczos, limit):
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    plot_depth(left, args.depths, depth, limit)
    plot_hessians(middle, hessians)
    plot_lanczos(right, lanczos)
    right.set_title(f"Lanczos, n = {args.size}, even spectrum")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)
    print(args.out)


def plot_depth(ax, depths, found, limit):
    for (kind, activation), rows in found.items():
        columns = list(zip(*rows, strict=True))
        style = {"linestyle": STYLES[activation], "color": COLORS[kind], "marker": "."}
        ax.plot(depths, list(map(statistics.median, columns)), **style)
        ax.fill_between(depths, list(map(min, columns)), list(map(max, columns)), color=COLORS[kind], alpha=0.1)
    limit_line = ax.axhline(limit, color="black", lw=0.8, ls="-.", label="1/eps of float64")
    handles = [Line2D([], [], color=color, label=kind) for kind, color in COLORS.items()]
    handles += [Line2D([], [], color="0.3", ls=style, label=name) for name, style in STYLES.items()]
    ax.set(title="Local map of layers of 64 units", xlabel="number of layers", ylabel="log10 of the condition")
    ax.set(ylim=(-0.5, 22))
    ax.legend(handles=[*handles, limit_line], frameon=False, fontsize=8, ncols=3, loc="upper left")


def plot_hessians(ax, found):
    ticks = []
    for place, ((kind, activation, layer), seen) in enumerate(found.items()):
        ticks.append(activation)
        values, label = [kappa for kappa, _ in seen], kind if activation == "ReLU" and layer == 0 else None
        ax.plot([place] * len(values), values, "o", ms=4, alpha=0.5, color=COLORS[kind], label=label)
        ax.plot(place, statistics.median(values), "_", ms=16, mew=2, color=COLORS[kind])
    ax.axvline(len(ticks) / 2 - 0.5, color="0.6", lw=0.8)
    ax.set_xticks(range(len(ticks)), ticks, fontsize=7, rotation=90)
    ax.set(title="Hessian, 4 layers of 8 units: first layer | last layer", ylabel="log10 of the condition")
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def plot_lanczos(ax, found):
    for converged, marker, label in ((True, "o", "converged"), (False, "x", "not converged: a lower bound")):
        kept = [(kappa, result) for kappa, result in found.items() if result.converged == converged]
        ax.plot([kappa for kappa, _ in kept], [result.condition for _, result in kept], f"k{marker}", label=label)
        for kappa, result in kept:
            text = f"{result.n_products} products"
            ax.annotate(text, (kappa, result.condition), (7, -10), textcoords="offset points", fontsize=8)
    ax.plot(list(found), list(found), color="0.6", lw=0.8, label="exact")
    ax.set(xlabel="condition", ylabel="condition found", xscale="log", yscale="log", xlim=(2, 6000))
    ax.legend(frameon=False, fontsize=8)
