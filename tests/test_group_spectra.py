"""Whitening, and the losses of spectra, over several processes against one on the joint batch in fp64."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from group_pairs import ROWS, SPECTRA, no_rows, value_and_grad
from ranks import Collectives, assert_joint, close, mine, normal, run

from sslkern.distributed import over
from sslkern.losses import frossl_loss, mmcr_loss, tico_loss, vibcreg_loss, vicregl_loss, whitening_mse_loss
from sslkern.nn import Whitening


def joint():
    """The mean of the values and the gradients of the rows, for even and uneven rows, and for ranks without rows."""
    for case, (loss, inputs) in SPECTRA.items():
        assert_joint(loss, inputs, torch.float64, case)
        assert_joint(loss, inputs, torch.float32, case, tolerance=2e-5)
        with patch("ranks.divisions", no_rows):
            assert_joint(loss, inputs, torch.float64, case)


def images():
    """VICRegL, whose matches are within each image. A view's places are the last two channels of its map."""

    def loss(a, b, c, d, group):
        features = [(a, c[..., :4]), (b, d[..., :4])]
        return vicregl_loss(features, [x[..., 4:].detach() for x in (c, d)], group=group)

    inputs = [normal(ROWS, 5), normal(ROWS, 5, seed=1), normal(ROWS, 2, 3, 6), normal(ROWS, 2, 3, 6, seed=1)]
    assert_joint(loss, inputs, torch.float64, "vicregl")


def layer():
    """`nn.Whitening`: rows of the joint result, and the same running statistics on all ranks."""
    x = normal(ROWS, 4, 2)
    for settings in ({}, {"method": "zca"}, {"method": "iterative", "groups": 2}):
        expected, alone = Whitening(4, **settings).double(), x.clone().requires_grad_()
        result = expected(alone)
        weights = normal(*result.shape, seed=3)
        (gradient,) = torch.autograd.grad((result * weights).sum(), alone)
        counts = [1] * (dist.get_world_size() - 1) + [ROWS - dist.get_world_size() + 1]
        own, found = mine(x, counts).requires_grad_(), Whitening(4, **settings, group="world").double()
        y = found(own)
        close(y, mine(result, counts), 1e-12, settings)
        (of_own,) = torch.autograd.grad((y * mine(weights, counts)).sum(), own)
        close(of_own, mine(gradient, counts), 1e-11, settings)
        close(found.running_mean, expected.running_mean, 1e-12, settings)
        close(found.running_covariance, expected.running_covariance, 1e-12, settings)


GATHERED, SCATTERED, REDUCED = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"
TRAFFIC = {
    "whitening": ([REDUCED] * 3, [REDUCED] * 2),
    "whitening, zca": ([REDUCED] * 3, [REDUCED] * 2),
    "whitening, zca by rows": ([REDUCED] * 2 + [GATHERED], [SCATTERED, REDUCED]),
    "tico": ([REDUCED], []),
    "tico by rows": ([GATHERED], []),
    "coding rate by rows": ([GATHERED], [SCATTERED]),
    "coding rate by columns": ([REDUCED], [REDUCED]),
    "mmcr by rows": ([GATHERED], [SCATTERED]),
}


def collectives():
    size = dist.get_world_size()
    for case, (forward, backward) in TRAFFIC.items():
        loss, inputs = SPECTRA[case]
        counts = [ROWS // size] * size
        own = [mine(x[: sum(counts)].float(), counts).requires_grad_() for x in inputs]
        with Collectives() as called:
            value = loss(*own, group=over(even=True))
            assert called.names == forward, (case, called.names)
            value.backward()
            assert called.names == forward + backward, (case, called.names)


A = torch.ones(4, 3)
REFUSED = {
    "vibcreg": (lambda g: vibcreg_loss(A, A[:2], group=g), ValueError, "a and b must have the same shape"),
    "tico": (lambda g: tico_loss(A, A, A, group=g), ValueError, "covariance must have shape"),
    "frossl": (lambda g: frossl_loss(A, A, others=1, group=g), TypeError, "others must be a list"),
    "mmcr": (lambda g: mmcr_loss(A, A, "x", group=g), TypeError, "lambd must be"),
    "w_size": (lambda g: whitening_mse_loss(A, A, w_size=4, group=g), ValueError, "w_size must be None with a group"),
}


def refused():
    """Bad input on one rank raises on all, and a joint batch of too few rows too."""
    for bad, error, sentence in REFUSED.values():
        if dist.get_rank() == 0:
            with pytest.raises(error, match=sentence):
                bad("world")
        else:
            with pytest.raises(RuntimeError, match="Invalid input on rank 0"):
                frossl_loss(A, A, group="world")
    few = A[: int(dist.get_rank() == 0)]
    with pytest.raises(ValueError, match="at least 2 rows"):
        vibcreg_loss(few, few, group="world")
    with pytest.raises(ValueError, match="must have more rows"):
        whitening_mse_loss(A[:1], A[:1], group="world")


def compiled():
    for case in (
        "whitening",
        "vibcreg by rows",
        "tico by rows",
        "frossl by columns",
        "coding rate by rows",
        "mmcr by rows",
    ):
        loss, inputs = SPECTRA[case]
        counts = [ROWS // 2] * 2
        own = [mine(x[: sum(counts)], counts) for x in inputs]
        torch._dynamo.reset()
        whole = torch.compile(loss, fullgraph=True, backend="eager")
        results = [value_and_grad(function, own, "world") for function in (whole, loss)]
        for found, expected in zip(*results, strict=True):
            close(found, expected, 1e-11, (case, "compiled"), scale=1e-3)


CHECKS = (joint, images, layer, collectives, refused)


@pytest.mark.parametrize(("size", "checks"), ((2, (*CHECKS, compiled)), (3, CHECKS)), ids=("2", "3"))
def test_ranks_are_one(size, checks, tmp_path):
    run(size, checks, tmp_path)
