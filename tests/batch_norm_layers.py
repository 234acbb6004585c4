"""Batch norm layers beside torch's: pairs of them, with a past, on the native back-end."""

import copy

import pytest
import torch
from conftest import running_on
from torch import nn

from sslkern.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, convert_batchnorm

PAIRS = ((BatchNorm1d, nn.BatchNorm1d, (8, 6)), (BatchNorm2d, nn.BatchNorm2d, (4, 6, 5, 3)),
         (BatchNorm3d, nn.BatchNorm3d, (2, 6, 3, 2, 4)), (SyncBatchNorm, nn.SyncBatchNorm, (8, 6)))  # fmt: skip
LAYERS = pytest.mark.parametrize("ours, theirs, shape", PAIRS, ids=[p[1].__name__ for p in PAIRS])
ACTIVATIONS = pytest.mark.parametrize("activation", (None, "relu"))
BATCH_NORM = nn.modules.batchnorm._BatchNorm


@pytest.fixture(autouse=True)
def native():
    with running_on("native"):
        yield


def used(layer, shape, steps=3):
    """After some training, with parameters and statistics of no particular value."""
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    for _ in range(steps):
        layer(torch.randn(shape) + 1)
    return layer


def own(layer):
    """The batch norm itself."""
    return layer[0] if isinstance(layer, nn.Sequential) else layer


def torchs(layer):
    """The same in torch's layers."""
    return convert_batchnorm(copy.deepcopy(layer), back=True)


def agree(one, other, x, exactly=False):
    close = {"rtol": 0, "atol": 0} if exactly else {}
    torch.testing.assert_close(one(x), other(x), **close)


IMAGES = (4, 3, 8, 8)
