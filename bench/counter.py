"""Flops, bytes that collectives deliver, and live memory, counted call by call."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from .run import allocated


def _pairs(told: dict[str, Any]) -> tuple[int, int, float]:
    """Numbers of rows times rows; columns; and 1, or 1/2 where y is x and each pair is computed once."""
    x, y = told["x"], told.get("y")
    z = x if y is None else y
    return prod(x.shape[:-2]) * x.shape[-2] * z.shape[-2], x.shape[-1], 0.5 if y is None else 1.0


def _pairwise(told: dict[str, Any], forward: bool) -> float:
    """Products of a pass over pairs: similarities, in both passes, what they multiply, and gradients by each side."""
    pairs, d, share = _pairs(told)
    p = 0 if told.get("rhs") is None else told["rhs"].shape[-1]
    if forward:
        return 2 * pairs * (share * d + p)
    own = told.get("y") is None
    sides = told.get("need_x", True) + (told.get("need_y", False) and not own)
    return 2 * pairs * (share * d + p + sides * d + told.get("need_rhs", False) * p)


def _contrastive(told: dict[str, Any]) -> float:
    """The similarities, once, and a product for each gradient of rows. Views are compared with each other as one side,
    of which each pair is computed once; the gradient of either needs that of both."""
    x, y = told["x"], told["y"] if told["bank"] is None else told["bank"]
    need_x, need_y = told["need_x"] or told["need_scale"], told["need_y"] and told["bank"] is None
    if told["views"]:
        return 2 * 4 * x.numel() * x.shape[-2] * (0.5 + (need_x or need_y))
    return 2 * x.numel() * y.shape[-2] * (1 + need_x + need_y)


def _low_rank(told: dict[str, Any]) -> float:
    """The model, and a product for each gradient."""
    return 2.0 * told["m"].numel() * told["u"].shape[-1] * (1 + told["need_u"] + told["need_v"])


def _projections(told: dict[str, Any], products: int) -> float:
    """Products of the rows with all directions."""
    return 2.0 * products * told["z"].numel() * told["directions"].shape[-1]


def _columns(told: dict[str, Any], products: int) -> float:
    """Each 2 N D min(N, D), by whichever form was chosen."""
    z = told["z"] if "z" in told else told["a"]
    n, d = z.shape[-2:]
    return 2.0 * products * z.numel() * (n if told["dual"] else d)


KERNELS: dict[str, Callable[[dict[str, Any]], float]] = {
    "pairwise_logsumexp_fwd": lambda told: _pairwise(told, True),
    "pairwise_logsumexp_bwd": lambda told: _pairwise(told, False),
    "pairwise_matmul_fwd": lambda told: _pairwise(told, True),
    "pairwise_matmul_bwd": lambda told: _pairwise(told, False),
    "pairwise_argmax": lambda told: _pairwise(told, True),
    "pairwise_gram_fwd": lambda told: _pairwise(told, True),
    "pairwise_gram_bwd": lambda told: _pairwise(told, False),
    "contrastive_fwd": lambda told: _contrastive(told),
    "low_rank_residual": lambda told: _low_rank(told),
    "characteristic_sums_fwd": lambda told: _projections(told, 1),
    "characteristic_sums_bwd": lambda told: _projections(told, 1 if told["projections"].numel() else 2),
    "covariance_fwd": lambda told: _columns(told, 1),
    "covariance_bwd": lambda told: _columns(told, 1),
    "vicreg_fwd": lambda told: _columns(told, 2),
    "vicreg_bwd": lambda told: _columns(told, 2),
    "cross_correlation_fwd": lambda told: _columns(told, 2 if told["dual"] else 1),
    "cross_correlation_bwd": lambda told: _columns(told, 2),
    "batch_moments_fwd": lambda told: 0.0,
    "factored_linear_fwd": lambda told: 2.0 * told["x"].shape[0] * told["w"].numel(),
    "factored_linear_bwd": lambda told: 2.0 * told["dy"].shape[0] * told["w"].numel(),
    "matrix_product": lambda told: 2.0 * told["x"].shape[0] * told["w"].numel(),
    "factored_momentum_": lambda told: 2.0 * told["x"].shape[0] * told["w"].numel(),
    "factored_adam_": lambda told: 2.0 * told["x"].shape[0] * told["w"].numel(),
}


def flops_of(function: Any, args: tuple, kwargs: dict, out: Any) -> float:
    """Of matrix products, a multiplication and an addition being 2; those of our kernels by what they multiply."""
    if function.namespace.startswith("sslkern_"):
        told = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        return KERNELS[function._schema.name.split("::")[1]](told)
    name = function._schema.name
    if name in ("aten::mv", "aten::dot"):
        return 2.0 * args[0].numel()
    if name == "aten::addmv":
        return 2.0 * args[1].numel()
    formula = flop_registry.get(function._overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


def _size(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


OF_FIRST = ("allgather", "allgather_base", "reduce_scatter_tensor", "alltoall", "alltoall_base", "all_to_all_single")


def received_of(function: Any, args: tuple, out: Any) -> float:
    """Bytes that reach a rank of W, as rings pass them: (W - 1)/W of what a gather puts out, of what is scattered after
    a sum, and of what all exchange; and twice that of what is summed for all."""
    if function.namespace not in ("c10d", "_c10d_functional"):
        return 0.0
    name = function._schema.name.split("::")[1].rstrip("_").lstrip("_")
    part = (dist.get_world_size() - 1) / dist.get_world_size()
    if name in ("wait_tensor", "barrier"):
        return 0.0
    if name == "all_gather_into_tensor":
        return part * _size(out)
    if name in ("reduce_scatter", "reduce_scatter_base"):
        return part * _size(args[1])
    if name in (
        "allgather",
        "allgather_base",
        "reduce_scatter_tensor",
        "alltoall",
        "alltoall_base",
        "all_to_all_single",
    ):
        return part * _size(args[0])
    if name in ("allreduce", "all_reduce"):
        return 2 * part * _size(args[0])
    raise NotImplementedError(f"no size is known for the collective {function}")


def taken(function: Any, args: tuple, kwargs: dict) -> int:
    """Bytes that a kernel of ours takes at most, workspace and results: of a call with other numbers in its tensors,
    since work is cut by their shapes alone."""

    def other(t: Any) -> Any:
        return torch.ones(t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t

    with _disable_current_modes():
        args, kwargs = tree_map(other, (args, kwargs))
        return allocated(lambda: function(*args, **kwargs))[0]


class Counter(TorchDispatchMode):
    """Flops, bytes received and the peak of live memory beside `known` tensors, of what runs inside.

    What torch's own kernels take for themselves is not seen. What ours take is found by running them; without `peaks`,
    they are not run.
    """

    def __init__(self, *known: Tensor, peaks: bool = True) -> None:
        super().__init__()
        self._peaks = peaks
        self.flops = self.received = 0.0
        self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if "wait_tensor" in function.name():
            out = args[0]  # it is, but for a simulated one
        if self._peaks and function.namespace.startswith("sslkern_"):
            self._sweep()
            self.peak = max(self.peak, self._now() + taken(function, args, kwargs or {}))
        self.flops += flops_of(function, args, kwargs or {}, out)
        self.received += received_of(function, args, out)
        self._see(out)
        return out

    def _sweep(self) -> None:
        self._live = {key: live for key, live in self._live.items() if not live[0].expired()}

    def _now(self) -> int:
        return sum(size for _, size in self._live.values())

    def _see(self, out: Any) -> None:
        self._sweep()
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self._known:
                storage = t.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self._now())

    def counts(self) -> dict[str, float]:
        return {"flops": self.flops, "bytes": self.received, "peak_bytes": self.peak}
