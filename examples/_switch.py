"""Parts of the examples that switch a trainer over: the same training by two losses, and a compiled step."""

import argparse
import copy
import statistics
import time
from dataclasses import dataclass

import matplotlib
import torch
from _flags import add_run_flags, add_sizes, check_run_flags, judge, parse
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAME, COMPARED = 1e-5, 20  # largest relative difference of two curves that are the same, over their first steps
WARM_UP = 40  # steps in which the learning rate grows
POINTS = 0.003  # the largest difference of two probes that counts as the same accuracy
CHANGES = 20  # compiled steps, with a batch size that changes in each


@dataclass
class Run:
    """A training: its network, the loss of every step, and the seconds of every step."""

    network: nn.Module
    losses: list
    seconds: list

    @property
    def step_ms(self):
        """The median time of a step, without the first two."""
        return 1000 * statistics.median(self.seconds[2:] or self.seconds)


def parse_arguments(doc, sizes, quick, out):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, sizes)
    add_run_flags(parser, out)
    args = parse(parser, quick)
    check_run_flags(parser, args, {"hidden": 1, "width": 2, "batch": 48, "steps": 3})
    return args


def convolutional(channels, hidden, width):
    """An encoder of square images to 256 features, and a projector hidden-width with batch norm."""
    encoder = nn.Sequential(
        *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    )
    projector = nn.Sequential(
        *(nn.Linear(256, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
        nn.Linear(hidden, width),
    )
    return nn.Sequential(encoder, projector)


def train(start, losses, views_of, steps):
    """Train a copy of `start` by each of the named `losses`, on `loss(network(a), network(b))` with the same views.

    The trainings take turns, step by step, so that a busy machine slows all of them down.
    """
    runs = {name: Run(copy.deepcopy(start), [], []) for name in losses}
    optimizers = [optimizer_of(run.network) for run in runs.values()]
    schedules = [warm_up_of(optimizer) for optimizer in optimizers]
    for step in tqdm(range(steps), ncols=90):
        a, b = views_of(step)
        for run, loss, optimizer in zip(runs.values(), losses.values(), optimizers, strict=True):
            begin = time.perf_counter()
            value = loss(run.network(a), run.network(b))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.seconds.append(time.perf_counter() - begin)
            run.losses.append(value.item())
        for schedule in schedules:
            schedule.step()
    return runs


def optimizer_of(network, lr=0.002):
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9)


def warm_up_of(optimizer):
    """A learning rate that grows over the first steps. Rounding errors grow with it, from step to step."""
    return LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP))


def difference(before, after):
    """The largest difference of two loss curves in their first steps, relative to the larger loss of the step."""
    pairs = zip(before.losses[:COMPARED], after.losses[:COMPARED], strict=True)
    return max(abs(x - y) / max(abs(x), abs(y), 1e-30) for x, y in pairs)


def compiled_steps(network, loss, views_of, backend):
    """Take steps whose batch size changes, compiled as a whole: the network, the loss and the backward of both in one
    graph, and the optimizer in another. They end at a graph break, and at a compilation after the first two steps.
    Return the number of steps."""

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def objective(a, b):
        return loss(network(a), network(b))

    update = torch.compile(optimizer_of(network).step, backend=backend)

    def step(number):
        a, b = (view[: len(view) - 2 * number] for view in views_of(number))
        for parameter in network.parameters():  # in place, so that the compiled update sees the same tensors
            if parameter.grad is not None:
                parameter.grad.zero_()
        objective(a, b).backward()
        update()

    taken = 0
    for number in range(CHANGES):
        try:
            with torch.compiler.set_stance("fail_on_recompile" if number >= 2 else "default"):
                step(number)
        except RuntimeError as error:  # a graph break, or another compilation
            print(f"compiled step {number}: {str(error).splitlines()[0]}")
            break
        taken += 1
    return taken


def linear_probe(network, train_x, train_y, test_x, test_y):
    """Accuracy on `test_x` of a linear classifier of the encoder's features."""
    network.eval()
    with torch.no_grad():
        features, held_out = (network[0](x).numpy() for x in (train_x, test_x))
    network.train()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=3000))
    return classifier.fit(features, train_y).score(held_out, test_y)


def print_runs(runs, probes):
    """A table of named runs. `probes` are the accuracies of a linear probe: before all training, and after each."""
    print(f"\n{'':<30}{'step, ms':>10}{'last loss':>12}{'probe':>9}")
    print(f"{'untrained':<30}{'':>22}{probes[0]:>9.3f}")
    for (name, run), accuracy in zip(runs.items(), probes[1:], strict=True):
        print(f"{name:<30}{run.step_ms:>10.1f}{run.losses[-1]:>12.5f}{accuracy:>9.3f}")


def plot(out, runs, title):
    """The loss curves, and the time of a step."""
    figure, (curves, times) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 1), layout="constrained")
    for (name, run), style in zip(runs.items(), ({"lw": 4, "color": "0.75"}, {"lw": 1.2, "color": "C0"}), strict=True):
        curves.plot(range(1, len(run.losses) + 1), run.losses, label=name, **style)
    curves.set(title=title, xlabel="step", ylabel="loss")
    curves.legend(frameon=False)
    times.bar([name.split(":")[0] for name in runs], [run.step_ms for run in runs.values()], color=("0.75", "C0"))
    times.set(title="Time of a step", ylabel="ms (median)")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(out)


def conclude(args, start, runs, data, compiled, views_of, title):
    """Print the table of the runs before and after, draw them, take compiled steps by the loss `compiled`, and judge.

    `start` is the untrained network, and `data` are the arguments of `linear_probe`. Returns the exit code.
    """
    before, after = runs.values()
    probes = [linear_probe(network, *data) for network in (start, before.network, after.network)]
    print_runs(runs, probes)
    plot(args.out, runs, f"{title}, {args.batch} x {args.width}")
    steps = compiled_steps(start, compiled, views_of, "aot_eager" if args.quick else "inductor")
    apart, points = difference(before, after), abs(probes[1] - probes[2])
    claims = (
        (apart <= SAME, f"the loss curves differ by at most {apart:.1e} in {COMPARED} steps (limit {SAME:.0e})"),
        (points <= POINTS, f"the linear probes differ by {points:.4f} (limit {POINTS})"),
        (after.step_ms < before.step_ms, f"a whole step is {before.step_ms / after.step_ms:.2f}x as fast"),
        (steps == CHANGES, f"{steps} compiled steps of as many batch sizes: one graph, no compilation after two steps"),
    )
    return 0 if judge(claims) else 1
