"""The exact gradient of a large batch, computed in the memory of one chunk."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.autograd import first_order
from ..core.internals import Sharded, forward_mode, not_compiled, transforms_active
from ._replay import Summed, Synced
from ._view import View


def large_batch(backbone: nn.Module, /, *views: Any, chunk_size: int, **kwargs: Any) -> Any:
    """Compute backbone(view) for each view, with exact gradients, in the memory of one chunk of `chunk_size` samples.

        f = backbone(x)  ->  f = large_batch(backbone, x, chunk_size=64)

    The backbone runs chunk by chunk without grad, and only its outputs are kept. Whatever follows, such as a
    projector with batch norm and any loss, sees the whole batch. The backward runs each chunk again, with grad and with
    the same random numbers, autocast settings, training flags and buffers. It then applies the part of the gradient
    that belongs to this chunk:

        dL/dtheta = sum_chunks (df_chunk/dtheta)' dL/df_chunk

    The cost is one more forward of the backbone. The graph is an ordinary one, so GradScaler and any loss or optimizer
    work unchanged. Each parameter gets its gradient once per step, so DistributedDataParallel reduces it once. Buffers
    and the random stream advance as in a single forward over the chunks. Without grad, nothing runs twice.

    Layers that mix samples inside the backbone see one chunk, not the batch. For example, a batch norm normalises each
    chunk by itself. For the gradient of the full batch, use LayerNorm, GroupNorm or frozen statistics. Random numbers
    of Python and numpy are not replayed. Gradients reach the parameters of the backbone, the views and the tensors in
    `kwargs`, but no other tensors that the forward of the backbone uses. Module hooks run in both passes.

    Args:
        backbone: a module. It may be compiled, use non-reentrant checkpointing, or be wrapped in
            DistributedDataParallel. A compiled step that calls this function leaves the backbone as it is. The backbone
            may also be sharded by `torch.distributed.fsdp.fully_shard` as a root of its own. Then all views share one
            backward, and every rank must have the same number of chunks, because every chunk gathers parameters.
        views: each is a tensor (N, ...) or a tuple of positional arguments. Tensors are cut along dim 0 and must have
            the same N within a view. Other arguments are passed unchanged. Views may differ in N and in everything
            else.
        chunk_size: the largest number of samples in a chunk. There are ceil(N / chunk_size) chunks, whose sizes differ
            by at most one.
        kwargs: passed to every call of the backbone, without being cut.

    Returns:
        The output for a single view, or a tuple with the outputs of several views. An output is a tensor (N, ...), or
        any pytree of such tensors.

    Raises:
        TypeError, ValueError: an argument is invalid, or an output is not a pytree of tensors with one row per sample.
        RuntimeError: the call is inside a transform of torch.func. In the backward: parameters were changed or replaced
        since the forward, the backbone uses reentrant checkpointing, or a second derivative is requested.

    Source: Gao, Zhang, Han, Callan, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
    (2101.06983).
    """
    outputs = _outputs(backbone, views, chunk_size, kwargs)
    return outputs[0] if len(outputs) == 1 else outputs


class LargeBatch(nn.Module):
    """`large_batch` of one view as a module.

    LargeBatch(backbone, 64)(*args, **kwargs) takes the place of backbone(*args, **kwargs). The attribute `module` is
    the backbone. The errors are the same as for `large_batch`.
    """

    def __init__(self, backbone: nn.Module, chunk_size: int) -> None:
        super().__init__()
        _check(backbone, chunk_size)
        self.module = backbone
        self.chunk_size = chunk_size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _outputs(self.module, (args,), self.chunk_size, kwargs, ("args",))[0]

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"


@not_compiled
def _outputs(
    backbone: nn.Module, views: tuple[Any, ...], chunk_size: int, kwargs: dict[str, Any], names: tuple[str, ...] = ()
) -> tuple[Any, ...]:
    """The outputs of the backbone for every view. Error messages call the views `names`, by default views[k]."""
    _check(backbone, chunk_size)
    if transforms_active() or forward_mode():
        raise RuntimeError(
            "large_batch runs its backbone twice, which torch.func cannot follow: use backward or torch.autograd.grad."
        )
    if not views:
        raise ValueError("views must be at least one tensor or tuple of arguments, got none.")
    names = names or tuple(f"views[{k}]" for k in range(len(views)))
    runs = [View(backbone, name, view, chunk_size, kwargs) for name, view in zip(names, views, strict=True)]
    if isinstance(backbone, DistributedDataParallel):
        return _through_ddp(backbone, views, chunk_size, kwargs)
    params = [p for p in backbone.parameters() if p.requires_grad]
    for run in runs:
        run.keep = torch.is_grad_enabled() and any(t.requires_grad for t in run.tensors + params)
    groups = _sharded(backbone)
    for run in runs:
        run.watched = () if groups else params
    if groups and any(run.keep for run in runs):
        for run in runs:
            run.keep = True
        dummy = torch.empty(0, requires_grad=True)  # hooks of the sharded parameters set their gradients
        return _apply(runs, Synced(groups), [dummy])
    backward = Summed(params)
    return tuple(
        _apply([run], backward, params)[0] if run.keep else run.unflatten(run.first_pass(run.tensors)) for run in runs
    )


def _check(backbone: object, chunk_size: object) -> None:
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}.")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"chunk_size must be an int, got {type(chunk_size).__name__}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    inside = [m for m in backbone.modules() if m is not backbone]
    if isinstance(backbone, DistributedDataParallel):
        if backbone.mixed_precision is not None:
            raise ValueError("backbone must not use DistributedDataParallel's mixed_precision; use torch.autocast.")
    elif any(isinstance(m, DistributedDataParallel) for m in inside):
        raise ValueError("backbone must not contain a DistributedDataParallel; wrap all of it, or the model around it.")
    old = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if old and any(isinstance(m, old) for m in backbone.modules()):
        raise ValueError("backbone must not be a FullyShardedDataParallel; use torch.distributed.fsdp.fully_shard.")


def _through_ddp(ddp: Any, views: tuple[Any, ...], chunk_size: int, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Run all chunks of all views in one forward of DistributedDataParallel, so that it reduces gradients once."""
    inner = ddp.module
    ddp.module = _All(inner, chunk_size)
    try:
        return ddp(*views, **kwargs)
    finally:
        ddp.module = inner


class _All(nn.Module):
    """A module whose forward runs the backbone on all views."""

    def __init__(self, backbone: nn.Module, chunk_size: int) -> None:
        super().__init__()
        self.backbone, self.chunk_size = backbone, chunk_size

    def forward(self, *views: Any, **kwargs: Any) -> tuple[Any, ...]:
        return _outputs(self.backbone, views, self.chunk_size, kwargs)


def _sharded(backbone: nn.Module) -> list[Any]:
    """The `fully_shard` parameter groups in a backbone. There are none if torch's FSDP module was never imported."""
    kind: Any = Sharded.kind()
    groups: list[Any] = []
    roots: set[str] = set()
    for name, module in backbone.named_modules():
        if isinstance(module, kind):
            sharded = Sharded(module)
            groups += [group for group in sharded.groups if group not in groups]
            if not any(name.startswith(root) for root in roots):
                roots.add(f"{name}." if name else "")
                if sharded.inside_another:
                    raise ValueError(
                        "backbone must be sharded as a root of its own, got one that belongs to a larger sharded "
                        "module; call fully_shard on the backbone and on what follows it, and not on both together."
                    )
    return groups


def _apply(runs: list[View], backward: Summed | Synced, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Run all views under one node of the autograd graph, and return the outputs of each view."""
    tensors = [t for run in runs for t in run.tensors]
    for run in runs:
        run.tensors = []  # the node saves them, so autograd frees them and detects in-place changes
    outputs = list(_Replayed.apply(runs, backward, len(tensors), *tensors, *inputs))
    return tuple(run.unflatten([outputs.pop(0) for _ in range(run.output_spec.num_leaves)]) for run in runs)


class _Replayed(torch.autograd.Function):
    """The node of `large_batch` in the autograd graph. Its inputs are the tensors of all views, then the parameters."""

    @staticmethod
    def forward(
        ctx: Any, runs: list[View], backward: Summed | Synced, count: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.runs, ctx.replayer = runs, backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:count])
        remaining = list(inputs[:count])
        outputs = [o for run in runs for o in run.first_pass([remaining.pop(0) for _ in run.places])]
        ctx.mark_non_differentiable(*(o for o in outputs if not (o.is_floating_point() or o.is_complex())))
        backward.nodes.append(weakref.ref(ctx))
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, remaining = list(ctx.saved_tensors), list(grads)
        found: list[Any] = []
        jobs = [
            (run, [tensors.pop(0) for _ in run.places], [remaining.pop(0) for _ in range(run.output_spec.num_leaves)])
            for run in ctx.runs
        ]
        used = [run for run, _, wanted in jobs if any(g is not None for g in wanted)]
        for run in used:
            run.check_parameters()
        with ctx.replayer as backward:
            for run, own, wanted in jobs:
                backward.final = run in used[-1:]
                found += run.replay(own, wanted, backward) if run in used else [None] * len(own)
        return None, None, None, *found, *backward.gradients(ctx)
