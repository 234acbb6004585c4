"""Self-supervised objectives recover spectral embeddings: closed forms against descent, and beside scikit-learn.

Three questions, on scikit-learn's digits and on generated data:

1. Does descent end where the closed form says? L-BFGS in float64, from random embeddings of a graph of neighbours, on
   the relaxed VICReg objective and on the surrogates of SimCLR and Barlow Twins.
2. How do the embeddings and their times compare with scikit-learn's SpectralEmbedding on the same graph?
3. With labels as the relation, how does the linear form compare with scikit-learn's LinearDiscriminantAnalysis?

    python examples/spectral_embedding.py             two minutes on two cores
    python examples/spectral_embedding.py --quick     under a minute

Balestriero and LeCun, Contrastive and non-contrastive self-supervised learning recover global and local spectral
embedding methods (2205.11508).
"""

import argparse
import sys
import warnings

import matplotlib
import numpy as np
import torch
from _flags import add_run_flags, add_sizes, check_run_flags, parse
from _spectral_data import (
    INVARIANCE,
    METHODS,
    NEIGHBORS,
    accuracy,
    cosine,
    descend,
    objective,
    rotated,
    spread,
    timed,
)
from sklearn.datasets import load_digits, load_wine, make_swiss_roll
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.manifold import SpectralEmbedding
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from sslkern.decomposition import LinearVICReg, RelationGraph, optimal_embedding

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GAP = 1e-6  # descent and closed form: relative to the value, or absolute where the minimum is 0
AGREEMENT = 0.99  # smallest cosine with scikit-learn's embedding of the digits
MARGIN = 0.02  # of accuracy, that the linear form may lose against the discriminant analysis
COMPONENTS = 3


def compare_with_descent(args):
    """For each method: the closed form, the last descent, and per seed the gaps along the way."""
    x, y = load_digits(n_class=5, return_X_y=True)
    x, y = x[: args.samples], y[: args.samples]
    graph = RelationGraph.from_neighbors(x, NEIGHBORS)
    print(
        f"1. {len(x)} digits of 5 classes, {graph}, {COMPONENTS} components, {args.seeds} starts; g = {INVARIANCE:g}\n"
    )
    print(f"{'objective':<24}{'closed form':>16}{'descent, worst':>18}{'largest gap':>14}", end="")
    print(f"{'closed, s':>11}{'descent, s':>12}")
    found, z_shape = {}, (graph.n, COMPONENTS)
    for method, name in METHODS.items():
        function = objective(method, graph)
        g = INVARIANCE if method == "vicreg" else None
        z, closed_time = timed(lambda m=method, g=g: optimal_embedding(graph, COMPONENTS, m, invariance=g))
        best = float(function(z))
        unit = best if method != "barlow_twins" else 1.0
        seeds = range(args.seed, args.seed + args.seeds)
        runs, descent_time = timed(lambda f=function, s=seeds: [descend(f, z_shape, seed, args.steps) for seed in s])
        gaps = [[(value - best) / unit for value in values] for _, values in runs]
        worst = max(values[-1] for _, values in runs)
        gap = max(abs(trace[-1]) for trace in gaps)
        print(
            f"{name:<24}{best:>16.9f}{worst:>18.9f}{gap:>14.1e}{closed_time:>11.2f}{descent_time / args.seeds:>12.2f}"
        )
        found[method] = (z, runs[-1][0], gaps, gap)
    return found, y


def compare_with_sklearn(args):
    """Times on three kinds of graphs, and on digits the agreement and the accuracy of nearest neighbours."""
    digits, y = load_digits(return_X_y=True)
    gaussian = np.random.default_rng(args.seed).normal(size=(args.gaussian, 10))
    roll, _ = make_swiss_roll(args.roll, random_state=args.seed)
    print(
        "\n2. SpectralEmbedding (normalised Laplacian) and the closed form of VICReg on the same graph, 8 components\n"
    )
    print(f"{'data':<24}{'samples':>9}{'ours, s':>10}{'sklearn, s':>12}{'cosine':>9}")
    for name, x in (("digits", digits), ("swiss roll", roll), ("10-D Gaussian", gaussian)):
        graph = RelationGraph.from_neighbors(x, NEIGHBORS)
        z, ours = timed(lambda graph=graph: optimal_embedding(graph, 8))
        theirs = SpectralEmbedding(8, affinity="precomputed", random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # graphs that are not connected
            other, seconds = timed(lambda graph=graph, t=theirs: t.fit_transform(graph.to_scipy()))
        print(f"{name:<24}{len(x):>9}{ours:>10.2f}{seconds:>12.2f}{cosine(z, other):>9.4f}")
        if name == "digits":
            kept = {METHODS["vicreg"]: z, "sklearn's embedding": other}
            agreement, graph_of_digits = cosine(z, other), graph
    for method in ("simclr", "barlow_twins"):
        kept[METHODS[method]] = optimal_embedding(graph_of_digits, 8, method)
    print("\n   accuracy of 5 nearest neighbours in 8 dimensions; the graph has all digits, half are tested\n")
    for name, z in {"64 pixels": digits, **kept}.items():
        scores = []
        for seed in range(args.seeds):
            parts = train_test_split(np.asarray(z), y, test_size=0.5, random_state=args.seed + seed, stratify=y)
            scores.append(accuracy(*parts))
        print(f"   {name:<24}{spread(scores):>26}")
    return agreement


def compare_with_discriminant_analysis(args):
    """Held-out accuracies after a linear map, and the median that is lost against the discriminant analysis."""
    print("\n3. labels as the relation: accuracy of 5 nearest neighbours after a linear map, half held out\n")
    print(f"{'data':<12}{'components':>12}{'LinearVICReg':>26}{'sklearn LDA':>26}{'PCA':>26}")
    lost = []
    for name, load, k in (("wine", load_wine, 2), ("digits", load_digits, 9)):
        x, y = load(return_X_y=True)
        scores = {"ours": [], "lda": [], "pca": []}
        for seed in range(args.seeds):
            train, test, train_y, test_y = train_test_split(
                x, y, test_size=0.5, random_state=args.seed + seed, stratify=y
            )
            scaler = StandardScaler().fit(train)
            train, test = scaler.transform(train), scaler.transform(test)
            maps = {"ours": LinearVICReg(k), "lda": LinearDiscriminantAnalysis(n_components=k), "pca": PCA(k)}
            for key, model in maps.items():
                model.fit(train, train_y)
                scores[key].append(accuracy(model.transform(train), model.transform(test), train_y, test_y))
        print(f"{name:<12}{k:>12}" + "".join(f"{spread(values):>26}" for values in scores.values()))
        lost.append(np.median(scores["lda"]) - np.median(scores["ours"]))
    return max(lost)


def plot(args, found, y):
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    for axis, (method, (z, descended, _, _)) in zip(axes, found.items(), strict=False):
        if method == "vicreg":  # its minimum is free in the mean
            descended = descended - descended.mean(0)
        points = axis.scatter(z[:, 0], z[:, 1], c=y, cmap="viridis", s=26, alpha=0.8, lw=0)
        if method != "barlow_twins":  # whose minimisers are many
            other = rotated(descended, z)
            axis.scatter(other[:, 0], other[:, 1], c="red", s=1.5, label="descent, rotated")
            axis.legend(frameon=False, fontsize=8, loc="upper right")
        axis.set(title=METHODS[method], xlabel="component 1", ylabel="component 2")
    figure.colorbar(points, ax=axes[2], label="digit", ticks=range(5))
    for color, (method, (_, _, gaps, _)) in zip(("C0", "C1", "C2"), found.items(), strict=True):
        for k, trace in enumerate(gaps):
            steps = 10 * np.arange(1, len(trace) + 1)
            label = METHODS[method] if k == 0 else None
            axes[3].semilogy(steps, np.abs(trace).clip(1e-16), color=color, lw=1, label=label)
    axes[3].axhline(GAP, color="black", ls=":", lw=1, label=f"bound {GAP:g}")
    axes[3].set(
        title="Descent minus closed form", xlabel="iteration of L-BFGS", ylabel="relative gap (Barlow: absolute)"
    )
    axes[3].legend(frameon=False, fontsize=8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=80)
    print(f"\n{args.out}")


def verdict(found, agreement, lost):
    """Print the line; True if all three comparisons are within their bounds."""
    gap = max(row[-1] for row in found.values())
    passed = gap <= GAP and agreement >= AGREEMENT and lost <= MARGIN
    print(
        f"{'PASS' if passed else 'FAIL'}: descent within {gap:.1e} of the closed form (bound {GAP:g}); cosine with "
        f"scikit-learn on digits {agreement:.4f} (at least {AGREEMENT:g}); accuracy below LDA's by {lost:.3f} "
        f"(at most {MARGIN:g})"
    )
    return passed


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser, "out/spectral_embedding.png")
    add_sizes(parser, {"samples": 400, "seeds": 5, "steps": 60, "roll": 20_000, "gaussian": 5_000})
    args = parse(parser, {"samples": 200, "seeds": 3, "roll": 3000, "gaussian": 2000})
    check_run_flags(parser, args, {"samples": 60, "seeds": 1, "steps": 1, "roll": 100, "gaussian": 100})
    return args


def main():
    args = parse_arguments()
    found, y = compare_with_descent(args)
    agreement = compare_with_sklearn(args)
    lost = compare_with_discriminant_analysis(args)
    plot(args, found, y)
    return 0 if verdict(found, agreement, lost) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # the products are small
    sys.exit(main())
