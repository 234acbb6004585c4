"""One line changed in a plain torch script: VICReg on patches of photographs, before and after.

The script trains a small network by the loss as the official script writes it, and again with one import in its place.
Weights, patches and augmentations are the same, and so are the losses of all steps. A linear probe tells which of ten
photographs a patch comes from; it is trained on the left halves of the photographs and tested on the right halves. At
the end, the whole step runs under `torch.compile`, with a batch size that changes in every step.

    python examples/plain_torch.py            about two minutes on two cores
    python examples/plain_torch.py --quick    a short form with batches of 64

Source: Bardes et al., VICReg (2105.04906). Photographs: scikit-image.
"""

import sys

import numpy as np
import torch
from _digits import augment
from _switch import conclude, convolutional, parse_arguments, train
from skimage import color, data
from torch.nn import functional as F

# before: `published`, below, copied into many scripts. After, one line:
from sslkern.train.compat.vicreg import vicreg_loss

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "brick", "moon", "rocket")
SIDE = 16  # pixels
PER_HALF = 120  # patches from each half of a photograph
SIZES = {"hidden": 512, "width": 2048, "batch": 256, "steps": 60}
QUICK = {"batch": 64, "steps": 20}


def published(x, y, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0):
    """VICReg as its official script writes it, with both D x D covariances."""
    n, d = x.shape
    invariance = F.mse_loss(x, y)
    variance = covariance = 0.0
    for z in (x, y):
        z = z - z.mean(dim=0)
        variance = variance + F.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean() / 2
        matrix = z.T @ z / (n - 1)
        covariance = covariance + (matrix - torch.diag(matrix.diagonal())).square().sum() / d
    return sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance


def patches(seed):
    """Patches (N, 1, 16, 16) of the left halves and of the right halves, and the photographs that they come from."""
    random = np.random.default_rng(seed)
    halves = [], []
    for name in PHOTOGRAPHS:
        image = getattr(data, name)()
        image = color.rgb2gray(image[..., :3]) if image.ndim == 3 else image / 255
        middle = image.shape[1] // 2
        for found, half in zip(halves, (image[:, :middle], image[:, middle:]), strict=True):
            rows = random.integers(0, half.shape[0] - SIDE, PER_HALF)
            columns = random.integers(0, half.shape[1] - SIDE, PER_HALF)
            found += [half[i : i + SIDE, j : j + SIDE] for i, j in zip(rows, columns, strict=True)]
    labels = np.repeat(np.arange(len(PHOTOGRAPHS)), PER_HALF)
    return [torch.from_numpy(np.stack(found)).float()[:, None] for found in halves], labels


def main():
    args = parse_arguments(__doc__, SIZES, QUICK, "out/plain_torch.png")
    halves, labels = patches(args.seed)
    torch.manual_seed(args.seed)
    start = convolutional(1, args.hidden, args.width)

    def views_of(step):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        picked = halves[0][torch.randint(len(labels), (args.batch,), generator=generator)]
        return [augment(picked, generator) for _ in range(2)]

    losses = {"before: the official formula": published, "after: sslkern": vicreg_loss}
    runs = train(start, losses, views_of, args.steps)
    data = halves[0], labels, halves[1], labels
    return conclude(args, start, runs, data, vicreg_loss, views_of, "VICReg on patches of photographs")


if __name__ == "__main__":
    sys.exit(main())
