"""Copying memory: ten symbols, a long blank, and the ten again, by a recurrent network whose weight stays orthogonal.

The sequence has T + 20 steps: 10 symbols of 8, T - 1 blanks, a marker, 10 blanks; the target is blank, but for the 10
symbols at the end. Who remembers nothing predicts blanks, and 8 symbols alike at the end: a cross-entropy of
10 ln 8 / (T + 20), the no-memory line. The recurrent weight takes projUNN's steps of rank 1, the rest RMSprop's.

    python examples/copy_memory.py                                                   two minutes on two cores
    python examples/copy_memory.py --blank 1000 --hidden 190 --batch 128 --lr 7e-4 --steps 2000    the paper's setting
    python examples/copy_memory.py --checkpoint out/copy.pt                          goes on where it was stopped

Task and settings: Kiani et al., projUNN (2203.05483), after Arjovsky et al. (1511.06464).
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from sslkern.nn import OrthogonalRNN
from sslkern.nn.orthogonal import orthogonal_parameters, other_parameters
from sslkern.optim import ProjUNN, orthogonality_error

SYMBOLS, COPIED = 8, 10


def batch_of(size, blank, generator):
    """One-hot input (T + 20, B, 10) and target (T + 20, B)."""
    symbols = torch.randint(1, SYMBOLS + 1, (COPIED, size), generator=generator)
    sequence, target = torch.zeros(2, blank + 2 * COPIED, size, dtype=torch.long)
    sequence[:COPIED] = target[-COPIED:] = symbols
    sequence[blank + COPIED - 1] = SYMBOLS + 1
    return F.one_hot(sequence, SYMBOLS + 2).float(), target


class Network(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.recurrent = OrthogonalRNN(SYMBOLS + 2, hidden, nonlinearity="modrelu", init="henaff")
        self.readout = nn.Linear(hidden, SYMBOLS + 1)

    def forward(self, x):
        return self.readout(self.recurrent(x)[0])


def train(args):
    """The loss of every step, and the largest distance of the recurrent weight from orthogonality."""
    torch.manual_seed(args.seed)
    network, generator = Network(args.hidden).to(args.device), torch.Generator().manual_seed(args.seed)
    optimizers = [
        ProjUNN(
            orthogonal_parameters(network),
            args.lr / 32,
            rank=args.rank,
            retraction=args.retraction,
            second_moment="scalar",
        ),
        torch.optim.RMSprop(other_parameters(network), args.lr, alpha=0.9),
    ]
    losses, seconds, worst = [], 0.0, 0.0
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        if saved["setting"] != setting(args):
            sys.exit(f"{args.checkpoint} is of another setting, {saved['setting']}: name another file.")
        network.load_state_dict(saved["network"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        losses, seconds, worst = saved["losses"], saved["seconds"], saved["worst"]
    bar = tqdm(range(len(losses), args.steps), initial=len(losses), total=args.steps, ncols=100, desc="copying")
    for step in bar:
        start = time.perf_counter()
        x, target = (t.to(args.device) for t in batch_of(args.batch, args.blank, generator))
        loss = F.cross_entropy(network(x).flatten(0, 1), target.flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other_parameters(network), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        worst = max(worst, *(orthogonality_error(p.detach()).item() for p in orthogonal_parameters(network)))
        bar.set_postfix_str(f"loss {losses[-1]:.4f}, no memory {no_memory(args):.4f}")
        if args.checkpoint and (step + 1 == args.steps or (step + 1) % 50 == 0):
            args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(
                {
                    "setting": setting(args),
                    "network": network.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "generator": generator.get_state(),
                    "losses": losses,
                    "seconds": seconds,
                    "worst": worst,
                },
                args.checkpoint,
            )
    return losses, seconds, worst


def setting(args):
    """What a checkpoint must agree in; steps may grow."""
    return {key: str(value) for key, value in vars(args).items() if key not in ("steps", "checkpoint", "out", "device")}


def no_memory(args):
    return COPIED * math.log(SYMBOLS) / (args.blank + 2 * COPIED)


def plot(losses, args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(losses, linewidth=0.8, label=f"orthogonal, N = {args.hidden}, steps of rank {args.rank}")
    axes.axhline(no_memory(args), color="black", linestyle="--", linewidth=0.8, label="no memory")
    axes.set(yscale="log", xlabel="step", ylabel="cross-entropy", title=f"Copying memory over {args.blank} blanks")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blank", type=int, default=100, help="T")
    parser.add_argument("--hidden", type=int, default=128, help="N")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--retraction", choices=("tangent", "direct", "cayley"), default="tangent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from, written every 50 steps")
    parser.add_argument("--out", type=Path, default=Path("out/copy_memory.png"))
    args = parser.parse_args()
    if min(args.blank, args.hidden, args.batch, args.steps) < 1:
        parser.error("--blank, --hidden, --batch and --steps must be at least 1")
    losses, seconds, worst = train(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(losses, args)
    tail = losses[-20:]
    final, line = sum(tail) / len(tail), no_memory(args)
    print(f"{len(losses)} steps in {seconds:.0f} s, {1e3 * seconds / len(losses):.0f} ms each. {args.out}")
    print(
        f"cross-entropy of the last {len(tail)} steps {final:.5f}, no memory {line:.5f}: {line / final:.1f} times lower"
    )
    print(f"distance from orthogonality, ||U'U - I|| / sqrt(N), at its largest: {worst:.1e}")
    passed = final < line / 2 and worst < 1e-5
    print("PASS" if passed else "FAIL", "(half of the no-memory line, and 1e-5)")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
