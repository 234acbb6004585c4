"""Faults that the walk on fake CUDA tensors must find, each with words of what it then says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from support import A, D, Subject
from support_layers import SUBJECTS
from torch import Tensor
from torch.autograd import Function

from sslkern import backend
from sslkern.ops import rank_k_update_


@dataclass(frozen=True)
class Fault:
    call: Callable  # a function of a tensor (6, D); or a launcher of `covariance_fwd`, which gets the right one first
    said: str
    launcher: bool = False

    def given(self) -> tuple[Subject, dict[str, Callable] | None]:
        """A subject with the fault, and the launchers that it runs on."""
        if not self.launcher:
            return Subject("a fault", "Faults", self.call, self.call, (A,)), None
        right = sys.modules["fake_launches"].LAUNCHERS
        return SUBJECTS["covariance"], right | {
            "covariance_fwd": lambda *args: self.call(right["covariance_fwd"], *args)
        }


def in_backward(fault: Callable) -> Callable:
    class Faulty(Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return fault(grad)

    return Faulty.apply


def masked(x: Tensor) -> Tensor:
    y = x.detach().clone()
    y[y > 0] = 1
    return y


def drawn(x: Tensor, device: str | torch.device) -> Tensor:
    return x + torch.randn(x.shape, generator=torch.Generator(device), device=x.device)


def with_launch(**stubs: Callable) -> Callable:
    """A launcher that runs with other functions in `triton_kernels.launch`."""

    def launcher(right: Callable, *args) -> tuple:
        with patch.multiple(sys.modules["sslkern.triton_kernels.launch"], **stubs):
            return right(*args)

    return launcher


def workspace_on_cpu(z: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def reads(right: Callable, z: Tensor, *args) -> tuple:
    return right(z / z.abs().max().item(), *args)


def doubles(right: Callable, *args) -> tuple:
    variance, *rest = right(*args)
    return variance.double(), *rest


def launches(grid: tuple[int, ...], **options: int) -> Callable:
    """A launcher that launches one kernel more."""

    def launcher(right: Callable, z: Tensor, *args) -> tuple:
        kernel = sys.modules["sslkern.triton_kernels.gemm"].split_kernel
        with torch.cuda.device(z.device):
            kernel[grid](z, z, 0, 0, 0, 1, PLANES="f", COLS=128, **options)
        return right(z, *args)

    return launcher


def by_formula(x: Tensor) -> Tensor:
    """The formula has torch.linalg.solve in it."""
    u = torch.linalg.qr(x.detach()[:D]).Q
    with backend.use("reference"):
        return rank_k_update_(u, 0.1 * u[:, :2], u[:, 2:4], "direct")


def transposes(right: Callable, *args) -> tuple:
    *first, gram, row_sq = right(*args)
    return *first, gram.mT, row_sq


FAULTS = {
    "a helper on the CPU": Fault(lambda x: x @ torch.zeros(D, D), "mm has tensors on cpu and cuda:1"),
    "a helper on the CPU, in the backward": Fault(
        in_backward(lambda g: g @ torch.zeros(D, D)), "mm has tensors on cpu and"
    ),
    "a scalar on the CPU": Fault(lambda x: x * torch.ones(()), "mul has tensors on cpu and cuda:1"),
    "a helper on the current device": Fault(
        lambda x: x + torch.zeros(D, device=x.device.type), "add has tensors on cuda:0 and"
    ),
    "item": Fault(lambda x: x * x.sum().item(), "_local_scalar_dense reads a number"),
    "item, in the backward": Fault(in_backward(lambda g: g * g.sum().item()), "_local_scalar_dense reads a number"),
    "a branch": Fault(lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense reads a number"),
    "data of the host": Fault(lambda x: x * torch.tensor([1.0] * D, device=x.device), "_to_copy has tensors on cpu"),
    "a copy to the host": Fault(lambda x: x * x.detach().cpu().to(x.device), "_to_copy has tensors on cpu and cuda:1"),
    "a copy into": Fault(lambda x: x + torch.empty_like(x).copy_(torch.ones(6, D)), "copy_ has tensors on cpu and"),
    "a result on the host": Fault(lambda x: x.cpu(), "a result is float32 (6, 5) on cpu, not cuda:1"),
    "a formula that waits": Fault(by_formula, "_linalg_check_errors checks on the host"),
    "a selection": Fault(lambda x: x[x > 0], "index counts what its mask has"),
    "a mask": Fault(masked, "index_put_ counts what its mask has"),
    "unique": Fault(lambda x: x.unique(), "_unique2 has as many results"),
    "equal": Fault(lambda x: x if torch.equal(x, x) else 2 * x, "equal compares on the host"),
    "where": Fault(lambda x: torch.where(x > 0)[0], "nonzero has as many results"),
    "repeat": Fault(lambda x: x.repeat_interleave(x.new_ones(6, dtype=torch.int64), 0), "repeat_interleave sums"),
    "a generator on the CPU": Fault(lambda x: drawn(x, "cpu"), "on cuda:1 and a generator on cpu"),
    "a generator of its own": Fault(lambda x: drawn(x, x.device), "draws from a generator of its own"),
    "a dtype": Fault(lambda x: x.double() if x.is_cuda else x, "gives ['float64 (6, 5)'"),
    "check_errors": Fault(lambda x: torch.linalg.inv_ex(x.mT @ x, check_errors=True)[0], "linalg_inv_ex checks"),
    "a launcher's workspace on the CPU": Fault(with_launch(workspace=workspace_on_cpu), "on cpu", True),
    "a launch on the current device": Fault(
        with_launch(on_device=lambda z: nullcontext()), "is launched on cuda:0 with", True
    ),
    "a grid that is empty": Fault(launches((0,)), "split_kernel is launched on a grid of (0,)", True),
    "a grid that is too large": Fault(launches((1, 2**16)), "is launched on a grid of (1, 65536)", True),
    "an option that is misspelt": Fault(launches((1,), num_wraps=1), "split_kernel has no parameters", True),
    "a launcher that reads": Fault(reads, "_local_scalar_dense reads a number", True),
    "a launcher's dtype": Fault(doubles, "covariance_fwd returns", True),
    "a launcher's strides": Fault(transposes, "covariance_fwd returns", True),
}
ON_THE_HOST = {  # other operators that wait for the device
    "allclose": lambda x: torch.allclose(x, x),
    "bincount": lambda x: x.detach().long().flatten().abs().bincount(),
    "histc": lambda x: x.detach().histc(),
    "linalg_lstsq": lambda x: torch.linalg.lstsq(x.detach(), x.detach()).solution,
    "linalg_matrix_exp": lambda x: torch.linalg.matrix_exp(x.mT @ x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "multinomial": lambda x: x.detach().abs().multinomial(2),
    "nanmedian": lambda x: x.nanmedian(),
    "nonzero": lambda x: x.nonzero(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "unique_dim": lambda x: x.unique(dim=0),
}
FAULTS |= {name: Fault(call, f"{name} ") for name, call in ON_THE_HOST.items()}
SYNCHRONIZES = "this function synchronizes that device with the CPU"
TENSORS = {"solve": 1}  # more matrices that a function of torch.linalg takes


def of_linalg(name: str) -> Callable:
    function = getattr(torch.linalg, name)
    return lambda x: function(x.detach().mT @ x.detach(), *[x.detach().mT] * TENSORS.get(name, 0))


# what torch's own documentation says of its functions, of which HOST must know the operators
LINALG = {
    f"torch.linalg.{name}": Fault(of_linalg(name), "checks on the host")
    for name in dir(torch.linalg)
    if SYNCHRONIZES in (getattr(torch.linalg, name).__doc__ or "")
}
FAULTS |= LINALG
