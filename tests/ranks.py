"""Several processes over gloo, and the same on their joint batch in one: what tests of a `group` share."""

import traceback
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from multiprocessing import set_forkserver_preload
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

import sslkern

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
# Neither asks for a GPU, whose driver does not outlive a fork
COSTLY = ["torch._dynamo.backends.debugging", "torch._inductor.compile_fx"]


@contextmanager
def forked():
    """`torch.multiprocessing.spawn` forks from this process's server, which has imported what is costly and nothing of
    the tests' own: a rank starts in a tenth of the time."""
    set_forkserver_preload(COSTLY)
    with patch("torch.multiprocessing.spawn", partial(start_processes, start_method="forkserver")):
        yield


def run(size, checks, folder, backend=None, timeout=60):
    """All checks, one after the other, in each of `size` processes, on a back-end if one is named.

    They must be importable functions without arguments; what fails is printed, since the parent shows one traceback.
    """
    with forked():
        torch.multiprocessing.spawn(_child, (size, folder / f"store{size}", checks, backend, timeout), nprocs=size)


def _child(rank, size, store, checks, backend, timeout):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    for check in checks:
        try:
            with sslkern.backend.use(backend) if backend else nullcontext():
                check()
        except BaseException:
            print(
                f"rank {rank} of {size}, {backend or 'any back-end'}, {check.__name__}:\n{traceback.format_exc()}",
                flush=True,
            )
            raise
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """The names of the collectives that were called inside."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional") and "wait_tensor" not in str(function):
            self.names.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


def normal(*shape, seed=0, dtype=torch.float64):
    """fp64 numbers rounded to a dtype, off zero, the same on all ranks."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


@contextmanager
def default_dtype(dtype):
    """torch's default dtype, in which losses draw random directions."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def divisions(rows):
    """Counts of rows for the ranks of the group: even where it can be, uneven, and all but one on one rank."""
    size = dist.get_world_size()
    even = [rows // size + (r < rows % size) for r in range(size)]
    uneven = [1] * (size - 1) + [rows - size + 1]
    return (even, uneven, uneven[::-1])


def mine(joint, counts, dim=0):
    """This rank's rows of a joint batch."""
    return joint.split(counts, dim)[dist.get_rank()].contiguous()


def mean_over_ranks(value):
    """Of a tensor of the same shape on all ranks."""
    value = value.detach().double().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def close(found, expected, tolerance, case, scale=0.0):
    """To the tolerance, in units of the largest number expected, or of the scale where that is more."""
    if expected.numel() > 0:
        limit = tolerance * max(float(expected.detach().abs().max()), scale)
        error = float((found.detach().double() - expected.detach().double()).abs().max())
        assert error <= limit, f"{case}: error {error:.1e}, limit {limit:.1e}"


def assert_joint(loss, inputs, dtype, case, group="world", dim=0, tolerance=None):
    """loss(*inputs, group=None) of the joint batch in fp64, against the ranks: the mean of their values, and each one's
    gradient of its rows, which a mean over ranks divides by their number; for all `divisions` of the rows."""
    tolerance = tolerance or TOLERANCE[dtype]
    leaves = [x.detach().to(dtype).double().requires_grad_(x.is_floating_point()) for x in inputs]
    leaves = [leaf if x.is_floating_point() else x for leaf, x in zip(leaves, inputs, strict=True)]
    expected = loss(*leaves, group=None)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(expected, wanted)
    for counts in divisions(inputs[0].shape[dim]):
        own = [mine(x, counts, dim).to(dtype) if x.is_floating_point() else mine(x, counts, dim) for x in inputs]
        own = [x.requires_grad_(x.is_floating_point()) for x in own]
        value = loss(*own, group=group)
        close(mean_over_ranks(value), expected, tolerance, (case, counts, dtype, "value"), scale=1.0)
        found = torch.autograd.grad(value, [x for x in own if x.requires_grad])
        for k, (f, e) in enumerate(zip(found, gradients, strict=True)):
            scale = float(e.abs().max())
            f = f.double() / dist.get_world_size()
            close(f, mine(e, counts, dim), tolerance, (case, counts, dtype, f"gradient {k}"), scale=scale)
