"""Self-supervised digits, by the published formula and by sslkern: one line changed.

Real 8 x 8 images (scikit-learn's digits), two augmented views, a small encoder, a projector hidden-hidden-width, Adam.
All runs use the same network and training code, and only the loss differs. The projector has LayerNorm instead of the
BatchNorm of the papers, so that only the loss looks across the batch. Micro-batches then differ from the whole batch by
their estimator alone, and 16 of them are one forward with the loss over a (16, 16, width) stack.

    python examples/vicreg_digits.py                     five minutes on two cores, mostly for the published formula
    python examples/vicreg_digits.py --quick             a short form: a smaller projector, half a minute
    python examples/vicreg_digits.py --hidden 8192       the paper's projector
    python examples/vicreg_digits.py --loss barlow       Barlow Twins
"""

import argparse
import statistics
import sys
from functools import partial

import torch
import torch.nn.functional as F
from _digits import build_network, features, probe, split_digits, two_views
from _digits_plot import plot
from _flags import add_flags, check_flags, parse
from _meter import Meter
from tqdm import tqdm

import sslkern

EVERY = 5  # steps between measurements of the unbiased loss of the whole batch
MICRO = {"unbiased": "unbiased", "plugin": "plug-in"}  # estimators of the micro-batch runs
CURVE, POINT = 1e-3, 0.01  # largest relative distance of curves and difference of accuracies that pass


# The losses of the official scripts.
def off_diagonal(c):
    n = c.shape[0]
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def vicreg_published(a, b):
    n, d = a.shape
    invariance = F.mse_loss(a, b)
    a, b = a - a.mean(0), b - b.mean(0)
    variance = sum(F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean() / 2 for z in (a, b))
    covariance = sum(off_diagonal(z.T @ z / (n - 1)).pow_(2).sum() / d for z in (a, b))
    return 25 * invariance + 25 * variance + covariance


def barlow_published(a, b):
    c = F.batch_norm(a, None, None, training=True).T @ F.batch_norm(b, None, None, training=True) / a.shape[0]
    return torch.diagonal(c).add(-1).pow_(2).sum() + 0.0051 * off_diagonal(c).pow_(2).sum()


LOSSES = {
    "vicreg": (vicreg_published, sslkern.vicreg_loss),
    "barlow": (barlow_published, sslkern.barlow_twins_loss),
}


def train_step(network, optimizer, loss, views, meter):
    """One training step, with the loss timed by itself. Returns the embeddings with their gradients, and the loss."""
    with meter.part("forward"):
        outputs = [network(view) for view in views]
    with meter.part("loss"):
        a, b = (z.detach().requires_grad_() for z in outputs)
        value = loss(a, b)
        value.backward()
    with meter.part("backward"):
        torch.autograd.backward(outputs, (a.grad, b.grad))
        optimizer.step()
        optimizer.zero_grad()
    meter.seconds["step"] = sum(meter.seconds[part] for part in ("forward", "loss", "backward"))
    return a, b, value.detach()


def stacked(loss, micro, **settings):
    """The mean of the loss over micro-batches, which has the gradient that accumulation over them gives."""

    def over_stack(a, b):
        a, b = (z.unflatten(0, (-1, micro)) for z in (a, b))
        return loss(a, b, batch_dim=1, dim=2, **settings)

    return over_stack


def errors(loss, a, b, value):
    """Relative errors of the loss and of the gradient of a and b, against the dual in fp64 on the same embeddings."""
    a64, b64 = (z.detach().double().requires_grad_() for z in (a, b))
    with sslkern.backend.use("reference"):
        truth = loss(a64, b64)
        truth.backward()
    gradient, exact = torch.cat([a.grad, b.grad]).double(), torch.cat([a64.grad, b64.grad])
    return ((value - truth).abs() / truth.abs()).item(), ((gradient - exact).norm() / exact.norm()).item()


def projector_of(args):
    """The widths of the projector, in words."""
    return f"{args.hidden}-{args.hidden}-{args.width}"


def first_table(args, images):
    """Compare a published step with those of sslkern, on the same weights (learning rate 0) and the same views.

    The projector is up to four times as wide as that of the runs below, so that its larger layers are factored.
    """
    args = argparse.Namespace(**vars(args))
    args.hidden = max(args.hidden, min(4 * args.hidden, 4096))
    plain, factored = build_network(args), sslkern.nn.factored_(build_network(args))
    views = two_views(images, args.batch, torch.Generator().manual_seed(args.seed), args.device)
    published, ours = LOSSES[args.loss]
    steps = {
        "published": (published, plain, torch.optim.Adam(plain.parameters(), lr=0.0), 1),
        "sslkern": (ours, plain, torch.optim.Adam(plain.parameters(), lr=0.0), 3),
        "factored": (ours, factored, sslkern.optim.AdamW(factored.parameters(), lr=0.0, weight_decay=0.0), 3),
    }
    published(*torch.randn(2, args.batch, 16, device=args.device, requires_grad=True)).backward()
    kept = {}  # whether a weight's gradient is factored
    for layer in factored.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.register_post_accumulate_grad_hook(
                lambda w: kept.update({w: getattr(w.grad, "factored", False)})
            )
    rows = {}
    for name, (loss, network, optimizer, runs) in steps.items():
        train_step(network, optimizer, ours, views, Meter(args.device, memory=True))  # warm-up; Adam's state
        meters = [Meter(args.device, memory=run == 0) for run in range(runs)]
        for meter in meters:
            a, b, value = train_step(network, optimizer, loss, views, meter)
        seconds = {part: statistics.median(m.seconds[part] for m in meters) for part in ("loss", "step")}
        rows[name] = (seconds, meters[0].peak, errors(ours, a, b, value))
        optimizer.state.clear()
    print(f"projector {projector_of(args)}")
    print(f"{'':27}{''.join(f'{name:>11}' for name in rows)}{'ratios':>17}{'loss error':>15}{'gradient error':>16}")
    for part, label in (("loss", "loss, forward + backward"), ("step", "whole training step")):
        accuracy = [" / ".join(f"{rows[name][2][k]:.0e}" for name in ("published", "sslkern")) for k in (0, 1)]
        print(f"{label:27}{_cells([rows[name][0][part] * 1e3 for name in rows], 'ms', 1)}", end="")
        print(f"{accuracy[0]:>15}{accuracy[1]:>16}")
        print(f"{'  extra memory':27}{_cells([rows[name][1][part] / 2**20 for name in rows], 'MB', 0)}")
    print(
        f"Factored: {sum(kept.values())} of {len(kept)} linear layers keep their gradients as factors, which sslkern's "
        "AdamW takes.\n"
        "The others take torch's Adam. The published step ran once, the others three times (median), after a warm-up.\n"
        "Ratios: published to others. Errors are relative, published / sslkern, against the dual in fp64 on the same\n"
        "embeddings, which is the same number by exact algebra. Extra memory: the most allocated beside what was\n"
        "there before, with gradients.\n",
        flush=True,
    )


def _cells(values, unit, digits):
    """The three values with a unit, and the ratios of the first to the others."""
    ratios = " / ".join(f"{values[0] / value:.1f}x" for value in values[1:])
    return f"{''.join(f'{value:>8.{digits}f} {unit}' for value in values)}{ratios:>17}"


def check_stack(args, images):
    """Accumulate one step over micro-batches; print the distance of its gradient from that of the stack."""
    network, gradients = build_network(args), []
    views = two_views(images, args.batch, torch.Generator().manual_seed(args.seed), args.device)
    loss = partial(sslkern.vicreg_loss, estimator="unbiased")
    for size, over in ((args.micro, loss), (args.batch, stacked(loss, args.micro))):
        network.zero_grad()
        for a, b in zip(*(view.split(size) for view in views), strict=True):
            (over(network(a), network(b)) * (size / args.batch)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    distance = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    print(f"{args.batch // args.micro} micro-batches of {args.micro}, accumulated one by one or as one stack: ", end="")
    print(f"gradients differ by {distance:.0e}.\nThe runs below take the stack, which is faster.\n", flush=True)


def train(args, data, label, loss, steps, look_at=()):
    """Loss, seconds and unbiased loss of the whole batch ("yardstick") by step; features after the steps in look_at."""
    network, generator = build_network(args), torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    run = {"loss": [], "seconds": {"loss": [], "step": []}, "yardstick": {}, "features": {}}
    bar = tqdm(range(steps), desc=f"{label:26}", ncols=110, leave=True)
    for step in bar:
        if step in look_at:
            run["features"][step] = features(network, data[0], data[1])
        meter = Meter(args.device)
        views = two_views(data[0], args.batch, generator, args.device)
        a, b, value = train_step(network, optimizer, loss, views, meter)
        run["loss"].append(value.item())
        for part, seconds in run["seconds"].items():
            seconds.append(meter.seconds[part])
        if args.loss == "vicreg" and step % EVERY == 0:
            with torch.no_grad():
                run["yardstick"][step] = sslkern.vicreg_loss(a, b, estimator="unbiased").item()
        bar.set_postfix_str(f"loss {run['loss'][-1]:.3f}")
    run["features"][steps] = features(network, data[0], data[1])
    return run


def run_all(args, data):
    """Every training run, by label."""
    published, ours = LOSSES[args.loss]
    early = args.published_steps
    runs = {
        "published": train(args, data, "published formula", published, early),
        "sslkern": train(args, data, "sslkern", ours, args.steps, look_at=(0, early)),
    }
    if args.loss == "barlow":
        print("No micro-batch runs: Barlow Twins has no unbiased estimator.")
        return runs
    for estimator, label in MICRO.items():
        loss = stacked(ours, args.micro, estimator=estimator)
        runs[estimator] = train(args, data, f"micro-batches, {label}", loss, early)
    return runs


def micro_label(args, name):
    return f"micro {args.micro}, {MICRO[name]}, {args.published_steps} steps"


def probe_all(args, data, runs):
    """Accuracies by row label, also printed as a table."""
    early, flat = args.published_steps, [images.flatten(1).numpy() for images in data[:2]]
    rows = {"raw pixels": flat, "untrained encoder": runs["sslkern"]["features"][0]}
    rows[f"published, {early} steps"] = runs["published"]["features"][early]
    rows[f"sslkern, {early} steps"] = runs["sslkern"]["features"][early]
    for name in [name for name in MICRO if name in runs]:
        rows[micro_label(args, name)] = runs[name]["features"][early]
    rows[f"sslkern, {args.steps} steps"] = runs["sslkern"]["features"][args.steps]
    accuracies = {label: probe(*x, *data[2:]) for label, x in rows.items()}
    print(f"\n{'linear probe, held-out digits':32}{'all labels':>12}{'5 per class':>14}")
    for label, (full, few) in accuracies.items():
        print(f"{label:32}{full:>12.3f}{few:>14.3f}")
    return accuracies


def verdict(args, runs, times, distance, accuracies):
    """Print one line of results; True if all of them pass."""
    early = args.published_steps
    speed = {part: times["published"][part] / times["sslkern"][part] for part in ("loss", "step")}
    best, raw = accuracies[f"sslkern, {args.steps} steps"][0], accuracies["raw pixels"][0]
    checks = {
        f"curves within {distance:.0e} over {early} steps": distance <= CURVE,
        f"loss {speed['loss']:.1f}x and step {speed['step']:.1f}x as fast": min(speed.values()) > 1,
        f"probe {best:.3f} against {raw:.3f} of raw pixels": best > raw,
    }
    if "unbiased" in runs:
        whole = accuracies[f"sslkern, {early} steps"][0]
        gap = {e: accuracies[micro_label(args, e)][0] - whole for e in MICRO}
        seen = f"micro-batches of {args.micro} {gap['unbiased'] * 100:+.1f} points (plug-in {gap['plugin'] * 100:+.1f})"
        checks[seen] = abs(gap["unbiased"]) <= POINT
    passed = all(checks.values())
    print("PASS: " if passed else "FAIL: ", end="")
    print(", ".join(seen if ok else f"FAILED: {seen}" for seen, ok in checks.items()))
    return passed


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default="vicreg")
    sizes = {"hidden": 1024, "width": 8192, "batch": 256, "micro": 16, "steps": 300, "published-steps": 40}
    add_flags(parser, sizes, "out/vicreg_digits.png")
    args = parse(parser, {"hidden": 512, "width": 2048, "steps": 60, "published_steps": 10})
    least = {"hidden": 1, "width": 2, "batch": 4, "micro": 4, "steps": 1, "published_steps": 1}
    check_flags(parser, args, least)
    if args.loss == "vicreg" and args.batch % args.micro:
        parser.error(f"--batch must be a multiple of --micro, got {args.batch} and {args.micro}.")
    args.published_steps = min(args.published_steps, args.steps)
    return args


def main():
    args = parse_arguments()
    data = split_digits(args.seed)
    threads = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    print(f"{args.loss}, batch {args.batch}, {threads}\n", flush=True)
    first_table(args, data[0])
    print(f"All runs below: projector {projector_of(args)}, Adam\n", flush=True)
    if args.loss == "vicreg":
        check_stack(args, data[0])
    runs = run_all(args, data)
    accuracies = probe_all(args, data, runs)
    pairs = zip(runs["published"]["loss"], runs["sslkern"]["loss"], strict=False)
    distance = max(abs(old - new) / abs(old) for old, new in pairs)
    seconds = {name: runs[name]["seconds"] for name in ("published", "sslkern")}
    times = {name: {part: statistics.median(x) for part, x in parts.items()} for name, parts in seconds.items()}
    plot(args, runs, times, distance, accuracies)
    return 0 if verdict(args, runs, times, distance, accuracies) else 1


if __name__ == "__main__":
    sys.exit(main())
