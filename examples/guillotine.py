"""Where to cut a self-supervised network: ridge probes of all its layers, and a nearest-neighbour classifier after it.

An MLP encoder (256-128) with a projector of three layers is trained by VICReg on pairs of images that are

    labels     two images of the same class: aligned with the classification that follows
    standard   one image in two views, with random rotations up to 17 degrees, scales, shifts, brightness and noise
    rotation   one image, rotated by 180 degrees or not: misaligned for digits, where a 6 becomes a 9

on scikit-learn's digits (1,198 training images, 10 classes), and on faces and other patches of 25 x 25 pixels
(scikit-image, 120 training images, 2 classes). The layer and the strength of the probe are chosen by cross-validation
on the training images, and their accuracy is measured on the held-out images. The gap is the accuracy of the chosen
layer, minus that of the last one; an untrained network has one too. The bounds are for digits: faces are reported as
they are.

    python examples/guillotine.py            5 seeds, two to five minutes
    python examples/guillotine.py --quick    2 seeds and fewer steps, under a minute; the same bounds

Bordes et al., Guillotine regularization (2206.13378); Bardes et al., VICReg (2105.04906).
"""

import argparse
import statistics
import sys

import matplotlib
import numpy as np
import torch
from _digits import augment, split_digits
from _flags import add_run_flags, add_sizes, check_run_flags, judge, parse
from scipy import stats
from skimage.data import lfw_subset
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from tqdm import tqdm

from sslkern.analysis import layerwise_probe
from sslkern.losses import vicreg_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = {"hidden": 256, "width": 64, "steps": 300, "seeds": 5}
QUICK = {"steps": 80, "seeds": 2}
BATCH = 256  # fewer faces
RELATIONS = {"labels": "label pairs", "standard": "standard augmentation", "rotation": "rotation by 180 degrees"}
LAYERS = {
    "0.0": "pixels",
    "0.2": "encoder 1",
    "0.4": "encoder 2",
    "1.2": "projector 1",
    "1.5": "projector 2",
    "1.6": "projector 3",
}
LEAST, MOST = 4.0, 1.0  # points: the gap for rotation, and for label pairs; fixed before the first run


def split_faces(seed):
    """Training and test patches (N, 1, 25, 25) with the mean and deviation of the digits, and the labels of both."""
    images = torch.from_numpy(lfw_subset()).float()[:, None]
    images = (images - images.mean()) / images.std() * 0.37 + 0.3
    labels = (np.arange(len(images)) < 100).astype(np.int64)
    return train_test_split(images, labels, train_size=120, stratify=labels, random_state=seed)


DATA = {"digits": split_digits, "faces": split_faces}


def pairs(images, labels, relation, generator):
    """A batch of two related images each."""
    rows = torch.randperm(len(labels), generator=generator)[:BATCH]
    a, b = images[rows], images[rows]
    if relation == "labels":
        order, sizes = labels.argsort(stable=True), labels.bincount()
        place = (torch.rand(len(rows), generator=generator) * sizes[labels[rows]]).long()
        return a, images[order[(sizes.cumsum(0) - sizes)[labels[rows]] + place]]
    if relation == "standard":
        return augment(a, generator), augment(b, generator)
    return tuple(torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x, x.flip(2, 3)) for x in (a, b))


def build_network(args, pixels, seed):
    """The same seed gives the same weights."""

    def block(inputs, outputs):
        return nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = [nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
        projector = [*block(128, args.hidden), *block(args.hidden, args.hidden), nn.Linear(args.hidden, args.width)]
        return nn.Sequential(nn.Sequential(*encoder), nn.Sequential(*projector))


def trained(args, images, labels, relation, seed):
    network = build_network(args, images[0].numel(), seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(args.steps if relation else 0):
        value = vicreg_loss(*(network(view) for view in pairs(images, labels, relation, generator)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def neighbours(network, data):
    """Accuracy of the nearest training image on the held-out images, by the output of a network."""
    train, test = (network(images).flatten(1).numpy() for images in data[:2])
    return KNeighborsClassifier(1).fit(train, data[2]).score(test, data[3])


def judged(network, data):
    """Held-out accuracies: of the probe of each layer, of the chosen layer, and of neighbours in it and in the last."""
    sets = [
        list(zip(x.split(BATCH), torch.from_numpy(y).split(BATCH), strict=True)) for x, y in (data[::2], data[1::2])
    ]
    chosen = layerwise_probe(network, sets[0], list(LAYERS))
    held_out = layerwise_probe(network, sets[0], list(LAYERS), validation=sets[1])
    strengths = chosen.accuracy.argmax(1)
    accuracy = held_out.accuracy[torch.arange(len(LAYERS)), strengths].tolist()
    cut = chosen.layers.index(chosen.best_layer)
    found = {"layers": accuracy, "cut": cut, "gap": 100 * (accuracy[cut] - accuracy[-1])}
    return found | {"cut 1-NN": neighbours(chosen.truncated, data), "last 1-NN": neighbours(network, data)}


def measure(args):
    """(data, relation) -> what `judged` found for each seed. The relation None is the untrained network."""
    found = {(name, relation): [] for name in DATA for relation in (None, *RELATIONS)}
    for seed in tqdm(range(args.seed, args.seed + args.seeds), desc="seeds", ncols=110):
        for name, split in DATA.items():
            data = split(seed)
            for relation in (None, *RELATIONS):
                network = trained(args, data[0], torch.from_numpy(data[2]), relation, seed)
                found[name, relation].append(judged(network, data))
    return found


def interval(values):
    """The mean and the half width of its 95 % interval by Student's t; NaN for one value."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
    return statistics.mean(values), float(half)


def print_tables(found):
    names = list(LAYERS.values())
    for name in DATA:
        print(f"\n{name}: held-out accuracy of the ridge probe of each layer, mean over the seeds")
        print(f"{'':<24}" + "".join(f"{layer:>13}" for layer in names))
        for relation in (None, *RELATIONS):
            rows = np.mean([seen["layers"] for seen in found[name, relation]], 0)
            print(f"{RELATIONS.get(relation, 'untrained'):<24}" + "".join(f"{value:>13.3f}" for value in rows))
        print(f"{'':<24}{'gap, points':>20}{'chosen layers':>50}{'1-NN cut':>10}{'1-NN last':>10}")
        for relation in (None, *RELATIONS):
            seen = found[name, relation]
            mean, half = interval([s["gap"] for s in seen])
            cuts = [names[s["cut"]] for s in seen]
            counts = ", ".join(f"{cuts.count(layer)} {layer}" for layer in names if layer in cuts)
            knn = "".join(f"{statistics.mean(s[key] for s in seen):>10.3f}" for key in ("cut 1-NN", "last 1-NN"))
            label = RELATIONS.get(relation, "untrained")
            print(f"{label:<24}{f'{mean:.1f} +- {half:.1f}':>20}{counts:>50}{knn}")


def plot(args, found):
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(DATA), figsize=(11, 4.2), layout="constrained")
    for axis, name in zip(axes, DATA, strict=True):
        for k, (relation, label) in enumerate(((None, "untrained"), *RELATIONS.items())):
            rows = list(zip(*(seen["layers"] for seen in found[name, relation]), strict=True))
            means, halves = zip(*map(interval, rows), strict=True)
            style = {"color": "0.5", "linestyle": ":"} if relation is None else {}
            places = np.arange(len(rows)) + 0.1 * (k - 1.5)  # side by side
            axis.errorbar(places, means, np.nan_to_num(halves), capsize=3, marker=".", label=label, **style)
        axis.set(
            title=name, xlabel="layer", ylabel="held-out accuracy, mean and 95 % interval", xticks=range(len(LAYERS))
        )
        axis.set_xticklabels(LAYERS.values(), rotation=20)
    axes[0].legend(frameon=False, title="trained on")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)
    print(args.out)


def verdict(found):
    """One line for each claim; True if all hold."""
    gaps = {relation: interval([seen["gap"] for seen in found["digits", relation]])[0] for relation in RELATIONS}
    claims = (
        (gaps["rotation"] >= LEAST, f"digits, rotation: mean gap {gaps['rotation']:.1f} points (at least {LEAST:g})"),
        (gaps["labels"] <= MOST, f"digits, label pairs: mean gap {gaps['labels']:.1f} points (at most {MOST:g})"),
    )
    return judge(claims)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, SIZES)
    add_run_flags(parser, "out/guillotine.png")
    args = parse(parser, QUICK)
    check_run_flags(parser, args, dict.fromkeys(SIZES, 1))
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
