"""Every private part of torch that sslkern uses. No other module of the package uses private parts of torch.

The parts were checked with torch 2.11 to 2.14. A note such as (torch >= 2.0) is the version since which a part has
its present form. This module imports only torch, and importing it does not import `torch._dynamo`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree  # 2.0: there is no public pytree

if dist.is_available():
    import torch.distributed._functional_collectives  # fake kernels: without them, compiling `collectives` fails

__all__ = ["pytree", "unwrap_dead_wrappers"]

# 2.1. A decorator that excludes a function from compilation. torch uses it for its optimizers. It imports
# `torch._dynamo` when the function is first called. `torch.compiler.disable` imports `torch._dynamo` when it decorates,
# which takes 1 s on an EPYC core
not_compiled: Callable[[Callable], Callable] = torch._disable_dynamo

# 1.13. The id of the backward that is running in this thread; -1 if none is running
running_backward: Callable[[], int] = torch._C._current_graph_task_id

# 2.4. Whether the backward that is running keeps the graph for another one
graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

# 2.0. Whether the backward that is running will execute a given node of the graph
will_run: Callable[[Any], bool] = torch._C._will_engine_execute_node

# 2.0. Whether a transform of torch.func (vmap, grad, jvp, ...) is active. `unwrap_dead_wrappers`, imported above,
# removes the wrappers of a transform from tensors that have outlived it. `autograd.Function.apply` does the same
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# 1.7. An assertion on a tensor of one element. It does not wait for the GPU
assert_async: Callable[[Tensor, str], None] = torch._assert_async

# 0.1. The base class of all batch norms, which torch's tools look for; and the input check of SyncBatchNorm
BatchNormBase = nn.modules.batchnorm._BatchNorm
check_sync_input_dim = nn.SyncBatchNorm._check_input_dim

# 2.0. The functional collectives, which `torch.compile(fullgraph=True)` traces. They have no public form
collectives = torch.ops._c10d_functional

# 1.11. The `__torch_function__` of a subclass of Tensor whose `__torch_dispatch__` does all the work
no_torch_function: Any = torch._C._disabled_torch_function_impl

# 1.9. Operations on lists of tensors, in one kernel or in one loop in C++
foreach_add, foreach_add_, foreach_mul_ = torch._foreach_add, torch._foreach_add_, torch._foreach_mul_
foreach_lerp_, foreach_copy_ = torch._foreach_lerp_, torch._foreach_copy_


def forward_mode() -> bool:
    """Whether `torch.autograd.forward_ad.dual_level` is active. (torch >= 1.8)"""
    return forward_ad._current_level >= 0


def call_vmapped(kernel: Any, rule: Callable, *args: Any) -> Any:
    """Call a kernel inside vmap by its vmap rule, and return its outputs. (torch >= 2.0)"""
    from torch._functorch.autograd_function import custom_function_call_vmap_helper
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    level = retrieve_current_functorch_interpreter()
    return custom_function_call_vmap_helper(level, rule, kernel, *args)  # type: ignore[arg-type]


def inside(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func. For a vmapped tensor, this is the whole batch. (torch >= 2.0)"""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def only_vmapped() -> bool:
    """Whether all active transforms of torch.func are vmap. (torch >= 2.0)"""
    vmap = torch._C._functorch.TransformType.Vmap
    return all(level.key() == vmap for level in torch._C._functorch.get_interpreter_stack())


def while_tracing(function: Callable) -> Callable:
    """Mark a function whose arguments are constants: a compiler runs it during tracing, and leaves it out of the graph.
    `torch.compiler.assume_constant_result` does the same, but imports `torch._dynamo`. (torch >= 2.0)"""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def batched(tensor: Tensor) -> bool:
    """Whether a tensor is a batch of gradients, as `torch.autograd.grad(is_grads_batched=True)` makes them: by an older
    vmap than that of torch.func, which `transforms_active` does not see. (torch >= 1.13)"""
    return "Batched" in torch._C._dispatch_key_set(tensor)


def version(tensor: Tensor) -> int:
    """How often a tensor was modified in place. Autograd compares this number to see whether a saved tensor has
    changed. (torch >= 1.0)"""
    return tensor._version


def has_kernel(operator: str, key: str) -> bool:
    """Whether the operator "namespace::name" has a kernel for a dispatch key such as "CPU". (torch >= 1.10)"""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def wrapper(kind: type, like: Tensor) -> Any:
    """A tensor of a subclass that has the shape, strides, dtype and device of another one, and no memory.
    (torch >= 1.9)"""
    return Tensor._make_wrapper_subclass(kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device)


def when_cuda_starts(call: Callable[[], None]) -> None:
    """Call a function when CUDA is initialised, or at once if it already is. sslkern needs this because its import must
    not initialise CUDA. (torch >= 0.4)"""
    torch.cuda._lazy_call(call)


def group_of(name: str) -> dist.ProcessGroup:
    """The process group with this name. Functional collectives take the name in place of the group. (torch >= 2.1)"""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def buffers(module: nn.Module) -> MutableMapping[str, Tensor | None]:
    """A module's own buffers by name. Writing to this dict bypasses the `__setattr__` of modules. (torch >= 0.1)"""
    return module._buffers


def parameters(module: nn.Module) -> MutableMapping[str, nn.Parameter | None]:
    """A module's own parameters by name. (torch >= 0.1)"""
    return module._parameters


def backward_hooks(tensor: Tensor) -> MutableMapping[int, Callable]:
    """The hooks of `tensor.register_hook`, in order. If there are none, a new dict. (torch >= 0.1)"""
    hooks = tensor._backward_hooks
    return {} if hooks is None else hooks


def step_of(kind: type[torch.optim.Optimizer]) -> Callable:
    """The `step` of an optimizer class without the hooks that torch wraps around it when the first optimizer of this
    class is made. A subclass that calls it runs its own hooks once. (torch >= 2.0)"""
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def leave_out_of_buckets(model: nn.Module, names: set[str]) -> None:
    """Let DistributedDataParallel ignore the named parameters of a model that it will wrap, in addition to others that
    it ignores already. (torch >= 1.7)"""
    names |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))


def hooked(*modules: nn.Module) -> bool:
    """Whether a call of one of the modules runs hooks in addition to its `forward`. (torch >= 2.0)"""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
    return nn.modules.module._has_any_global_hook()


class Sharded:
    """The parameter groups that `torch.distributed.fsdp.fully_shard` keeps in a module, with the flags `reduce_grads`
    and `all_reduce_grads`. FSDPModule has public setters for these flags, but no public getters."""

    def __init__(self, module: Any) -> None:
        state = module._get_fsdp_state()
        one = getattr(state, "_fsdp_param_group", None)  # torch 2.11 has at most one
        self.groups: Sequence[Any] = getattr(state, "_fsdp_param_groups", [] if one is None else [one])
        self.inside_another: bool = state._is_root is False  # `_is_root` is None before the first forward

    @staticmethod
    def kind() -> type | tuple[()]:
        """The class of sharded modules, for `isinstance`. If `torch.distributed.fsdp` is not imported yet, no module is
        sharded, and this returns () and does not import it."""
        return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
