"""The CUDA kernels of batch norm on the CPU's simulator: every order of threads, and a barrier that is missing."""

import pytest
import torch
from batch_norms import ORDERS, data
from simulator import Unavailable
from simulator import batch_norm as simulated


def simulated_outputs(without=None):
    """Of all kernels, over columns and planes in several splits, in every order: a list per order, or the error."""
    found = []
    for order in ORDERS:
        outputs = []
        for shape in ((700, 36), (700, 3, 8)):
            x, (weight, bias, *_), dy = data(shape, torch.float32)
            pick = simulated.kernels(order, 1, without)
            try:
                y, centre, variance = pick("batch_norm_fwd", x)(x, weight, bias, None, None, 0.0, 1e-5, True)
                outputs += [y, centre, variance]
                outputs += pick("batch_norm_bwd", x)(dy, x, weight, bias, centre, variance, 1e-5, True)
            except RuntimeError as error:
                outputs.append(error)
        found.append(outputs)
    return found


def same(one, other):
    return len(one) == len(other) and all(
        isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


def test_every_order_of_threads_gives_the_same_bits():
    """Ascending, descending and random; the blocks' order as well."""
    try:
        first, *others = simulated_outputs()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not any(t.isnan().any() for t in first) and all(same(first, other) for other in others)


def test_a_missing_barrier_is_seen():
    """Without the kernels' one barrier some order gives other numbers or an error."""
    try:
        right = simulated_outputs()[0]
        wrong = simulated_outputs(without=0)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not all(same(right, other) for other in wrong)
