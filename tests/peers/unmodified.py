"""Runs a script of lightly for 20 steps, as it is or after one line of ours, and prints the loss of every step.

    python tests/peers/unmodified.py ../lightly/examples/pytorch/simclr.py [--patch]

Three things differ from the script as it stands, in both runs. Its data set is replaced by patches of photographs from
scikit-image, because it would have to be downloaded. The learning rate warms up as in the paper of SimCLR, over ten
epochs, and everything is in float64: a random network is chaotic, and at the full rate a rounding error grows a
hundredfold in a step.
"""

import json
import runpy
import sys

import numpy as np
import torch
import torchvision
from PIL import Image
from skimage import data
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

STEPS, BATCH, SIDE = 20, 256, 32
WARM_UP = 1950  # steps in ten epochs of CIFAR-10
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


class Photographs(torch.utils.data.Dataset):
    """As many images as the script takes in its steps, under the name and with the arguments of CIFAR-10."""

    def __init__(self, root, download=False, transform=None):
        random = np.random.default_rng(0)
        images = [getattr(data, name)()[::4, ::4, :3] for name in PHOTOGRAPHS]
        self.patches, self.transform = [], transform
        for k in range(STEPS * BATCH):
            image = images[k % len(images)]
            i, j = random.integers(0, image.shape[0] - SIDE), random.integers(0, image.shape[1] - SIDE)
            self.patches.append((Image.fromarray(image[i : i + SIDE, j : j + SIDE]), k % len(images)))

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, k):
        image, label = self.patches[k]
        return self.transform(image), label


class Enough(Exception):
    """The steps have been taken."""


def main():
    script, *flags = sys.argv[1:]
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torchvision.datasets.CIFAR10 = Photographs
    losses, classes = [], set()

    def widened(module, inputs):
        return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

    def name(module, inputs, output):
        if type(module).__name__.endswith("Loss"):
            classes.add(type(module).__module__)

    def record(loss):
        losses.append(loss.item())
        backward(loss)

    def warm_up(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            full = group.setdefault("full_rate", group["lr"])
            group["lr"] = full * len(losses) / WARM_UP

    def count(optimizer, args, kwargs):
        if len(losses) == STEPS:
            raise Enough

    backward, torch.Tensor.backward = torch.Tensor.backward, record
    nn.modules.module.register_module_forward_pre_hook(widened)
    nn.modules.module.register_module_forward_hook(name)
    register_optimizer_step_pre_hook(warm_up)
    register_optimizer_step_post_hook(count)
    if "--patch" in flags:
        import sslkern

        sslkern.train.patch("lightly")
    try:
        runpy.run_path(script, run_name="__main__")
    except Enough:
        print(json.dumps({"losses": losses, "classes": sorted(classes)}))


if __name__ == "__main__":
    main()
