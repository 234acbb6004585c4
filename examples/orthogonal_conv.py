"""A convolutional network on digits whose inner convolutions are orthogonal maps, before and after training.

Real 8 x 8 images (scikit-learn's digits) pass a plain convolution to C channels, orthogonal convolutions as large as
the image, each with a ReLU, and a linear readout. The orthogonal weights are one C x C block per frequency. ProjUNN
trains them by steps of rank 1 with a quarter of the learning rate; Adam trains the rest. The accuracy must exceed that
of a linear classifier on the pixels. The singular values of each orthogonal convolution, as a dense (64 C) x (64 C)
matrix, must be 1.

    python examples/orthogonal_conv.py                                 under a minute on two cores
    python examples/orthogonal_conv.py --quick                         a short form of 400 steps
    python examples/orthogonal_conv.py --channels 64 --steps 3000      wider
    python examples/orthogonal_conv.py --checkpoint out/conv.pt        resumes where it was stopped

Layer: Kiani et al., projUNN (2203.05483).
"""

from functools import partial

import torch
import torch.nn.functional as F
from _digits import Normalize, accuracy, batch_of, linear_accuracy, split_digits
from _flags import parse
from _training import FAR, draw_losses, draw_scores, figure, flags, report, train
from torch import nn

from sslkern.nn import OrthogonalConv2d

SIDE = 8
SIZES = {"channels": (16, "C"), "layers": (3, "orthogonal layers"), "batch": (64, None), "steps": (1500, None)}
QUICK = {"steps": 400}


def build(channels, layers):
    inner = [part for _ in range(layers) for part in (OrthogonalConv2d(channels, SIDE, init="delta"), nn.ReLU())]
    lift = nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()
    return nn.Sequential(Normalize(), *lift, *inner, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * channels, 10))


@torch.no_grad()
def singular_values(layer):
    """Singular values of a convolution as a dense matrix, whose rows are the outputs for unit vectors, without bias."""
    unit = torch.eye(layer.channels * SIDE**2, device=layer.bias.device).view(-1, layer.channels, SIDE, SIDE)
    dense = layer(unit) - layer.bias[:, None, None]
    return torch.linalg.svdvals(dense.flatten(1).double()).cpu()


def main():
    args = parse(flags(__doc__, "out/orthogonal_conv.png", SIZES, lr=2e-3), QUICK)
    train_x, test_x, train_y, test_y = split_digits(0)
    line = linear_accuracy(train_x.flatten(1).numpy(), test_x.flatten(1).numpy(), train_y, test_y)
    network = partial(build, args.channels, args.layers)
    batches, score = partial(batch_of, train_x, train_y, args.batch), partial(accuracy, test_x, test_y)
    bar = f"linear {line:.3f}"
    run = train(args, "convolving", network, batches, F.cross_entropy, bar, score, slower=4, rest=torch.optim.Adam)
    values = [singular_values(layer) for layer in run.network if isinstance(layer, OrthogonalConv2d)]
    with figure(args, f"{args.layers} orthogonal convolutions of {args.channels} channels", panels=3) as axes:
        draw_losses(axes[0], run, "cross-entropy of the batch")
        draw_scores(axes[1], run, "accuracy, held-out digits", line, "linear, on pixels")
        for number, v in enumerate(values, 1):
            axes[2].plot(v - 1, linewidth=0.8, label=f"convolution {number}")
        axes[2].set(xlabel="singular value of the dense matrix, sorted", ylabel="its distance from 1")
        axes[2].legend()
    for number, v in enumerate(values, 1):
        low, high = v.min() - 1, v.max() - 1
        print(f"convolution {number}, {len(v)} x {len(v)}: singular values from 1{low:+.1e} to 1{high:+.1e}")
    good = run.score > line and all((v - 1).abs().max() < FAR for v in values)
    seen = f"accuracy on {len(test_y)} held-out digits {run.score:.3f}, linear classifier on pixels {line:.3f}"
    report(args, run, seen, good, "above the linear classifier, singular values and distance within 1e-5")


if __name__ == "__main__":
    main()
