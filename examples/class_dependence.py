"""Regularization that helps the mean and harms some classes: rotations of images, and weight decay.

1. Generated images: eight shapes at any angle, and two classes of bars that differ in their angle, and a little in
   their length. Few training images are augmented by rotations up to a maximal angle, the strength. An MLP is trained
   for every strength and seed. The mean accuracy must rise, and the two classes of bars must fall, significantly and by
   at least 15 points.
2. The same images: the path of weight decay of a linear ridge classifier on the pixels. For at least two classes, the
   decay that is best on the mean must lose accuracy against the decay that is best for the class.
3. Digits: the same two experiments. What is found is reported, and nothing is claimed.
4. The ridge path from one eigendecomposition against scikit-learn's Ridge, solved for every decay.

Every seed of 1 and 2 draws new training and test images. The seeds of 3 are splits of one data set, whose overlap the
tests take into account.

    python examples/class_dependence.py            10 seeds, some minutes on two cores
    python examples/class_dependence.py --quick    8 seeds, two strengths, no networks for digits; the same bounds,
                                                   under a minute

Paper: Balestriero, Bottou and LeCun, The effects of regularization and data augmentation are class dependent
(2204.03632).
"""

import argparse
import statistics
import sys
import time

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from _digits import split_digits
from _flags import add_run_flags, add_sizes, check_run_flags, judge, parse
from _oriented_shapes import NAMES, ORIENTED, draw, rotate
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits
from torch import nn
from tqdm import tqdm

from sslkern.analysis import per_class_accuracy, per_class_effect, ridge_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = {"seeds": 10, "steps": 400, "splits": 20}
QUICK = {"seeds": 8}
ANGLES, QUICK_ANGLES = (0, 10, 20, 30, 60, 90, 180), (0, 180)  # degrees
DIGITS_ANGLE = 30  # compared with no rotation, chosen in advance
TRAINING, TESTING = 20, 100  # images of each class
DECAYS = np.logspace(-3, 5, 17)
LEVEL = 0.05
PATH_LEVEL = LEVEL / len(NAMES)  # so that the intervals of all classes hold together
RISE, FALL, ELSEWHERE, AGREEMENT = 0.08, 0.15, 2, 1e-10  # bounds, fixed with seeds from 1000 on
OVERLAP = 1 / 2  # test images of digits per training image


def shapes(seed):
    """Training and test images, and the labels of both."""
    generator = torch.Generator().manual_seed(seed)
    (train_x, train_y), (test_x, test_y) = (draw(n, generator) for n in (TRAINING, TESTING))
    return train_x, test_x, train_y, test_y


def digits(seed):
    train_x, test_x, train_y, test_y = split_digits(seed)
    return train_x, test_x, torch.from_numpy(train_y), torch.from_numpy(test_y)


def trained(data, angle, seed, steps):
    """The accuracy of each class, of an MLP that is trained on rotated images."""
    train_x, test_x, train_y, test_y = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(train_x[0].numel(), 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
        network = nn.Sequential(*layers, nn.Linear(128, 10))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(train_y), (64,), generator=generator)
        loss = F.cross_entropy(network(rotate(train_x[rows], angle, generator)), train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return per_class_accuracy(network(test_x).argmax(1), test_y, 10)


def augmentation(load, args, **options):
    """The effect of rotations."""
    runs = []
    for seed in tqdm(range(args.seed, args.seed + args.seeds), desc=load.__name__, ncols=110):
        data = load(seed)
        runs.append(torch.stack([trained(data, angle, seed, args.steps) for angle in args.angles]))
    return per_class_effect(torch.stack(runs), args.angles, alpha=LEVEL, **options)


def decay(load, args, **options):
    """The effect of weight decay on the ridge classifier of the pixels."""
    runs = []
    for seed in range(args.seed, args.seed + args.splits):
        train_x, test_x, train_y, test_y = load(seed)
        path = ridge_path(train_x.flatten(1).double(), train_y, DECAYS, test_x.flatten(1).double(), test_y)
        runs.append(path.class_accuracies)
    return per_class_effect(torch.stack(runs), DECAYS, alpha=PATH_LEVEL, **options)


def race(seed, n, features, repeats=3):
    """Seconds of the path and of scikit-learn's Ridge for all decays, median of some repeats, and the largest
    difference of their predictions, relative to the largest prediction."""
    random = np.random.default_rng(seed)
    x, new = random.normal(size=(n, features)), random.normal(size=(1000, features))
    y = x @ random.normal(size=(features, 10)) / features**0.5 + random.normal(size=(n, 10))
    times = {"path": [], "ridge": []}
    for _ in range(repeats):
        start = time.perf_counter()
        ours = ridge_path(x, y, DECAYS, new).predictions
        middle = time.perf_counter()
        theirs = np.stack([Ridge(alpha=value).fit(x, y).predict(new) for value in DECAYS])
        times["ridge"].append(time.perf_counter() - middle)
        times["path"].append(middle - start)
    gap = float(abs(ours - theirs).max() / abs(theirs).max())
    return statistics.median(times["path"]), statistics.median(times["ridge"]), gap


def measure(args):
    """The effects on shapes and digits, and times by size."""
    names = [str(digit) for digit in range(10)]
    effects = {
        "shapes, rotation up to, degrees": augmentation(shapes, args, class_names=NAMES),
        "shapes, weight decay": decay(shapes, args, class_names=NAMES),
        "digits, weight decay": decay(digits, args, class_names=names, test_to_train=OVERLAP),
    }
    if not args.quick:
        title = "digits, rotation up to, degrees"
        effects[title] = augmentation(digits, args, class_names=names, test_to_train=OVERLAP, strength=DIGITS_ANGLE)
    n, features = (2000, 300) if args.quick else (4000, 500)
    return effects, {size: race(args.seed, *size) for size in ((n, features), (features, n))}


def print_tables(effects, times):
    for title, effect in effects.items():
        print(f"\n{title}\n{effect.table()}")
        print(f"fall: {', '.join(effect.losers) or 'none'}")
        print(f"better at another strength: {', '.join(effect.better_elsewhere) or 'none'}")
    print(f"\n{len(DECAYS)} decays, 10 targets, seconds of one thread; largest relative difference of predictions")
    for (n, features), (ours, theirs, gap) in times.items():
        size = f"{n} x {features}"
        print(f"{size:<12} ridge_path {ours:.2f}, sum of Ridge {theirs:.2f}, ratio {theirs / ours:.1f}, {gap:.1e}")


def plot(args, effects):
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    rotation, path = list(effects.values())[:2]
    rotation.plot(axes[0], xlabel="largest rotation of training images, degrees")
    axes[0].set(title=f"Rotations, {rotation.n_runs} seeds; in colour: classes that fall")
    path.plot(axes[1], xlabel="weight decay", highlight=path.better_elsewhere)
    axes[1].set(title=f"Weight decay, {path.n_runs} seeds; in colour: classes better elsewhere")
    for axis in axes:
        axis.set(ylim=(0, 1.02))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)
    print(args.out)


def verdict(effects, times):
    """One line for each claim; True if all hold."""
    rotation, path = list(effects.values())[:2]
    changes = dict(zip(rotation.class_names, rotation.changes, strict=True))
    least, gap = -max(changes[name] for name in ORIENTED), max(gap for *_, gap in times.values())
    paid = set(rotation.classes_that_pay)
    claims = (
        (
            rotation.mean_change_interval[0] > 0 and rotation.mean_change >= RISE,
            f"the mean rises by {rotation.mean_change:.3f} (at least {RISE}), best up to {rotation.strength:g} degrees",
        ),
        (
            paid == set(ORIENTED) and least >= FALL,
            f"{' and '.join(ORIENTED)} fall, and no other class: by at least {least:.3f} (at least {FALL})",
        ),
        (
            len(path.better_elsewhere) >= ELSEWHERE,
            f"{len(path.better_elsewhere)} classes lose by the decay that is best on the mean (at least {ELSEWHERE})",
        ),
        (gap <= AGREEMENT, f"ridge path equals scikit-learn's Ridge to {gap:.1e} (at most {AGREEMENT})"),
    )
    return judge(claims)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, SIZES)
    add_run_flags(parser, "out/class_dependence.png")
    args = parse(parser, QUICK, f"angles {QUICK_ANGLES}, no networks for digits")
    args.angles = QUICK_ANGLES if args.quick else ANGLES
    check_run_flags(parser, args, {"seeds": 2, "steps": 1, "splits": 2})
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        effects, times = measure(args)
    print_tables(effects, times)
    plot(args, effects)
    return 0 if verdict(effects, times) else 1


if __name__ == "__main__":
    sys.exit(main())
