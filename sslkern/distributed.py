"""Batches that lie on several ranks: the argument `group` of the losses, metrics, ops and batch norms.

    loss = vicreg_loss(a, b, group="world")

`group` names the ranks that hold the batch:

    None                                    this process alone
    "world"                                 all processes of torch.distributed
    a torch.distributed.ProcessGroup        its processes
    `over(group, transport=, even=)`        a group with settings

Each rank passes its own rows; ranks may have different numbers of rows, or none. The mean over the ranks of the losses
is the loss of the joint batch. So gradients that are averaged over the ranks, as DistributedDataParallel and FSDP
average them, are the gradients of the joint batch. Metrics return the value of the joint batch on every rank. Invalid
input on one rank raises on all ranks of the group.

Gloo and NCCL serve; with `torch.compile` the ranks must have the same number of rows. docs/from_one_machine_to_many.md
has the collectives of each loss and what they cost.
"""

from .core.ranks import Group, Over, over

__all__ = ["Group", "Over", "over"]
