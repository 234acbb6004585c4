"""The mean over ranks of the gradients of a weight, from the factors of each rank.

The gradient of rank r is P_r = dy_r' x_r, for n_r of the N rows of the joint batch. There are two ways to the mean:

    gather    all ranks get all factors. A rank receives (N - n) (p + q) numbers and multiplies N rows, when its
              optimizer takes the step
    reduce    each rank forms its P_r, and these are summed. A rank receives 2 (W - 1) / W p q numbers and multiplies n
              rows

Received numbers and products are weighed by how many products a device does while it receives a number: on a CPU, about
as many as in processes of one machine (`python -m bench.exchange --time`); on a GPU, by an estimate. With W ranks,
factors are gathered up to N - n = 2 (W - 1) / W `_PRODUCTS` rows of other ranks, and to fewer where p and q are small:
from 200 to 400 on a CPU and from 4000 to 8000 on a GPU. Factors of more rows than the gradient may keep, min(p, q) / 4,
are not gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .agreement import rows_of_all
from .collectives import Peers, gather_rows, start_sum
from .factored_gradient import FactoredGradient
from .factored_tensor import FactoredTensor

_PRODUCTS = {"cpu": 200, "cuda": 4000}  # multiplications and additions in the time in which a number arrives


def gathers(counts: tuple[int, ...], w: Tensor, most: int, device: str | None = None) -> bool:
    """Whether the factors are gathered, for ranks with so many rows and a gradient of at most `most` rows, on the
    device type of w or another one. All ranks decide alike, for the rank that receives most."""
    q, p = w.shape
    device = w.device.type if device is None else device
    others = sum(counts) - min(counts)
    products = _PRODUCTS.get(device, _PRODUCTS["cuda"])
    gathered = others * (p + q) + others * p * q / products
    return sum(counts) <= most and gathered <= 2 * (len(counts) - 1) / len(counts) * p * q


def mean_gradient(w: Tensor, dy: Tensor, x: Tensor, most: int, peers: Peers) -> FactoredTensor:
    """The mean of the gradients dy' x of a weight w (q, p) over the ranks: factored, or formed.

    Ranks may have different numbers of rows N of dy (N, q) and x (N, p). The sum is in the same order on all ranks, so
    weights that start equal stay equal.
    """
    counts = rows_of_all(peers, lambda: (dy,), dim=0)[0][0]
    together = gathers(counts, w, most)
    if together:
        dy, x = (gather_rows(t, counts, peers, 0) for t in (dy, x))
    grad = FactoredGradient.of(w, dy, x, most=most)
    grad.mul_(1 / peers.size)
    if not together:  # the rest of the backward runs while the ranks sum
        grad.form_then_(lambda formed: start_sum(formed, peers.name))
    return grad


def mean_gradient_by_name(
    w: Tensor, dy: Tensor, x: Tensor, most: int, name: str, size: int, rank: int, transport: str, even: bool
) -> Tensor:
    """The same as a matrix, with the fields of the `Peers` as an operator takes them."""
    dtype = getattr(torch, transport) if transport else None
    return mean_gradient(w, dy, x, most, Peers(name, size, rank, dtype, even)).form_()
