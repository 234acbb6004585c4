"""The exact gradient of a large batch in the memory of a chunk."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._torch import Sharded, forward_mode, not_compiled, pytree, transforms_active, version
from ..ops._autograd import first_order
from ._replay import Buffers, Summed, Synced, Total, autocast, devices, random_state, training


def large_batch(backbone: nn.Module, /, *views: Any, chunk_size: int, **kwargs: Any) -> Any:
    """backbone(view) for each view, with the exact gradient and the memory of one chunk of `chunk_size` samples.

        f = backbone(x)  ->  f = large_batch(backbone, x, chunk_size=64)

    The backbone runs chunk by chunk without grad, and only its outputs are kept; what follows, a projector with batch
    norm or any loss, sees the whole batch. In the backward each chunk runs again, with grad and with the same random
    numbers, autocast, training flags and buffers, and takes its slice of the gradient:

        dL/dtheta = sum_chunks (df_chunk/dtheta)' dL/df_chunk

    That costs one more forward of the backbone. The graph is an ordinary one: GradScaler, any loss and any optimizer
    work as they are, each parameter gets its gradient once per step, so under DistributedDataParallel there is one
    reduction. Buffers and random stream move once, as by the chunked forward alone. Without grad there is no replay.

    Per chunk, not per batch, is what mixes samples inside the backbone: a batch norm there normalises by chunk, so use
    LayerNorm, GroupNorm or frozen statistics for the gradient of the full batch. Random numbers of python and numpy are
    not replayed. Gradients reach the backbone's parameters, the views and the tensors in `kwargs`, and no tensor that
    forward finds elsewhere. Hooks of modules run in both passes.

    Args:
        backbone: a module; compiled (itself: a compiled step runs it as it is), with non-reentrant checkpointing,
            wrapped in DistributedDataParallel, or sharded by `torch.distributed.fsdp.fully_shard` as a root of its own:
            then all views share one backward, and every rank must have as many chunks, since each gathers parameters.
        views: a tensor (N, ...), or a tuple of positional arguments, of which tensors are cut along dim 0 and must have
            the same N, and others are passed as they are. N and all else may differ between views.
        chunk_size: the most samples at a time; ceil(N / chunk_size) chunks whose sizes differ by at most one.
        kwargs: passed to every call, uncut.

    Returns:
        The output for the one view, or a tuple of those for several: a tensor (N, ...), or any pytree of such.

    Raises:
        TypeError, ValueError: one sentence; also for an output that is not a pytree of tensors with a row per sample.
        RuntimeError: inside of a transform of torch.func; in the backward, where parameters were changed or replaced
            since the forward, under reentrant checkpointing, and for second derivatives.

    Source: Gao, Zhang, Han, Callan, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
    (2101.06983).
    """
    outputs = _outputs(backbone, views, chunk_size, kwargs)
    return outputs[0] if len(outputs) == 1 else outputs


class LargeBatch(nn.Module):
    """`large_batch` of one view as a module: LargeBatch(backbone, 64)(*args, **kwargs) for backbone(*args, **kwargs).

    Its attribute `module` is the backbone.
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
    """What the backbone makes of every view; names: of the views in errors, by default their places."""
    _check(backbone, chunk_size)
    if transforms_active() or forward_mode():
        raise RuntimeError(
            "large_batch runs its backbone twice, which torch.func cannot follow: use backward or torch.autograd.grad."
        )
    if not views:
        raise ValueError("views must be at least one tensor or tuple of arguments, got none.")
    names = names or tuple(f"views[{k}]" for k in range(len(views)))
    runs = [_View(backbone, name, view, chunk_size, kwargs) for name, view in zip(names, views, strict=True)]
    if isinstance(backbone, DistributedDataParallel):
        return _through_ddp(backbone, views, chunk_size, kwargs)
    params = [p for p in backbone.parameters() if p.requires_grad]
    for run in runs:
        run.keep = torch.is_grad_enabled() and any(t.requires_grad for t in run.tensors + params)
    if (groups := _sharded(backbone)) and any(run.keep for run in runs):
        for run in runs:
            run.keep = True
        dummy = torch.empty(0, requires_grad=True)  # sharded parameters get gradients by their own hooks
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
    """One forward of DistributedDataParallel around all chunks of all views, so that it reduces once."""
    inner = ddp.module
    ddp.module = _All(inner, chunk_size)
    try:
        return ddp(*views, **kwargs)
    finally:
        ddp.module = inner


class _All(nn.Module):
    """All views, as the forward of one module."""

    def __init__(self, backbone: nn.Module, chunk_size: int) -> None:
        super().__init__()
        self.backbone, self.chunk_size = backbone, chunk_size

    def forward(self, *views: Any, **kwargs: Any) -> tuple[Any, ...]:
        return _outputs(self.backbone, views, self.chunk_size, kwargs)


def _sharded(backbone: nn.Module) -> list[Any]:
    """The parameter groups of `fully_shard` in a backbone; without its module loaded there are none."""
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


class _View:
    """One view of a batch, and what it takes to run its chunks twice alike."""

    def __init__(self, backbone: nn.Module, name: str, view: Any, chunk_size: int, kwargs: dict[str, Any]) -> None:
        args = tuple(view) if isinstance(view, tuple) else (view,)
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        starts = [0]
        for arg in args:
            starts.append(starts[-1] + len(pytree.tree_leaves(arg)))
        cut = {start for start, arg in zip(starts, args, strict=False) if isinstance(arg, Tensor)}
        if not cut:
            raise TypeError(
                f"{name} must be a tensor (N, ...) or a tuple of arguments with such a tensor, "
                f"got {type(view).__name__} without one."
            )
        shapes = [tuple(leaves[i].shape) for i in sorted(cut)]
        if not all(shapes) or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(f"{name} must have tensors with the same number of rows (dim 0), got shapes {shapes}.")
        rows = shapes[0][0]
        count = max(1, -(-rows // chunk_size))  # of no rows, one chunk has the shapes of the outputs
        ends = [(k + 1) * (rows // count) + min(k + 1, rows % count) for k in range(count)]  # as tensor_split cuts
        self.backbone, self.rows, self.chunks = backbone, rows, list(zip([0, *ends], ends, strict=False))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i] for i in places]
        self.cut = [i in cut for i in places]
        self.places, self.rest = places, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.keep = False

    def first_pass(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs (N, ...) without grad, and, to keep, the state in which each chunk ran."""
        outputs: list[Tensor] = []
        self.random: list[Callable[[], None]] = []
        self.autocast = autocast(tensors)
        if self.keep:
            self.modes = [(m, m.training) for m in self.backbone.modules()]
            self.devices = devices([*tensors, *self.backbone.parameters(), *self.backbone.buffers()])
            buffers = Buffers(self.backbone)
        for start, stop in self.chunks:
            if self.keep:
                self.random.append(random_state(self.devices))
            with torch.no_grad(), self.autocast():
                args, kwargs = self._arguments([t.detach() for t in self._slices(tensors, start, stop)])
                parts, spec = pytree.tree_flatten(self.backbone(*args, **kwargs))
                _check_parts(parts, stop - start)
                kinds = spec, [(part.shape[1:], part.dtype) for part in parts]
                if not outputs:
                    self.output_spec, first = spec, kinds
                    outputs = [part.new_empty((self.rows, *part.shape[1:])) for part in parts]
                elif kinds != first:
                    raise ValueError(
                        "backbone must return the same structure, shapes and dtypes for every chunk but for the rows, "
                        f"got {first[1]} for the first chunk and {kinds[1]} for rows {start} to {stop}."
                    )
                for output, part in zip(outputs, parts, strict=True):
                    output[start:stop].copy_(part)
                del parts
        if self.keep:
            buffers.drop_unchanged()
            self.buffers = buffers
            params = () if _sharded(self.backbone) else self.backbone.parameters()
            self.params = [(p, version(p)) for p in params if p.requires_grad]
        return outputs

    def replay(self, tensors: Sequence[Tensor], grads: Sequence[Tensor | None], backward: Summed | Synced) -> list[Any]:
        """Gradients of the tensors, by a `backward` that also takes care of the parameters'."""
        sums = [Total() for _ in tensors]
        reached: set[int] = set()
        slices = [
            torch.zeros_like(t) if c and t.requires_grad else None for t, c in zip(tensors, self.cut, strict=True)
        ]
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.devices[0], device_type=self.devices[1]))
            stack.enter_context(training(self.modes))
            stack.enter_context(self.buffers.as_before())
            for (start, stop), set_random_state in zip(self.chunks, self.random, strict=True):
                set_random_state()
                leaves = self._slices(tensors, start, stop)
                for k, grad in enumerate(self._chunk(leaves, start, stop, grads, backward)):
                    if grad is not None and (whole := slices[k]) is not None:
                        whole[start:stop] = grad
                        reached.add(k)
                    elif grad is not None:
                        sums[k].add(grad)
        return [
            w if k in reached else s.in_dtype(t) for k, (s, t, w) in enumerate(zip(sums, tensors, slices, strict=True))
        ]

    def _chunk(
        self, leaves: list[Tensor], start: int, stop: int, grads: Sequence[Tensor | None], backward: Summed | Synced
    ) -> list[Tensor | None]:
        """The gradients of leaves; the chunk's graph ends with the call."""
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad(), self.autocast():
            args, kwargs = self._arguments(leaves)
            parts = pytree.tree_leaves(self.backbone(*args, **kwargs))
        pairs = [(p, g[start:stop]) for p, g in zip(parts, grads, strict=True) if g is not None and p.requires_grad]
        found = iter(backward(pairs, wanted, stop == self.rows) if pairs else [None] * len(wanted))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]

    def _slices(self, tensors: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """A chunk's arguments, as leaves."""
        return [  # whether it requires grad, the whole tensor knows: a slice of a view may have that of the view's base
            (t[start:stop] if c else t).detach().requires_grad_(t.requires_grad)
            for t, c in zip(tensors, self.cut, strict=True)
        ]

    def check_parameters(self) -> None:
        """Those of the forward, unchanged."""
        now = {id(p): version(p) for p in self.backbone.parameters() if p.requires_grad}
        if any(now.get(id(p)) != before for p, before in self.params):
            raise RuntimeError(
                "backbone's parameters were changed, frozen or replaced since the forward of this backward."
            )

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        return pytree.tree_unflatten(list(outputs), self.output_spec)

    def _arguments(self, tensors: Sequence[Tensor]) -> Any:
        """(args, kwargs) with the tensors in their places."""
        leaves = list(self.rest)
        for place, t in zip(self.places, tensors, strict=True):
            leaves[place] = t
        return pytree.tree_unflatten(leaves, self.spec)


def _check_parts(parts: list[Any], rows: int) -> None:
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"backbone must return a tensor or a pytree of tensors, got {type(part).__name__} in it.")
        if part.shape[:1] != (rows,):
            raise ValueError(
                f"backbone must return tensors with one row per sample in dim 0, got shape {tuple(part.shape)} for a "
                f"chunk of {rows}."
            )
    if not parts:
        raise TypeError("backbone must return a tensor or a pytree of tensors, got none.")


def _apply(runs: list[_View], backward: Summed | Synced, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """The outputs of views that share one node of the graph."""
    tensors = [t for run in runs for t in run.tensors]
    for run in runs:
        run.tensors = []  # saved by autograd, which frees them and notices changes in place
    outputs = list(_Replayed.apply(runs, backward, len(tensors), *tensors, *inputs))
    return tuple(run.unflatten([outputs.pop(0) for _ in range(run.output_spec.num_leaves)]) for run in runs)


class _Replayed(torch.autograd.Function):
    """Inputs: the tensors of all views, then the parameters."""

    @staticmethod
    def forward(
        ctx: Any, runs: list[_View], backward: Summed | Synced, count: int, *inputs: Tensor
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
