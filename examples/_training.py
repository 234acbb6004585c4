"""Parts of the examples on orthogonal weights: flags, training that resumes from a checkpoint, figure and verdict."""

import argparse
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from tqdm import tqdm

from sslkern.nn import OrthogonalRNN
from sslkern.nn.orthogonal import orthogonal_parameters, other_parameters
from sslkern.optim import ProjUNN, orthogonality_error

EVERY, TAIL = 50, 20  # steps between checkpoints and scores; number of last steps for the reported loss
FREE = ("steps", "checkpoint", "out", "device")  # flags that may differ between a run and its checkpoint
RECORD = ("losses", "scores", "seconds", "worst")  # attributes of a run that its checkpoint has
FAR = 1e-5  # largest distance from orthogonality that passes
RMSPROP = partial(torch.optim.RMSprop, alpha=0.9)


class Recurrent(nn.Module):
    """An OrthogonalRNN with a linear readout: (T, B, inputs) -> (T, B, outputs)."""

    def __init__(self, inputs, hidden, outputs, nonlinearity="modrelu", init="henaff"):
        super().__init__()
        self.recurrent = OrthogonalRNN(inputs, hidden, nonlinearity=nonlinearity, init=init)
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.readout(self.recurrent(x)[0])


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def flags(doc, out, sizes, lr, rank=1):
    """A parser with `sizes` (name: default and help text) and the flags that all these examples have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=text)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--rank", type=positive, default=rank)
    parser.add_argument("--retraction", choices=("tangent", "direct", "cayley"), default="tangent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", type=Path, help=f"file to resume from, written every {EVERY} steps")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def train(args, name, build, batch_of, loss_of, line, score_of=None, slower=32, rest=RMSPROP):
    """Train a network; returns it with losses, scores by step, seconds and the largest distance from orthogonality.

    ProjUNN trains the orthogonal weights of `build()` at learning rate lr / slower; `rest` trains the others at lr.
    """
    torch.manual_seed(args.seed)
    network, generator = build().to(args.device), torch.Generator().manual_seed(args.seed)
    ours, others = [list(parameters(network)) for parameters in (orthogonal_parameters, other_parameters)]
    kind = {"rank": args.rank, "retraction": args.retraction, "second_moment": "scalar"}
    optimizers = [ProjUNN(ours, args.lr / slower, **kind), rest(others, args.lr)]
    run = SimpleNamespace(network=network, losses=[], scores={}, seconds=0.0, worst=0.0, score=None)
    if args.checkpoint and args.checkpoint.exists():
        load(args, run, optimizers, generator)
    done = len(run.losses)
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, ncols=100, desc=name)
    for step in bar:
        start = time.perf_counter()
        x, target = (t.to(args.device) for t in batch_of(generator))
        loss = loss_of(network(x), target)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        run.losses.append(loss.item())
        run.seconds += time.perf_counter() - start
        errors = [orthogonality_error(p).max().item() for p in ours]
        run.worst = torch.tensor([run.worst, *errors], dtype=torch.double).max().item()  # torch's max propagates NaN
        due = (step + 1) % EVERY == 0
        if score_of and due:
            run.scores[step + 1] = score_of(network)
        score = f", score {list(run.scores.values())[-1]:.3f}" if run.scores else ""
        bar.set_postfix_str(f"loss {run.losses[-1]:.4f}{score}, {line}")
        if args.checkpoint and (due or step + 1 == args.steps):
            save(args, run, optimizers, generator)
    run.score = score_of(network) if score_of else None
    return run


def setting(args):
    """The flags in which a run must agree with its checkpoint."""
    return {key: str(value) for key, value in vars(args).items() if key not in FREE}


def load(args, run, optimizers, generator):
    saved = torch.load(args.checkpoint, map_location="cpu")
    if saved["setting"] != setting(args):
        sys.exit(f"{args.checkpoint} has different settings, {saved['setting']}: name another file.")
    run.network.load_state_dict(saved["network"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    generator.set_state(saved["generator"])
    for key in RECORD:
        setattr(run, key, saved[key])


def save(args, run, optimizers, generator):
    """Write a temporary file, then rename it: a run that is stopped while writing keeps its last checkpoint."""
    states = {"network": run.network.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    record = {key: getattr(run, key) for key in RECORD}
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.checkpoint.with_suffix(".part")
    torch.save({"setting": setting(args), **states, "generator": generator.get_state(), **record}, unfinished)
    os.replace(unfinished, args.checkpoint)


@contextmanager
def figure(args, title, panels=1):
    """Axes to draw on, one per panel; the figure is written to args.out at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(1, panels, figsize=(7 if panels == 1 else 4.6 * panels, 4), squeeze=False)
    made.suptitle(f"{title}, steps of rank {args.rank}", fontsize="medium")
    yield axes[0]
    made.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(args.out, dpi=130)


def draw_losses(axes, run, name, line=None):
    """Plot the loss of every step and its running median, with the memoryless baseline `line` if there is one."""
    axes.plot(run.losses, color="C0", linewidth=0.5, alpha=0.4)
    width = max(1, len(run.losses) // 50)
    medians = torch.tensor(run.losses).unfold(0, width, 1).median(-1).values
    axes.plot(range(width // 2, width // 2 + len(medians)), medians, color="C0")
    axes.set(yscale="log", xlabel="step", ylabel=name)
    if line is not None:
        draw_line(axes, line, "no memory", "upper right")


def draw_scores(axes, run, name, line, label):
    """Plot the score by step, with the baseline `line`."""
    scores = {**run.scores, len(run.losses): run.score}
    axes.plot(scores.keys(), scores.values(), color="C0", marker=".")
    axes.set(xlabel="step", ylabel=name)
    draw_line(axes, line, label, "center right")


def draw_line(axes, line, label, place):
    axes.axhline(line, color="black", linestyle="--", linewidth=0.8, label=label)
    axes.legend(loc=place)


def report(args, run, seen, good, wanted):
    """Print the results and exit with the verdict."""
    steps = len(run.losses)
    print(f"{steps} steps in {run.seconds:.0f} s, {1e3 * run.seconds / steps:.0f} ms each. {args.out}")
    print(seen)
    print(f"distance from orthogonality, ||U'U - I|| / sqrt(N), at its largest: {run.worst:.1e}")
    passed = good and run.worst < FAR
    print("PASS" if passed else "FAIL", f"({wanted})")
    sys.exit(not passed)


def report_loss(args, run, name, line, share, factor):
    """Report the mean loss of the last steps against the memoryless baseline."""
    tail = run.losses[-TAIL:]
    final = sum(tail) / len(tail)
    seen = f"{name} of the last {len(tail)} steps {final:.5f}, no memory {line:.5f}: {line / final:.1f} times lower"
    report(args, run, seen, final < line / factor, f"{share} of the no-memory line, and 1e-5")
