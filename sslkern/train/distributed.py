"""Every collective of the package, and nothing else of it: ops and losses may import this file.

Functional collectives, which `torch.compile(fullgraph=True)` traces, for gloo and NCCL. They are waited for where they
are called, since their result is needed there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    import torch.distributed._functional_collectives  # the ops' fake kernels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def world() -> ProcessGroup | None:
    """All processes, or None where torch.distributed is not initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def with_peers(group: ProcessGroup | None) -> ProcessGroup | None:
    """The group, or None where this process is not in it or alone in it.

    Raises:
        TypeError: neither a torch.distributed.ProcessGroup nor None.
    """
    if group is None:
        return None
    if isinstance(group, dist.ProcessGroup):
        return group if dist.get_world_size(group) > 1 else None
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        return None
    raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}.")


def all_gather(values: Tensor, group: ProcessGroup) -> Tensor:
    """values (n,) of every process, in rank order: (W, n). Not differentiable."""
    size, ops = dist.get_world_size(group), torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(values, size, group.group_name)).view(size, -1)


def all_reduce(values: Tensor, group_name: str) -> Tensor:
    """The sum of values over every process. Not differentiable."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(values, "sum", group_name))
