"""Comparison of a loss of `sslkern.train.compat` with its peer, or with the peer's formula, on one or more ranks."""

import torch
import torch.distributed as dist
from ranks import TOLERANCE, close, mean_over_ranks, normal

from bench.gathered import gathered_rows


def rows_of_all(x):
    """The rows of all ranks, whose backward adds up the gradients of all; x itself where torch.distributed is off."""
    return gathered_rows(x) if dist.is_initialized() else x


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


class Case:
    """A call of a loss: its name, the shapes of its tensors, what else they are, and its settings.

    `make(tensors)` turns the tensors into arguments. Tensors named in `fixed` need no gradient.
    """

    def __init__(self, name, *shapes, make=None, fixed=(), alone=(), init=(), **settings):
        self.name, self.shapes, self.fixed, self.alone = name, shapes, fixed, alone
        self.make = make or (lambda *tensors: tensors)
        self.init, self.settings = init, settings

    def __repr__(self):
        settings = ", ".join(f"{k}={v}" for k, v in self.settings.items() if isinstance(v, int | float | bool))
        return f"{self.name}{self.shapes}{settings}{[x for x in self.init if isinstance(x, int | float)] or ''}"

    def tensors(self, dtype, seed):
        """Leaves in a dtype. On several ranks the rows differ, but for the tensors in `alone`, which ranks share."""
        leaves = []
        for k, shape in enumerate(self.shapes):
            other = 0 if k in self.alone else 100 * rank()
            leaf = normal(*shape, seed=seed + 7 * k + other).to(dtype)
            leaves.append(leaf.requires_grad_(k not in self.fixed))
        return leaves


def results(value):
    """The tensors with a gradient, and the numbers, that a loss returns."""
    if isinstance(value, dict):
        return results(tuple(value.values()))
    if isinstance(value, tuple | list):
        return [x for part in value for x in results(part)]
    return [value]


def _weighted(x):
    """The sum of the elements, each with a weight of its own."""
    return x if x.dim() == 0 else x.flatten() @ torch.linspace(1, 2, x.numel(), dtype=x.dtype)


def outcome(function, case, leaves):
    """What a loss returns, and the gradients of a weighted sum of it."""
    found = results(function(*case.make(*leaves), **case.settings))
    weighted = [
        _weighted(x) * (1 + 0.3 * k) for k, x in enumerate(found) if isinstance(x, torch.Tensor) and x.requires_grad
    ]
    wanted = {k: leaf for k, leaf in enumerate(leaves) if leaf.requires_grad}
    grads = torch.autograd.grad(sum(weighted), list(wanted.values()), allow_unused=True)
    return [torch.as_tensor(x) for x in found], dict(zip(wanted, grads, strict=True))


def assert_equal(ours, theirs, case, dtype=torch.float64, seed=0):
    """Value and gradient of `ours` in a dtype against `theirs` in fp64, on this rank.

    In float32 the error may be 4 times that of `theirs` in float32, where that is more than the tolerance.
    """
    leaves = case.tensors(dtype, seed)
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    tolerance = TOLERANCE[dtype] + 8 * torch.finfo(dtype).eps
    values, grads = outcome(ours, case, leaves)
    expected, wanted = outcome(theirs, case, exact)
    plain = (expected, wanted) if dtype == torch.float64 else outcome(theirs, case, leaves)
    assert len(values) == len(expected), case
    for k, (value, e, p) in enumerate(zip(values, expected, plain[0], strict=True)):
        assert value.shape == e.shape, (case, k, value.shape, e.shape)
        _close(value, e, p, tolerance, (case, dtype, "value", k), scale=1.0)
    for k, e in wanted.items():
        found, p = grads[k], plain[1][k]
        assert (found is None) == (e is None), f"{case}: gradient {k} is {found} instead of {e}"
        if e is not None:
            if k in case.alone and dist.is_initialized():  # DistributedDataParallel takes the mean over the ranks
                found, e = mean_over_ranks(found), mean_over_ranks(e)
            _close(found, e, p, tolerance, (case, dtype, "gradient", k), scale=0.1 if dtype == torch.float64 else 1.0)


def _close(found, expected, plain, tolerance, case, scale):
    size = max(float(expected.detach().abs().max()), scale)
    error = float((plain.detach().double() - expected.detach().double()).abs().max())
    close(found, expected, max(tolerance, 4 * error / size), case, scale)
