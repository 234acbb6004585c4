"""Models with factored layers in several processes: their gradients are those of the joint batch, or an error."""

import copy
import pickle
from unittest.mock import patch

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslkern.core import factor_exchange as exchange
from sslkern.core.factored_gradient import FactoredGradient
from sslkern.core.factored_tensor import ANY
from sslkern.nn import exchange_factors_, factored_
from sslkern.optim import LARS, SGD, AdamW, clip_grad_norm_

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
            model = DistributedDataParallel(factored_(network(), least=0), **settings)
            norms = train(model, make(model.parameters()), lambda step: batch(step).chunk(size)[rank])
            torch.testing.assert_close(norms, expected)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p, q)
    model = DistributedDataParallel(factored_(network(), least=0))
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
    model, plain = factored_(network(), least=0), network()
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
        plain, model = network(), factored_(network(), least=0)
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


class Work:
    """A sum over ranks that has come when it is waited for."""

    def __init__(self, matrix):
        self.matrix, self.waits = matrix, 0

    def wait(self):
        self.matrix.add_(1.0)
        self.waits += 1


@pytest.mark.parametrize(
    "read",
    (
        lambda g: g + 0,
        lambda g: g.clone(),
        lambda g: g.data * 1,
        lambda g: g.detach().mul_(1),
        lambda g: torch.zeros(5, 4).add_(g),
        lambda g: copy.deepcopy(g),
        lambda g: pickle.loads(pickle.dumps(g)),
        lambda g: torch.from_numpy(g.numpy()),
        lambda g: torch.tensor(g.tolist()),
        lambda g: torch.stack([g, g])[1],
        lambda g: g.pow(2).sqrt(),
        lambda g: g.form_(),
    ),
)
def test_who_reads_a_sum_waits_for_it(read):
    """Once, also through an alias that was made before."""
    dy, x, works = torch.rand(3, 5), torch.rand(3, 4), []
    grad = FactoredGradient.of(torch.zeros(5, 4), dy, x)
    alias = grad.detach()
    grad.form_then_(lambda matrix: works.append(Work(matrix)) or works[0])
    assert not grad.factored and not alias.factored and works[0].waits == 0
    for one in (alias, grad):
        torch.testing.assert_close(torch.Tensor(read(one)), dy.mT @ x + 1)
    torch.testing.assert_close(grad.square(), (dy.mT @ x + 1).double().square().sum())
    assert works[0].waits == 1


def check_exchange():
    """Factors, or gradients where factors would be more: as the joint batch in one process, for uneven rows too."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = {2: [4, 2], 4: [3, 2, 0, 1]}[size]

    def joint_loss(model, x):  # the mean over the ranks of such losses is that of the joint batch
        return model(x).sin().sum() * size / 6

    for products, compiled in ((100, False), (1e-9, False), (100, True), (1e-9, True)):
        for make in OPTIMIZERS[:1] if compiled else OPTIMIZERS:
            plain, ours = network(), network()
            with torch.no_grad():
                for p in ours.parameters():
                    p.add_(rank)  # all start from the first rank's
            with patch.dict(exchange._PRODUCTS, cpu=products):
                model = DistributedDataParallel(exchange_factors_(factored_(ours, least=0)))
                run = torch.compile(model, backend="aot_eager") if compiled else model
                optimizer, other = make(model.parameters()), make(plain.parameters())
                for step in range(3):
                    optimizer.zero_grad()
                    other.zero_grad()
                    for accumulated in range(step % 2 + 1):
                        x = batch(step + 7 * accumulated)
                        joint_loss(run, x.split(rows)[rank]).backward()
                        loss_of(plain, x).backward()
                    grad = ours[0].weight.grad
                    assert getattr(grad, "factored", False) == (products == 100 and not compiled)
                    norms = [clip_grad_norm_(m.parameters(), 0.1) for m in (model, plain)]
                    torch.testing.assert_close(*norms)
                    optimizer.step()
                    other.step()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p, q)
            every = [torch.empty_like(ours[0].weight) for _ in range(size)]
            dist.all_gather(every, ours[0].weight.detach())
            assert all(torch.equal(every[0], theirs) for theirs in every)  # to the last bit


def check_exchange_refused():
    with pytest.raises(ValueError, match=r"got Linear without one: factored_ leaves layers of fewer than 2\^21"):
        exchange_factors_(nn.Linear(2, 3))
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got int\.$"):
        exchange_factors_(3)
    with pytest.raises(TypeError, match=r"^group must be None, 'world'"):
        exchange_factors_(factored_(nn.Linear(2, 3), least=0), 3)
    layer, x = exchange_factors_(factored_(nn.Linear(64, 64), least=0)), torch.ones(2, 64)
    for refused in (
        lambda: torch.autograd.grad(layer(x).sum(), layer.weight, create_graph=True),
        lambda: torch.func.grad(lambda w: torch.func.functional_call(layer, {"weight": w}, x).sum())(layer.weight),
        lambda: torch.func.functional_call(layer, {"weight": layer.weight * 1}, x),
        lambda: exchange_factors_(factored_(nn.Linear(64, 64).bfloat16(), least=0))(x.bfloat16()),
    ):
        with pytest.raises(RuntimeError, match=r"^A layer that exchanges its factors has gradients of the joint batch"):
            refused()
    with torch.no_grad():
        layer(x)
    assert exchange_factors_(layer, None).group is None


TWO = (check_data_parallel, check_collectives, check_fully_sharded, check_exchange, check_exchange_refused)
FOUR = (check_exchange,)


@pytest.mark.parametrize("size, checks", ((2, TWO), (4, FOUR)), ids=("two", "four"))
def test_ranks(size, checks, tmp_path):
    ranks.run(size, checks, tmp_path)


def test_rule_of_the_exchange():
    """Few rows are gathered, many are formed and summed; a GPU weighs products less."""
    w = torch.empty(8192, 8192, device="meta")
    with patch.dict(exchange._PRODUCTS, cuda=100):  # a meta tensor counts as one on a GPU
        assert exchange.gathers((32,) * 4, w, ANY) and not exchange.gathers((64,) * 8, w, ANY)
    assert exchange.gathers((64,) * 8, w, ANY) and not exchange.gathers((256,) * 64, w, ANY)
    assert exchange.gathers((64,) * 8, w, 512) and not exchange.gathers((64,) * 8, w, 511)
    assert not exchange.gathers((64,) * 8, w, ANY, "cpu")
