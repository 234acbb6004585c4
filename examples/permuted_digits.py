"""Digits read pixel by pixel in a random order, by an RNN whose recurrent weight stays orthogonal.

Real 8 x 8 images (scikit-learn's digits), one pixel per step, all in the same random permutation, so that neighbours
are far apart. The state after the last pixel gives the label. The no-memory line is the accuracy from the last 8 pixels
alone: the better of a linear classifier and a support vector machine, trained and tested on the same images. ProjUNN
trains the recurrent weight by steps of rank 1 with 1/32 of the learning rate; RMSprop trains the rest.

    python examples/permuted_digits.py                                       under a minute on two cores
    python examples/permuted_digits.py --quick                               a short form of 400 steps
    python examples/permuted_digits.py --no-permute                          row by row
    python examples/permuted_digits.py --hidden 116 --batch 128 --lr 1e-3    the paper's setting, or --hidden 512
    python examples/permuted_digits.py --checkpoint out/permuted.pt          resumes where it was stopped

The paper uses MNIST, 784 pixels per image; this example uses the digits in every setting.

Task and settings: Kiani et al., projUNN (2203.05483), after Le et al. (1504.00941).
"""

from argparse import BooleanOptionalAction
from functools import partial

import torch
import torch.nn.functional as F
from _digits import accuracy, batch_of, linear_accuracy, split_digits
from _flags import parse
from _training import Recurrent, draw_losses, draw_scores, figure, flags, report, train
from sklearn.svm import SVC

PIXELS, LAST = 64, 8
SIZES = {"hidden": (116, "N"), "batch": (64, None), "steps": (1500, None)}
QUICK = {"steps": 400}


class Reader(Recurrent):
    """Images (N, 1, 8, 8), read pixel by pixel in the given order -> the logits of the last step, (N, 10)."""

    def __init__(self, order, hidden):
        super().__init__(1, hidden, 10)
        self.register_buffer("order", order)

    def forward(self, images):
        return super().forward(images.flatten(1).T[self.order].unsqueeze(-1))[-1]


def without_memory(order, train_x, test_x, train_y, test_y):
    """Accuracy from the last pixels alone: the better of two classifiers."""
    seen = [x.flatten(1)[:, order[-LAST:]].numpy() for x in (train_x, test_x)]
    machine = SVC().fit(seen[0], train_y).score(seen[1], test_y)
    return max(linear_accuracy(*seen, train_y, test_y), machine)


def main():
    parser = flags(__doc__, "out/permuted_digits.png", SIZES, lr=1e-3)
    parser.add_argument("--permute", action=BooleanOptionalAction, default=True, help="a permutation drawn by the seed")
    args = parse(parser, QUICK)
    digits = train_x, test_x, train_y, test_y = split_digits(0)
    order = torch.arange(PIXELS)
    if args.permute:
        order = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(args.seed))
    line = without_memory(order, *digits)
    batches, score = partial(batch_of, train_x, train_y, args.batch), partial(accuracy, test_x, test_y)
    label = f"last {LAST} pixels alone"
    network = partial(Reader, order, args.hidden)
    run = train(args, "reading", network, batches, F.cross_entropy, f"no memory {line:.3f}", score)
    read = "in random order" if args.permute else "row by row"
    with figure(args, f"Digits as {PIXELS} pixels {read}: orthogonal, N = {args.hidden}", panels=2) as axes:
        draw_losses(axes[0], run, "cross-entropy of the batch")
        draw_scores(axes[1], run, "accuracy, held-out digits", line, label)
    seen = f"accuracy on {len(test_y)} held-out digits {run.score:.3f}, {label} (no memory) {line:.3f}"
    report(args, run, seen, 1 - run.score < (1 - line) / 2, "half of the errors without memory, and 1e-5")


if __name__ == "__main__":
    main()
