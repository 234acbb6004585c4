"""One view of a batch. Its chunks run first without a graph, and again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..core.internals import pytree, version
from ._replay import Buffers, Summed, Synced, Total, autocast, devices, random_state, training


class View:
    """One view of a batch: its tensors, its chunks, and the recorded state that makes both runs of a chunk equal."""

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
        count = max(1, -(-rows // chunk_size))  # even 0 rows need a chunk, for the shapes of the outputs
        ends = [(k + 1) * (rows // count) + min(k + 1, rows % count) for k in range(count)]  # as in tensor_split
        self.backbone, self.rows, self.chunks = backbone, rows, list(zip([0, *ends], ends, strict=False))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i] for i in places]
        self.cut = [i in cut for i in places]
        self.places, self.rest = places, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.keep = False
        self.watched: Sequence[Tensor] = ()  # parameters that must not change before the backward

    def first_pass(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute the outputs (N, ...) without grad. If `self.keep` is set, also record the state before each chunk."""
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
            self.params = [(p, version(p)) for p in self.watched]
        return outputs

    def replay(self, tensors: Sequence[Tensor], grads: Sequence[Tensor | None], backward: Summed | Synced) -> list[Any]:
        """Run all chunks again, and return the gradients of `tensors`, given the gradients `grads` of the outputs.

        `backward` also accumulates the gradients of the parameters.
        """
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
        """Run one chunk with grad, and return the gradients of `leaves`. The graph of the chunk is freed on return."""
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad(), self.autocast():
            args, kwargs = self._arguments(leaves)
            parts = pytree.tree_leaves(self.backbone(*args, **kwargs))
        pairs = [(p, g[start:stop]) for p, g in zip(parts, grads, strict=True) if g is not None and p.requires_grad]
        found = iter(backward(pairs, wanted, stop == self.rows) if pairs else [None] * len(wanted))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]

    def _slices(self, tensors: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """The tensors of one chunk, as leaves of a new graph."""
        return [  # requires_grad is taken from t: if t is a view, its slice may have the flag of the base of t
            (t[start:stop] if c else t).detach().requires_grad_(t.requires_grad)
            for t, c in zip(tensors, self.cut, strict=True)
        ]

    def check_parameters(self) -> None:
        """Raise RuntimeError if a watched parameter was changed, frozen or replaced since the forward."""
        now = {id(p): version(p) for p in self.backbone.parameters() if p.requires_grad}
        if any(now.get(id(p)) != before for p, before in self.params):
            raise RuntimeError(
                "backbone's parameters were changed, frozen or replaced since the forward of this backward."
            )

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        return pytree.tree_unflatten(list(outputs), self.output_spec)

    def _arguments(self, tensors: Sequence[Tensor]) -> Any:
        """The arguments (args, kwargs) of the backbone, with `tensors` in the places of the tensors."""
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
