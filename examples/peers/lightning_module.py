"""One line changed in a Lightning module: Barlow Twins on faces, before and after.

The module below is written for Lightning and lightly. It trains by lightly's loss, and again with the import of the
loss changed. Weights, faces and augmentations are the same, and so are the losses of all steps. A linear probe tells
faces from other crops. At the end, the training step runs under `torch.compile`, with a batch size that changes in
every step.

    python examples/peers/lightning_module.py            about two minutes on two cores; needs lightning and lightly
    python examples/peers/lightning_module.py --quick    a short form with 2048 features

Source: Zbontar et al., Barlow Twins (2103.03230). Faces: a subset of Labeled Faces in the Wild in scikit-image.
"""

import copy
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning
import numpy as np
import torch
from skimage.data import lfw_subset
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all examples share
from _digits import augment
from _switch import Run, conclude, convolutional, optimizer_of, parse_arguments, warm_up_of

# before
from lightly.loss import BarlowTwinsLoss as Before

# after: one line
from sslkern.train.compat.lightly import BarlowTwinsLoss as After

SIZES = {"hidden": 512, "width": 4096, "batch": 128, "steps": 60}
QUICK = {"width": 2048, "steps": 20}


class BarlowTwins(lightning.LightningModule):
    def __init__(self, network, criterion):
        super().__init__()
        self.network, self.criterion = network, criterion
        self.run = Run(network, [], [])

    def training_step(self, batch, index):
        a, b = batch
        loss = self.criterion(self.network(a), self.network(b))
        self.run.losses.append(loss.detach().item())
        return loss

    def on_train_batch_start(self, batch, index):
        self.begin = time.perf_counter()

    def on_train_batch_end(self, outputs, batch, index):
        self.run.seconds.append(time.perf_counter() - self.begin)

    def configure_optimizers(self):
        optimizer = optimizer_of(self.network, lr=1e-7)  # the loss is a sum over D^2 numbers: some thousands
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up_of(optimizer), "interval": "step"}}


class Views(Dataset):
    """Batches of two views of random faces. Batch k depends on the seed and on k only."""

    def __init__(self, images, args):
        self.images, self.args = images, args

    def __len__(self):
        return self.args.steps

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        picked = self.images[torch.randint(len(self.images), (self.args.batch,), generator=generator)]
        return [augment(picked, generator) for _ in range(2)]


def faces(seed):
    """Images (N, 1, 25, 25) of faces and of other crops, half of each, and whether it is a face; shuffled."""
    images = torch.from_numpy(lfw_subset()).float()[:, None]
    order = np.random.default_rng(seed).permutation(len(images))
    return images[order], (order < len(images) // 2).astype(int)


def fit(module, views, args):
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module, DataLoader(views, batch_size=None, num_workers=0))
    return module.run


def main():
    args = parse_arguments(__doc__, SIZES, QUICK, "out/lightning_module.png")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # its advice on workers and logging
    images, labels = faces(args.seed)
    half = len(images) // 2
    torch.manual_seed(args.seed)
    start, views = convolutional(1, args.hidden, args.width), Views(images, args)
    criteria = {"before: lightly": Before(), "after: sslkern": After()}
    runs = {name: fit(BarlowTwins(copy.deepcopy(start), loss), views, args) for name, loss in criteria.items()}
    data = images[:half], labels[:half], images[half:], labels[half:]
    for run in runs.values():
        run.network.cpu()
    return conclude(args, start, runs, data, After(), views.__getitem__, "Barlow Twins on faces")


if __name__ == "__main__":
    sys.exit(main())
