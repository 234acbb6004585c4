"""SimCLR on real digits (scikit-learn's): linear probe and independence of the features during training.

Two augmented views, a small convolutional encoder, a projector hidden-hidden-width, Adam. Ten times during training,
two numbers are measured on held-out digits: the accuracy of a linear classifier on the encoder's output, and the
normalised HSIC of its features, averaged over all pairs. No loss here asks for independent features; the figure shows
how their dependence changes.

    python examples/simclr_digits.py                      under a minute on two cores
    python examples/simclr_digits.py --quick              a short form of 60 steps
    python examples/simclr_digits.py --loss dcl           without the positive among the negatives, or --loss sigmoid
    python examples/simclr_digits.py --temperature 0.05   a sharper softmax

Losses: Chen et al., SimCLR (2002.05709); Yeh et al., DCL (2110.06848); Zhai et al., SigLIP (2303.15343). HSIC of the
features: Mialon et al. (2209.14905).
"""

import argparse
import statistics
import sys

import matplotlib
import torch
import torch.nn.functional as F
from _digits import build_network, features, probe, split_digits, two_views
from _flags import add_flags, check_flags, parse
from torch import nn
from tqdm import tqdm

from sslkern.losses import NTXentLoss, SigmoidLoss
from sslkern.metrics import pairwise_hsic

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOOKS = 10  # measurements during training, besides the one before it
SIZES = {"hidden": 512, "width": 128, "batch": 256, "steps": 300}
QUICK = {"steps": 60}


def build_loss(args):
    if args.loss == "sigmoid":  # scale and bias are learnt
        return SigmoidLoss(*(nn.Parameter(torch.tensor(x, device=args.device)) for x in (1 / args.temperature, -10.0)))
    return NTXentLoss(args.temperature, decoupled=args.loss == "dcl")


def dependence(z):
    """Normalised HSIC, averaged over all pairs of features that are not constant, and the number of these features."""
    deviation = z.std(0)
    # a mostly zero feature has a median distance of 0 and thus a bandwidth of 1, which suits a unit standard deviation
    hsic = pairwise_hsic(z / deviation.masked_fill(deviation == 0, 1), normalized=True)
    live = hsic.diagonal() > 0
    count, total = int(live.sum()), (hsic.sum() - hsic.trace()).item()
    return total / max(1, count * (count - 1)), count


def shuffled(z, generator):
    """Every feature shuffled by itself, which makes all of them independent."""
    order = torch.rand(z.shape, generator=generator).argsort(0).to(z.device)
    return z.gather(0, order)


@torch.no_grad()
def held_out(args, network, data):
    """Features of the held-out digits: the encoder's, and the projector's scaled to unit length, as in the loss."""
    (encoded,) = features(network, data[1])
    encoded = torch.from_numpy(encoded).to(args.device)
    return encoded, F.normalize(network[1](encoded))


def look(args, network, data):
    """The measurements for one row of the table."""
    hsic, live = {}, {}
    for name, z in zip(("encoder", "projector"), held_out(args, network, data), strict=True):
        hsic[name], live[name] = dependence(z)
    return {"probe": probe(*features(network, *data[:2]), *data[2:]), "hsic": hsic, "live": live["encoder"]}


def train(args, data):
    """The network, the loss of every step, and the measurements by step."""
    network, loss = build_network(args), build_loss(args)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=1e-3)
    due = {round(k * args.steps / LOOKS) for k in range(LOOKS + 1)}
    losses, looks = [], {0: look(args, network, data)}
    for step in (bar := tqdm(range(1, args.steps + 1), desc=args.loss, ncols=110)):
        value = loss(*(network(view) for view in two_views(data[0], args.batch, generator, args.device)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        if step in due:
            looks[step] = look(args, network, data)
        last = list(looks.values())[-1]
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, probe {last['probe'][0]:.3f}, HSIC {last['hsic']['encoder']:.4f}")
    return network, losses, looks


def print_table(losses, looks, raw, independent):
    print(f"\n{'':>10}{'':>9}{'probe, held-out digits':>26}{'HSIC of two features':>26}{'features':>11}")
    print(f"{'step':>10}{'loss':>9}{'all labels':>12}{'5 per class':>14}{'encoder':>14}{'projector':>12}{'alive':>11}")
    print(f"{'raw pixels':>10}{'':>9}{raw[0]:>12.3f}{raw[1]:>14.3f}")
    before = 0
    for step, seen in looks.items():
        loss = f"{statistics.mean(losses[before:step]):.3f}" if step else ""
        hsic = f"{seen['hsic']['encoder']:>14.4f}{seen['hsic']['projector']:>12.4f}"
        print(f"{step:>10}{loss:>9}{seen['probe'][0]:>12.3f}{seen['probe'][1]:>14.3f}{hsic}{seen['live']:>11}")
        before = step
    print(
        "Loss: the mean since the row before. Alive: features of the encoder that are not constant; HSIC is of these.\n"
        f"It is {independent:.4f} where every feature is shuffled on its own, hence independent: the bias of HSIC.\n"
    )


def plot_training(axis, losses, looks, raw):
    (line,) = axis.plot(range(1, len(losses) + 1), losses, color="0.7", lw=1, label="loss (left axis)")
    axis.set(title="Loss, and linear probe on held-out digits", xlabel="step", ylabel="loss")
    right = axis.twinx()
    handles = [line]
    for k, (label, color) in enumerate((("all labels", "C0"), ("5 labels per class", "C1"))):
        accuracies = [seen["probe"][k] for seen in looks.values()]
        handles += right.plot(list(looks), accuracies, ".-", color=color, label=f"probe, {label}")
        handles += [right.axhline(raw[k], color=color, ls="--", lw=1, label=f"raw pixels, {label}")]
    right.set(ylabel="accuracy", ylim=(None, 1.005))
    return handles


def plot_independence(axis, looks, independent):
    handles = []
    for name, color in (("encoder", "C0"), ("projector", "C2")):
        values = [seen["hsic"][name] for seen in looks.values()]
        handles += axis.plot(list(looks), values, ".-", color=color, label=f"{name}'s features")
    axis.set(title="Normalised HSIC, mean over pairs of features", xlabel="step", ylabel="HSIC", ylim=(0, None))
    return [*handles, axis.axhline(independent, color="black", ls=":", lw=1, label="encoder's, each shuffled")]


def plot(args, losses, looks, raw, independent):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    drawn = [plot_training(axes[0], losses, looks, raw), plot_independence(axes[1], looks, independent)]
    for axis, handles in zip(axes, drawn, strict=True):
        axis.legend(handles=handles, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(args.out)


def verdict(looks, raw, independent):
    """Print one line on the probe and one on HSIC; True if the probe beats raw pixels and the untrained encoder."""
    first, *_, last = looks.values()
    passed = last["probe"][0] > max(raw[0], first["probe"][0])
    against = f"{raw[0]:.3f} of raw pixels and {first['probe'][0]:.3f} of the untrained encoder"
    print(f"{'PASS' if passed else 'FAIL'}: probe {last['probe'][0]:.3f} against {against}")
    values = {name: [seen["hsic"][name] for seen in looks.values()] for name in last["hsic"]}
    seen = [f"{name} {x[0]:.3f} / {max(x):.3f} / {x[-1]:.3f}" for name, x in values.items()]
    print(f"HSIC at the start / at most / at the end: {', '.join(seen)}; if independent {independent:.3f}")
    return passed


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("nt_xent", "dcl", "sigmoid"), default="nt_xent")
    hint = "of sigmoid 1 / scale, at the start; default 0.2"
    parser.add_argument("--temperature", type=float, default=0.2, metavar="T", help=hint)
    add_flags(parser, SIZES, "out/simclr_digits.png")
    args = parse(parser, QUICK)
    check_flags(parser, args, {"hidden": 1, "width": 2, "batch": 2, "steps": 1})
    if not 0 < args.temperature < float("inf"):
        parser.error(f"--temperature must be a number above 0, got {args.temperature}.")
    return args


def main():
    args = parse_arguments()
    data = split_digits(args.seed)
    raw = probe(*(images.flatten(1).numpy() for images in data[:2]), *data[2:])
    network, losses, looks = train(args, data)
    encoded, _ = held_out(args, network, data)
    independent, _ = dependence(shuffled(encoded, torch.Generator().manual_seed(args.seed)))
    print_table(losses, looks, raw, independent)
    plot(args, losses, looks, raw, independent)
    return 0 if verdict(looks, raw, independent) else 1


if __name__ == "__main__":
    sys.exit(main())
