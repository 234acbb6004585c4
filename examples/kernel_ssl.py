"""Self-supervised learning in the kernel regime: the kernel that a relation induces, with one label per class.

Two spirals: 300 points. The relation is the spiral of each point, or its 8 nearest neighbours, which needs no label.
Digits: 200 of scikit-learn's images in 5 augmented views each. The relation is the class, the image (views of the same
image are related), or the class shuffled. A nearest-neighbour classifier gets the embedding of one labelled sample per
class, and is tested on new samples. The embedding is compared with the RBF kernel itself, with kernel PCA with the same
kernel and number of components, with label spreading over the unlabelled samples, and with a support vector machine on
all labels, since a relation that is the class knows them all but for their names.

    python examples/kernel_ssl.py            5 seeds, some minutes on two cores
    python examples/kernel_ssl.py --quick    2 seeds, 100 images, under a minute
    python examples/kernel_ssl.py --scale    time and memory, up to 100,000 samples and a million edges; no figure

Paper: Kiani et al., Joint-embedding self-supervised learning in the kernel regime (2209.14884).
"""

import argparse
import resource
import sys
import time
import warnings

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from _digits import augment
from _flags import add_run_flags, check_run_flags, parse
from sklearn.datasets import load_digits
from sklearn.decomposition import KernelPCA
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.semi_supervised import LabelSpreading
from sklearn.svm import SVC
from tqdm import tqdm

from sslkern.decomposition import KernelSSL, RelationGraph
from sslkern.metrics.bandwidth import median_bandwidth

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VIEWS, COMPONENTS, DRAWS = 5, (9, 32), 20
INVARIANCES = (0.0, 0.001, 0.01, 1.0)
BOUNDS = {  # what is measured, comparison, bound, bound with fewer images; fixed before the first run
    "spirals": ("spirals, relation = class: accuracy", ">=", 0.98, 0.98),
    "plain": ("spirals, plain RBF: accuracy", "<=", 0.70, 0.70),
    "digits": ("digits, relation = class: accuracy", ">=", 0.90, 0.80),
    "gain": ("digits, relation = class: gain over plain RBF", ">=", 0.20, 0.15),
    "shuffled": ("digits, class shuffled: loss from the smallest to the largest invariance", ">=", 0.05, 0.05),
}


def spirals(n, seed):
    """Two intertwined spirals in the unit disc, and the spiral of each point."""
    random = np.random.default_rng(seed)
    radius, y = np.sqrt(random.uniform(0.02, 1, n)), np.arange(n) % 2
    angle = 3 * np.pi * radius + np.pi * y
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.02 * random.normal(size=(n, 2)), y


def weak(images, generator):
    """Small rotations and shifts, and faint noise."""

    def uniform(bound):
        return (2 * torch.rand(len(images), generator=generator) - 1) * bound

    angle = uniform(0.1)
    theta = torch.stack([angle.cos(), -angle.sin(), uniform(0.06), angle.sin(), angle.cos(), uniform(0.06)], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) + 0.05 * torch.randn(images.shape, generator=generator)


def draws(y, seed):
    """The rows of one labelled sample per class, `DRAWS` times."""
    random = np.random.default_rng(seed)
    return [[random.choice(np.flatnonzero(y == label)) for label in np.unique(y)] for _ in range(DRAWS)]


def one_label(embed, x, y, new, truth, seed):
    """Median accuracy of the nearest labelled sample in the embedding, with one label per class."""
    known, unknown = embed(x), embed(new)
    scores = [KNeighborsClassifier(1).fit(known[r], y[r]).score(unknown, truth) for r in draws(y, seed)]
    return float(np.median(scores))


def spread(x, y, unlabelled, new, truth, seed, **settings):
    """Median accuracy of label spreading from one label per class, over the labelled and the unlabelled samples."""
    scores = []
    for rows in draws(y, seed):
        labels = np.full(len(x) + len(unlabelled), -1)
        labels[rows] = y[rows]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a sample that no label reaches
            model = LabelSpreading(max_iter=3000, **settings).fit(np.concatenate([x, unlabelled]), labels)
            scores.append(model.score(new, truth))
    return float(np.median(scores))


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def on_spirals(seed):
    """Accuracy by method, and the models that the figure shows."""
    (x, y), (new, truth) = spirals(300, seed), spirals(1000, 1000 + seed)
    test = (x, y, new, truth, seed)
    by_class = KernelSSL(2).fit(x, y)
    by_neighbours = KernelSSL(1, ridge=1e-6).fit(x, RelationGraph.from_neighbors(x, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the embedding is zero
        wide = KernelSSL(2, gamma=float(0.5 / median_bandwidth(torch.from_numpy(x)) ** 2)).fit(x, y)
    pca = KernelPCA(2, kernel="rbf", gamma=by_class.gamma_).fit(x)
    return {
        "relation = class": one_label(by_class.transform, *test),
        "  bandwidth by the median": one_label(wide.transform, *test),
        "relation = 8 neighbours": one_label(by_neighbours.transform, *test),
        "plain RBF": one_label(lambda z: z, *test),
        "kernel PCA": one_label(pca.transform, *test),
        "label spreading": spread(x, y, x[:0], new, truth, seed, gamma=300, alpha=0.99),
        "SVC, all labels": SVC(C=100).fit(x, y).score(new, truth),
    }, (x, y, by_class)


def on_digits(seed, images):
    """Accuracy by (method, components, invariance), and seconds of a fit by method."""
    data, labels = load_digits(return_X_y=True)
    x, new, y, truth = train_test_split(data / 16, labels, train_size=images, stratify=labels, random_state=seed)
    test = (x, y, new, truth, seed)
    found, seconds = {}, {}
    generator = torch.Generator().manual_seed(seed)
    one_channel = torch.from_numpy(x).float().view(-1, 1, 8, 8)
    sets = {
        name: torch.cat([change(one_channel, generator) for _ in range(VIEWS)]).flatten(1).double().numpy()
        for name, change in (("strong", augment), ("weak", weak))
    }
    classes = np.tile(y, VIEWS)
    relations = {
        ("class", "strong"): classes,
        ("class, shuffled", "strong"): np.random.default_rng(seed).permutation(classes),
        ("views, strong augmentation", "strong"): RelationGraph.from_views(images, VIEWS),
        ("views, weak augmentation", "weak"): RelationGraph.from_views(images, VIEWS),
    }
    unrelated = {}  # without invariance, the relation does not matter
    for (name, kind), relation in relations.items():
        for invariance in INVARIANCES:
            model = KernelSSL(max(COMPONENTS), invariance=invariance)
            if invariance == 0:
                model = unrelated.setdefault(kind, model)
            if not hasattr(model, "dual_coef_"):
                seconds["KernelSSL"] = seconds_of(lambda m=model, kind=kind, r=relation: m.fit(sets[kind], r))
            for k in COMPONENTS:  # columns are sorted, so the best k components are the first k of more
                found[f"relation = {name}", k, invariance] = one_label(
                    lambda z, model=model, k=k: model.transform(z)[:, :k], *test
                )
    found["plain RBF", None, None] = one_label(lambda z: z, *test)
    for k in COMPONENTS:
        pca = KernelPCA(k, kernel="rbf", gamma=1 / (64 * sets["strong"].var()), random_state=0)
        seconds["kernel PCA"] = seconds_of(lambda pca=pca: pca.fit(sets["strong"]))
        found["kernel PCA", k, None] = one_label(pca.transform, *test)
    found["label spreading", None, None] = spread(x, y, sets["strong"], new, truth, seed, kernel="knn")
    found["SVC, all labels of the images", None, None] = SVC().fit(x, y).score(new, truth)
    found["SVC, all labels of the views", None, None] = SVC().fit(sets["strong"], classes).score(new, truth)
    return found, seconds


def middle(values):
    return f"{np.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def print_spirals(runs):
    print(f"\nTwo spirals, accuracy with one label per class, median [range] of {len(runs)} seeds")
    for name in runs[0]:
        print(f"    {name:<32}{middle([run[name] for run in runs])}")


def print_digits(runs, seconds, images):
    def row(name, k, weights):
        cells = "".join(f"{middle([run[name, k, w] for run in runs]):>23}" for w in weights)
        print(f"    {name:<38}{k or '':>4}{cells}")

    print(f"\nDigits, {images} images x {VIEWS} views, one label per class, median [range] of {len(runs)} seeds")
    print(f"    {'components':>42}" + "".join(f"{f'invariance {w:g}':>23}" for w in INVARIANCES))
    for name, k in dict.fromkeys(key[:2] for key in runs[0]):
        row(name, k, [w for w in (*INVARIANCES, None) if (name, k, w) in runs[0]])
    seen = ", ".join(f"{name} {np.median([s[name] for s in seconds]):.2f}" for name in seconds[0])
    print(f"    Seconds of a fit of the {images * VIEWS} views with {max(COMPONENTS)} components: {seen}")


def print_scale():
    """Time and peak memory in the order of the peaks, since the peak of a process only rises."""
    print("4 features, 10 random edges for each sample, 4 components")
    print(f"    {'samples':>10}{'edges':>12}{'landmarks':>12}{'fit, s':>10}{'transform, s':>14}{'peak, MB':>10}")
    random = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n, landmarks in ((1000, None), (20_000, 300), (2000, None), (100_000, 300)):
        x = random.normal(size=(n, 4))
        graph = RelationGraph.from_edges(*random.integers(n, size=(2, 10 * n)), n)
        model = KernelSSL(4, invariance=0.01, n_landmarks=landmarks, random_state=0)
        fit = seconds_of(lambda model=model, x=x, graph=graph: model.fit(x, graph))
        transform = seconds_of(lambda model=model, x=x: model.transform(x))
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"    {n:>10,}{10 * n:>12,}{landmarks or 'all':>12}{fit:>10.1f}{transform:>14.2f}{peak:>10,.0f}")
    print("Peak: of the process, above its memory before the first row.")


def draw_regions(axis, x, y, values, title):
    """The classes that two labelled points give to the plane; `values(points)` embeds."""
    side = np.linspace(-1.15, 1.15, 150)
    plane = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    rows = draws(y, 0)[0]
    regions = KNeighborsClassifier(1).fit(values(x[rows]), y[rows]).predict(values(plane)).reshape(150, 150)
    axis.contourf(side, side, regions, levels=[-0.5, 0.5, 1.5], colors=["#cfe2f3", "#fce0c8"])
    axis.scatter(*x.T, s=6, c=[f"C{label}" for label in y])
    axis.scatter(*x[rows].T, s=90, marker="*", color="black", label="labelled", zorder=3)
    axis.set(title=title, xlabel="first feature", ylabel="second feature", aspect="equal")
    axis.legend(loc="lower right", fontsize=8)


def plot(out, model, runs):
    x, y, by_class = model
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    draw_regions(axes[0], x, y, lambda z: z, "RBF kernel, one label per spiral")
    draw_regions(axes[1], x, y, by_class.transform, "Induced kernel, same labels")
    for name in dict.fromkeys(name for name, _, invariance in runs[0] if invariance is not None):
        scores = np.array([[run[name, 32, s] for s in INVARIANCES] for run in runs])
        (line,) = axes[2].plot(range(len(INVARIANCES)), np.median(scores, 0), ".-", label=name)
        axes[2].fill_between(range(len(INVARIANCES)), scores.min(0), scores.max(0), alpha=0.15, color=line.get_color())
    plain = np.median([run["plain RBF", None, None] for run in runs])
    axes[2].axhline(plain, color="black", ls=":", lw=1, label="plain RBF")
    axes[2].set_xticks(range(len(INVARIANCES)), [f"{s:g}" for s in INVARIANCES])
    axes[2].set(xlabel="invariance (its weight)", ylabel="accuracy on new images, median and range", ylim=(0, 1))
    axes[2].set_title("Digits, 32 components, one label per class")
    axes[2].legend(fontsize=8, loc="lower left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)
    print(f"\n{out}\n")


def verdict(spiral_runs, digit_runs, quick):
    """Print each measured figure beside its bound; True if all hold."""

    def median(key, runs=digit_runs):
        return float(np.median([run[key] for run in runs]))

    by_class, plain = median(("relation = class", 9, 1.0)), median(("plain RBF", None, None))
    seen = {
        "spirals": median("relation = class", spiral_runs),
        "plain": median("plain RBF", spiral_runs),
        "digits": by_class,
        "gain": by_class - plain,
        "shuffled": median(("relation = class, shuffled", 32, 0.0)) - median(("relation = class, shuffled", 32, 1.0)),
    }
    passed = True
    for name, (what, comparison, *bounds) in BOUNDS.items():
        bound = bounds[quick]
        good = seen[name] >= bound if comparison == ">=" else seen[name] <= bound
        passed &= good
        print(f"    {what}: {seen[name]:.3f}, bound {comparison} {bound:.2f}{'' if good else '   <- missed'}")
    print(f"{'PASS' if passed else 'FAIL'}: {'all' if passed else 'not all'} bounds hold")
    return passed


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", action="store_true", help="time and memory only")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of seeds; default 5")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="number of images; default 200")
    add_run_flags(parser, "out/kernel_ssl.png")
    args = parse(parser, {"seeds": 2, "images": 100})
    for name, low, high in (("seeds", 1, 100), ("images", 20, 1000)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} must be between {low} and {high}, got {getattr(args, name)}.")
    check_run_flags(parser, args, {})
    return args


def main():
    args = parse_arguments()
    if args.scale:
        return print_scale()
    seeds = range(args.seed, args.seed + args.seeds)
    spiral_runs, models = zip(*(on_spirals(seed) for seed in tqdm(seeds, "spirals")), strict=True)
    print_spirals(spiral_runs)
    digit_runs, seconds = zip(*(on_digits(seed, args.images) for seed in tqdm(seeds, "digits")), strict=True)
    print_digits(digit_runs, seconds, args.images)
    plot(args.out, models[0], digit_runs)
    return 0 if verdict(spiral_runs, digit_runs, args.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
