"""Models with factored layers in several processes: their gradients are those of the joint batch, or an error."""

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslkern.core.factored_gradient import FactoredGradient
from sslkern.nn import factored_
from sslkern.optim import LARS, SGD, AdamW

DOUBLE = torch.float64
OPTIMIZERS = (
    lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    lambda p: AdamW(p, lr=0.01),
    lambda p: LARS(p, lr=0.1, weight_decay=0.01),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 40)).to(DOUBLE)


def batch(step):
    return torch.randn(6, 48, generator=torch.Generator().manual_seed(step), dtype=DOUBLE)


def loss_of(model, x):
    return model(x).sin().sum(1).mean()


def train(model, optimizer, x_of):
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, x_of(step)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
    return norms


def check_data_parallel():
    """DDP averages the gradients in its buckets, which forms them; with and without gradients in the buckets."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for make in OPTIMIZERS:
        plain = network()
        expected = train(plain, make(plain.parameters()), batch)
        for settings in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
            model = DistributedDataParallel(factored_(network()), **settings)
            norms = train(model, make(model.parameters()), lambda step: batch(step).chunk(size)[rank])
            torch.testing.assert_close(norms, expected)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p, q)
    model = DistributedDataParallel(factored_(network()))
    with model.no_sync():  # the first of two batches stays on its rank, as factors
        loss_of(model, batch(0).chunk(size)[rank]).backward()
        assert model.module[0].weight.grad.factored
    loss_of(model, batch(1).chunk(size)[rank]).backward()
    plain = network()
    (loss_of(plain, batch(0)) + loss_of(plain, batch(1))).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.clone(), q.grad)


def check_collectives():
    """What a script does by hand with gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, plain = factored_(network()), network()
    loss_of(plain, batch(0)).backward()
    for reduce in ("all_reduce", "coalesced"):
        model.zero_grad()
        loss_of(model, batch(0).chunk(size)[rank]).backward()
        grads = [p.grad for p in model.parameters()]
        assert isinstance(grads[0], FactoredGradient) and grads[0].factored
        for grad in grads:
            if reduce == "all_reduce":
                dist.all_reduce(grad)
            else:
                parts = [torch.empty_like(grad) for _ in range(size)]
                dist.all_gather(parts, grad)
                grad.copy_(sum(parts))
            grad.div_(size)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad.clone(), q.grad)


def check_fully_sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    for make in OPTIMIZERS[:2]:
        plain, model = network(), factored_(network())
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer, other = make(model.parameters()), make(plain.parameters())
        for step in range(3):
            for m, o, x in ((model, optimizer, batch(step).chunk(size)[rank]), (plain, other, batch(step))):
                o.zero_grad()
                loss_of(m, x).backward()
                o.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q)


@pytest.mark.parametrize("checks", ((check_data_parallel, check_collectives, check_fully_sharded),), ids=("two",))
def test_two_ranks(checks, tmp_path):
    ranks.run(2, checks, tmp_path)
