"""Large batches by chunks on two ranks: one reduction a step, and the gradient of the joint batch."""

import copy

import pytest
import ranks
import torch
import torch.distributed as dist
from large_batches import Net, assert_close, gradients, images, whole
from ranks import Collectives
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sslkern.train.large_batch import LargeBatch, large_batch


class Frozen(nn.BatchNorm2d):
    """Batch norm by its running statistics."""

    def train(self, mode=True):
        return super().train(False)


def joint_and_mine(seed=0):
    """Two views of a joint batch of 14, and this rank's 8 or 6."""
    joint = [images(14, 2, 6, 6, seed=seed + k) for k in range(2)]
    return joint, [ranks.mine(x, (8, 6)) for x in joint]


def share_of_loss(f, g):
    """Sums over rows, times the ranks: their mean is the sum over the joint batch."""
    return (f.sin() * g.cos()).sum() * dist.get_world_size()


def expected_gradients(net, joint):
    return gradients(whole, copy.deepcopy(net), joint, lambda f, g: (f.sin() * g.cos()).sum())[0]


def counting(ddp):
    """Reductions by name of what was reduced; DistributedDataParallel makes one bucket of so small a model."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    rounds = []

    def hook(group, bucket):
        rounds.append(len(bucket.parameters()))
        return allreduce_hook(group, bucket)

    ddp.register_comm_hook(None, hook)
    return rounds


def ddp_around_the_model():
    class Model(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.backbone = net

        def forward(self, *views):
            return large_batch(self.backbone, *views, chunk_size=3)

    for settings in ({}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        torch.manual_seed(0)
        net = Net(middle=Frozen(6).eval())
        joint, own = joint_and_mine()
        expected = expected_gradients(net, joint)
        ddp = DistributedDataParallel(Model(net), **settings)
        rounds = counting(ddp)
        check_steps(ddp, lambda ddp, *views: ddp(*views), net, own, rounds, expected)


def ddp_around_the_backbone():
    for settings in ({}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        torch.manual_seed(0)
        net = Net()
        joint, own = joint_and_mine()
        expected = expected_gradients(net, joint)
        ddp = DistributedDataParallel(net, **settings)
        rounds = counting(ddp)
        check_steps(ddp, lambda ddp, *views: large_batch(ddp, *views, chunk_size=3), net, own, rounds, expected)
        assert ddp.module is net
        with torch.no_grad():
            assert torch.allclose(large_batch(ddp, own[0], chunk_size=3), net(own[0]), rtol=1e-12)
        with pytest.raises(ValueError, match="must not contain a DistributedDataParallel"):
            large_batch(nn.Sequential(ddp), own[0], chunk_size=3)
        calls = LargeBatch(ddp, 3)
        calls(own[0]).sum().backward()
        handle = net.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calls(own[0])
        handle.remove()
        assert ddp.module is net


def check_steps(ddp, run, net, own, rounds, expected):
    """Three steps with one reduction of all parameters each; and one that accumulates first."""
    count = len(list(net.parameters()))
    for turn in range(4):
        net.zero_grad()
        rounds.clear()
        factor = 1
        if turn == 3 and not ddp.static_graph:
            with ddp.no_sync():
                share_of_loss(*run(ddp, *own)).backward()
            assert not rounds
            factor = 2
        share_of_loss(*run(ddp, *own)).backward()
        assert sum(rounds) == count, rounds
        found = {k: p.grad / factor for k, p in net.named_parameters()}
        assert_close(found, {k: expected[k] for k in found}, 1e-12)


def sharded(net, mesh, parts=("stem", "head")):
    for part in parts:
        fully_shard(net.get_submodule(part), mesh=mesh)
    return fully_shard(net, mesh=mesh)


def check_sharded(net, run, own, expected, groups):
    """Steps with one reduce-scatter per group each, and one that accumulates first."""
    for turn in range(4):
        net.zero_grad()
        factor = 1
        with Collectives() as called:
            if turn == 2:
                for module in net.modules():
                    if isinstance(module, FSDPModule):
                        module.set_requires_gradient_sync(False)
                share_of_loss(*run(own)).backward()
                for module in net.modules():
                    if isinstance(module, FSDPModule):
                        module.set_requires_gradient_sync(True)
                factor = 2
            assert not [name for name in called.names if "reduce" in name]
            loss = share_of_loss(*run(own))
            loss.backward(retain_graph=turn == 3)
        assert len([name for name in called.names if "reduce_scatter" in name]) == groups, called.names
        if turn == 3:
            loss.backward()
            factor = 2
        for name, p in net.named_parameters():
            gradient = p.grad.full_tensor() / factor
            assert_close({name: gradient}, {name: expected[name]}, 1e-12)


def fsdp_backbone():
    """A sharded root with sharded blocks, and a plain module of sharded ones; also the gradient of the views."""
    mesh = init_device_mesh("cpu", (2,))
    for root in (True, False):
        torch.manual_seed(0)
        net = Net(middle=Frozen(6).eval())
        joint, own = joint_and_mine()
        expected = expected_gradients(net, [x.requires_grad_() for x in joint])
        if root:
            sharded(net, mesh)
        else:
            fully_shard(net.stem, mesh=mesh)
            fully_shard(net.middle, mesh=mesh)
            fully_shard(net.head, mesh=mesh)
        check_sharded(net, lambda own, net=net: large_batch(net, *own, chunk_size=4), own, expected, 3)
        own = [x.detach().requires_grad_() for x in own]
        share_of_loss(*large_batch(net, *own, chunk_size=4)).backward()
        for k, x in enumerate(own):
            name = f"view {k}"
            assert_close({name: x.grad / 2}, {name: ranks.mine(expected[name], (8, 6))}, 1e-12)
        with torch.no_grad():
            f = large_batch(net, own[0], chunk_size=4)
        assert not f.requires_grad and torch.equal(f, large_batch(net, own[0], chunk_size=4))


def fsdp_around_the_model():
    """A model sharded as a whole takes its backbone in chunks; one whose backbone is sharded as a part is refused."""
    mesh = init_device_mesh("cpu", (2,))

    class Model(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.backbone = net

        def forward(self, *views):
            return large_batch(self.backbone, *views, chunk_size=4)

    torch.manual_seed(0)
    net = Net(middle=Frozen(6).eval())
    joint, own = joint_and_mine()
    expected = {f"backbone.{k}": g for k, g in expected_gradients(net, joint).items()}
    for reshard in (False, True):
        model = fully_shard(Model(copy.deepcopy(net)), mesh=mesh, reshard_after_forward=reshard)
        check_sharded(model, lambda own, model=model: model(*own), own, expected, 1)
    model = Model(net)
    fully_shard(net, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"^backbone must be sharded as a root of its own"):
        model(*own)


DISTRIBUTED = [ddp_around_the_model, ddp_around_the_backbone, fsdp_backbone, fsdp_around_the_model]


def test_two_ranks(tmp_path):
    """All of DISTRIBUTED, in two processes over gloo."""
    ranks.run(2, DISTRIBUTED, tmp_path)
