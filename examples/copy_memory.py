"""Copying memory: repeat ten symbols after a long blank, by an RNN whose recurrent weight stays orthogonal.

The sequence has T + 20 steps: 10 symbols out of 8, T - 1 blanks, a marker, and 10 blanks. The target is blank except
for the last 10 steps, which repeat the symbols. A model without memory predicts blanks and then all 8 symbols with the
same probability. Its cross-entropy is 10 ln 8 / (T + 20): the no-memory line. ProjUNN trains the recurrent weight by
steps of rank 1; RMSprop trains the rest.

    python examples/copy_memory.py                                                   under a minute on two cores
    python examples/copy_memory.py --quick                                           a short form: 30 blanks
    python examples/copy_memory.py --blank 1000 --hidden 190 --batch 128 --lr 7e-4 --steps 2000    the paper's setting
    python examples/copy_memory.py --checkpoint out/copy.pt                          resumes where it was stopped

Task and settings: Kiani et al., projUNN (2203.05483), after Arjovsky et al. (1511.06464).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from _flags import parse
from _training import Recurrent, draw_losses, figure, flags, report_loss, train

SYMBOLS, COPIED = 8, 10
SIZES = {"blank": (100, "T"), "hidden": (128, "N"), "batch": (64, None), "steps": (600, None)}
QUICK = {"blank": 30, "steps": 200}


def batch_of(size, blank, generator):
    """One-hot input (T + 20, B, 10) and target (T + 20, B)."""
    symbols = torch.randint(1, SYMBOLS + 1, (COPIED, size), generator=generator)
    sequence, target = torch.zeros(2, blank + 2 * COPIED, size, dtype=torch.long)
    sequence[:COPIED] = target[-COPIED:] = symbols
    sequence[blank + COPIED - 1] = SYMBOLS + 1
    return F.one_hot(sequence, SYMBOLS + 2).float(), target


def cross_entropy(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def main():
    args = parse(flags(__doc__, "out/copy_memory.png", SIZES, lr=1e-3), QUICK)
    line = COPIED * math.log(SYMBOLS) / (args.blank + 2 * COPIED)
    network = partial(Recurrent, SYMBOLS + 2, args.hidden, SYMBOLS + 1)
    batches = partial(batch_of, args.batch, args.blank)
    run = train(args, "copying", network, batches, cross_entropy, f"no memory {line:.4f}")
    with figure(args, f"Copying memory over {args.blank} blanks: orthogonal, N = {args.hidden}") as (axes,):
        draw_losses(axes, run, "cross-entropy", line)
    report_loss(args, run, "cross-entropy", line, "half", 2)


if __name__ == "__main__":
    main()
