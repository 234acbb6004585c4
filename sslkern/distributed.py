"""Batches whose rows lie on several ranks: the argument `group` of the losses, metrics, ops and batch norms.

    loss = vicreg_loss(a, b, group="world")

`group` names the ranks that hold the batch:

    None                                    this process alone
    "world"                                 all processes of torch.distributed
    a torch.distributed.ProcessGroup        its processes
    `over(group, transport=, even=)`        a group with settings

Each rank passes its own rows. Ranks may have different numbers of rows, and a rank may have no rows. The mean of the
ranks' losses is the loss of the joint batch. So the mean of the ranks' gradients, which DistributedDataParallel and
FSDP compute, is the gradient of the joint batch. Metrics return the value of the joint batch on every rank. Invalid
input on one rank raises on all ranks of the group.

Groups of gloo and of NCCL are supported. With `torch.compile` all ranks must have the same number of rows.
docs/from_one_machine_to_many.md lists the collectives of each loss and their cost.
"""

from .core.ranks import Group, Over, over

__all__ = ["Group", "Over", "over"]
