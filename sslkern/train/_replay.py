"""Helpers of `large_batch`, which runs every chunk of a batch twice: without a graph, and again in the backward.

They make the second run equal to the first, with the same buffers, training flags, autocast settings and random
numbers, and they compute the backward of a chunk.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.internals import backward_hooks, buffers, running_backward, will_run

_HALF = (torch.bfloat16, torch.float16)


class Buffers:
    """A snapshot of the buffers of a module and its submodules."""

    def __init__(self, module: nn.Module) -> None:
        named = [(m, name, b) for m in module.modules() for name, b in buffers(m).items() if b is not None]
        copies = {id(b): b.detach().clone() for _, _, b in named}  # shared buffers are copied once
        self.kept = [(m, name, b, copies[id(b)]) for m, name, b in named]

    def drop_unchanged(self) -> None:
        """Forget the buffers on a CPU that have not changed since the snapshot.

        Buffers on a GPU are all kept, because comparing them would be a host sync. `Tensor._version` cannot
        show a change either, because batch norm updates its running statistics without incrementing it.
        """
        self.kept = [
            (m, name, b, copy)
            for m, name, b, copy in self.kept
            if buffers(m).get(name) is not b or b.device.type != "cpu" or not torch.equal(b, copy)
        ]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """A context in which the buffers have the values of the snapshot. On exit, the previous values are restored."""
        now = [buffers(m).get(name) for m, name, _, _ in self.kept]
        values = [None if b is None else b.detach().clone() for b in now]
        try:
            for m, name, b, copy in self.kept:
                if buffers(m).get(name) is b:
                    b.data.copy_(copy)  # .data keeps the version, so graphs that saved it stay valid
                else:
                    buffers(m)[name] = copy.clone()
            yield
        finally:
            for (m, name, _, _), current, value in zip(self.kept, now, values, strict=True):
                buffers(m)[name] = current
                if current is not None and value is not None:
                    current.data.copy_(value)


@contextmanager
def training(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """A context in which the modules have these training flags. On exit, the previous flags are restored."""
    now = [m.training for m, _ in modes]
    try:
        for m, training in modes:
            m.training = training
        yield
    finally:
        for (m, _), training in zip(modes, now, strict=True):
            m.training = training


def autocast(tensors: Sequence[Tensor]) -> Callable[[], ExitStack]:
    """A function that returns a context with the current autocast settings, but without autocast's weight cache.

    The cache could return a weight that was cast without grad.
    """
    kinds = {"cpu", *(t.device.type for t in tensors)}
    settings = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted(kinds)
        if torch.amp.is_autocast_available(kind)
    ]

    def contexts() -> ExitStack:
        stack = ExitStack()
        for kind, enabled, dtype in settings:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
        return stack

    return contexts


def devices(tensors: Sequence[Tensor]) -> tuple[list[int], str]:
    """The indices of the accelerators that hold the tensors, and their type ("cuda" if there are none)."""
    places = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    return sorted({p.index for p in places}), next((p.type for p in places), "cuda")


def random_state(devices: tuple[list[int], str]) -> Callable[[], None]:
    """A function that resets the generators of the CPU and of the devices to the state that they have now."""
    indices, kind = devices
    cpu = torch.get_rng_state()
    module = torch.get_device_module(kind)
    states = [module.get_rng_state(index) for index in indices]

    def restore() -> None:
        torch.set_rng_state(cpu)
        for index, state in zip(indices, states, strict=True):
            module.set_rng_state(state, index)

    return restore


class Total:
    """A sum of gradients. A single gradient is kept as it is. Further gradients are added in fp32 or better."""

    value: Tensor | None = None
    own = False

    def add(self, grad: Tensor) -> None:
        if self.value is None:
            self.value = grad
        elif self.own:
            self.value.add_(grad)
        else:  # not in place: the first gradient may also belong to another parameter
            wide = self.value.float() if self.value.dtype in _HALF else self.value
            self.value, self.own = wide + grad, True

    def in_dtype(self, like: Tensor) -> Tensor | None:
        return None if self.value is None else self.value.to(like.dtype)


class Summed:
    """The backward of a chunk. It sums the gradients of the parameters over all chunks of all views in one backward.

    Each gradient is added to the sum as soon as it is computed, so there is never a second set of gradients.
    """

    final = False
    task = -1

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.sums: list[Total] = []
        self.nodes: list[weakref.ref] = []
        self.done: list[object] = []

    def __enter__(self) -> Summed:
        if self.task != (task := running_backward()):
            self.task, self.sums, self.done = task, [Total() for _ in self.params], []
        # user hooks expect the gradient of the batch; they run when it is accumulated, so not for each chunk
        self.theirs = [dict(backward_hooks(p)) for p in self.params]
        for p, hooks in zip(self.params, self.theirs, strict=True):
            if hooks:
                backward_hooks(p).clear()
        self.ours = [p.register_hook(self._adding(k)) for k, p in enumerate(self.params)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.ours:
            handle.remove()
        for p, hooks in zip(self.params, self.theirs, strict=True):
            if hooks:
                backward_hooks(p).update(hooks)

    def __call__(self, pairs: list[tuple[Tensor, Tensor]], leaves: list[Tensor], last: bool) -> Sequence[Any]:
        """The gradients of `leaves`. Each of `pairs` is an output of the chunk and the gradient of this output."""
        outputs, grads = zip(*pairs, strict=True)
        try:
            return torch.autograd.grad(outputs, [*leaves, *self.params], grads, allow_unused=True)[: len(leaves)]
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                "backbone must not use reentrant activation checkpointing; give checkpoint use_reentrant=False."
            ) from error

    def gradients(self, node: object) -> Sequence[Tensor | None]:
        """The summed gradients of the parameters, for the last view of this backward. Earlier views get None."""
        self.done.append(node)
        waiting = [other for ref in self.nodes if (other := ref()) is not None and other not in self.done]
        if any(will_run(other) for other in waiting):
            return [None] * len(self.params)
        sums, self.sums, self.done, self.task = self.sums, [], [], -1
        return [s.in_dtype(p) for s, p in zip(sums, self.params, strict=True)]

    def _adding(self, k: int) -> Callable[[Tensor], Tensor | None]:
        def hook(grad: Tensor) -> Tensor | None:
            self.sums[k].add(grad)
            return None if grad.layout != torch.strided else grad.new_zeros(()).expand(grad.shape)

        return hook


class Synced:
    """The backward of a chunk if the parameters are sharded.

    Such parameters accumulate their gradients themselves. The gradients are reduced over the ranks in the last chunk.
    """

    final = False

    def __init__(self, groups: Sequence[Any]) -> None:
        self.groups = groups
        self.nodes: list[weakref.ref] = []

    def __enter__(self) -> Synced:
        self.theirs = [(group.reduce_grads, group.all_reduce_grads) for group in self.groups]
        return self

    def __exit__(self, *error: object) -> None:
        for group, flags in zip(self.groups, self.theirs, strict=True):
            group.reduce_grads, group.all_reduce_grads = flags

    def __call__(self, pairs: list[tuple[Tensor, Tensor]], leaves: list[Tensor], last: bool) -> Sequence[Any]:
        """The gradients of `leaves`. Each of `pairs` is an output of the chunk and the gradient of this output."""
        for group, flags in zip(self.groups, self.theirs, strict=True):
            group.reduce_grads, group.all_reduce_grads = flags if last and self.final else (False, False)
        outputs, grads = zip(*pairs, strict=True)
        torch.autograd.backward(outputs, grads)
        return [leaf.grad for leaf in leaves]

    def gradients(self, node: object) -> Sequence[None]:
        return [None]
