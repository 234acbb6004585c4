"""Adding task: the sum of two marked numbers in a long sequence, by an RNN whose recurrent weight stays orthogonal.

The sequence has T pairs of a number, uniform in [0, 1], and a mark. The mark is 1 at one place in each half, and 0
elsewhere. The target, after the last pair, is the sum of the two marked numbers. A model without memory predicts 1 and
has a mean squared error of 1/6, the variance of that sum: the no-memory line. ProjUNN trains the recurrent weight with
an eighth of the learning rate; Adam trains the rest.

    python examples/adding_task.py                                                one to two minutes on two cores
    python examples/adding_task.py --quick                                        a short form: T = 20, some seconds
    python examples/adding_task.py --length 200 --hidden 170 --lr 1e-3 --rank 1 --steps 20000    the paper's setting
    python examples/adding_task.py --checkpoint out/adding.pt                     resumes where it was stopped

Task and settings: Kiani et al., projUNN (2203.05483), after Arjovsky et al. (1511.06464).
"""

from functools import partial

import torch
import torch.nn.functional as F
from _flags import parse
from _training import Recurrent, draw_losses, figure, flags, report_loss, train

NO_MEMORY = 1 / 6
SIZES = {"length": (50, "T, at least 2"), "hidden": (128, "N"), "batch": (50, None), "steps": (4000, None)}
QUICK = {"length": 20, "steps": 1000}


def batch_of(size, length, generator):
    """Numbers and marks (T, B, 2), and the sums (B,)."""
    numbers, marks = torch.rand(length, size, generator=generator), torch.zeros(length, size)
    for low, high in ((0, length // 2), (length // 2, length)):
        marks.scatter_(0, torch.randint(low, high, (1, size), generator=generator), 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def squared_error(output, target):
    return F.mse_loss(output[-1, :, 0], target)


def main():
    parser = flags(__doc__, "out/adding_task.png", SIZES, lr=4e-3, rank=4)
    args = parse(parser, QUICK)
    if args.length < 2:
        parser.error("--length must be at least 2: a number in each half")
    network = partial(Recurrent, 2, args.hidden, 1, nonlinearity="relu", init="cayley")
    batches = partial(batch_of, args.batch, args.length)
    line = f"no memory {NO_MEMORY:.4f}"
    run = train(args, "adding", network, batches, squared_error, line, slower=8, rest=torch.optim.Adam)
    with figure(args, f"Adding two of {args.length} numbers: orthogonal, N = {args.hidden}") as (axes,):
        draw_losses(axes, run, "mean squared error", NO_MEMORY)
    report_loss(args, run, "mean squared error", NO_MEMORY, "a tenth", 10)


if __name__ == "__main__":
    main()
