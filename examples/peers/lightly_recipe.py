"""One line before an unmodified lightly recipe: SimCLR on digits, before and after `sslkern.train.patch("lightly")`.

`recipe` below is a SimCLR script as lightly's documentation writes one. It runs as it is, and again inside the patch,
which swaps lightly's losses for sslkern's in all modules. Weights, digits and augmentations are the same, and so are
the losses of all steps. At the end, the training step runs under `torch.compile`, with a batch size that changes in
every step.

    python examples/peers/lightly_recipe.py            about two minutes on two cores; needs lightly
    python examples/peers/lightly_recipe.py --quick    a short form of 20 steps

Source: Chen et al., SimCLR (2002.05709). Digits: scikit-learn.
"""

import sys
import time
from pathlib import Path

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all examples share
from _digits import split_digits, two_views
from _switch import Run, conclude, convolutional, optimizer_of, parse_arguments, warm_up_of

import sslkern

SIZES = {"hidden": 512, "width": 128, "batch": 1024, "steps": 60}
QUICK = {"batch": 256, "steps": 20}


class SimCLR(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = convolutional(1, args.hidden, args.width)[0]
        self.projection_head = SimCLRProjectionHead(256, args.hidden, args.width)

    def forward(self, x):
        return self.projection_head(self.backbone(x))


def recipe(args, views_of):
    """The script of lightly's documentation."""
    torch.manual_seed(args.seed)
    model = SimCLR(args)
    criterion = NTXentLoss(temperature=0.5)
    optimizer = optimizer_of(model)
    warm_up = warm_up_of(optimizer)
    run = Run(nn.Sequential(model.backbone, model.projection_head), [], [])
    for step in range(args.steps):
        x0, x1 = views_of(step)
        begin = time.perf_counter()
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        run.seconds.append(time.perf_counter() - begin)
        run.losses.append(loss.item())
    return run


def main():
    args = parse_arguments(__doc__, SIZES, QUICK, "out/lightly_recipe.png")
    train_x, test_x, train_y, test_y = split_digits(args.seed)

    def views_of(step):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        return two_views(train_x, args.batch, generator, "cpu")

    before = recipe(args, views_of)
    with sslkern.train.patch("lightly"):  # the one line
        after = recipe(args, views_of)
        loss = NTXentLoss(temperature=0.5)
    runs = {"before: lightly": before, "after: patched": after}
    torch.manual_seed(args.seed)
    model = SimCLR(args)
    start = nn.Sequential(model.backbone, model.projection_head)
    data = train_x, train_y, test_x, test_y
    return conclude(args, start, runs, data, loss, views_of, "SimCLR on digits")


if __name__ == "__main__":
    sys.exit(main())
