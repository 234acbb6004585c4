"""Covariance and cross-correlation losses of several ranks against one process on the joint batch."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import TOLERANCE, assert_joint, close, divisions, mean_over_ranks, mine, normal, run

import sslkern
from sslkern import distributed, ops
from sslkern.losses import BarlowTwinsLoss, VCRegLoss, VICRegLoss

ROWS = 24
SHAPES = {"dual": (ROWS, 40), "primal": (ROWS, 7), "one column": (ROWS, 1), "stack": (ROWS, 3, 30)}


def views(shape):
    a = normal(*shape)
    return a, a + 0.7 * normal(*shape, seed=1)


def vicreg():
    for (name, shape), dtype, estimator in (
        (s, t, e) for s in SHAPES.items() for t in TOLERANCE for e in ("plugin", "unbiased")
    ):
        loss = partial(sslkern.vicreg_loss, gamma=1.7, estimator=estimator)
        assert_joint(loss, views(shape), dtype, ("vicreg", name, estimator))
    assert_joint(partial(sslkern.vicreg_loss, positions="pooled"), views((ROWS, 3, 5)), torch.float64, "pooled")
    assert_joint(partial(sslkern.vicreg_loss, dim=0, batch_dim=1), views((4, ROWS)), torch.float64, "turned", dim=1)


def vcreg():
    for (name, shape), dtype in ((s, t) for s in SHAPES.items() for t in TOLERANCE):
        assert_joint(partial(sslkern.vcreg_loss, gamma=1.7), views(shape)[:1], dtype, ("vcreg", name))


def barlow_twins():
    for (name, shape), dtype in ((s, t) for s in SHAPES.items() for t in TOLERANCE):
        assert_joint(partial(sslkern.barlow_twins_loss, lambd=0.3), views(shape), dtype, ("barlow", name))


def both_forms():
    """The values and gradients of the ops, all outputs weighted; the form asked for, whatever "auto" would take."""

    def weighted(op):
        def loss(*inputs, group):
            first, second = op(*inputs, group=group)
            return (first * first.cos()).sum() + 3 * second.sum()

        return loss

    for form, estimator in ((f, e) for f in ("primal", "dual") for e in ("plugin", "unbiased")):
        loss = weighted(partial(ops.covariance, form=form, estimator=estimator))
        assert_joint(loss, views((ROWS, 11))[:1], torch.float64, ("covariance", form, estimator))
        assert_joint(weighted(partial(ops.cross_correlation, form=form)), views((ROWS, 11)), torch.float64, form)


def local_statistics():
    """stats="local": C is the mean over all rows of what each rank standardises for itself."""
    counts = divisions(ROWS)[0]
    a, b = (z.requires_grad_() for z in views((ROWS, 9)))

    def standardised(z):
        parts = [p - p.mean(0) for p in z.split(counts)]
        return torch.cat([p / (p.square().mean(0) + 1e-5).sqrt() for p in parts])

    c = standardised(a).T @ standardised(b) / ROWS
    on = c.diagonal()
    expected = (1 - on).square().sum() + 0.3 * (c.square().sum() - on.square().sum())
    gradients = torch.autograd.grad(expected, (a, b))
    own = [mine(z.detach(), counts).requires_grad_() for z in (a, b)]
    loss = sslkern.barlow_twins_loss(*own, 0.3, group="world", stats="local")
    close(loss, expected, 1e-12, "local")
    for found, e in zip(torch.autograd.grad(loss, own), gradients, strict=True):
        close(found / dist.get_world_size(), mine(e, counts), 1e-12, "local")


def large_means():
    """|mu|/sigma = 1e4: the joint mean is kept as two numbers."""
    x = (normal(ROWS, 5) + 1e4 * (1 + torch.arange(5.0))).float()
    variance, _ = ops.covariance(mine(x, divisions(ROWS)[1]), group="world")
    close(variance, x.double().var(0), 1e-6, "variance")


def transport():
    """Rows travel in bfloat16: the loss of rows that are centred, then rounded; without a group none is."""
    a = normal(ROWS, 40)
    own = mine(a, divisions(ROWS)[0])
    found = ops.covariance(own, group=distributed.over(transport=torch.bfloat16))
    rounded = (a - a.mean(0)).bfloat16().double()
    c = rounded.T @ rounded / (ROWS - 1)
    close(found[0], c.diagonal(), 1e-12, "variance")
    close(found[1], c.square().sum() - c.diagonal().square().sum(), 1e-12, "offdiag")
    values = [sslkern.vicreg_loss(own, 2 * own, group=distributed.over(even=e)) for e in (False, True)]
    assert torch.equal(*values)


def half_precision():
    """bfloat16 in, float32 inside, bfloat16 gradients out."""
    a, b = (z.bfloat16() for z in views((ROWS, 40)))
    expected = sslkern.vicreg_loss(a.double(), b.double())
    own = [mine(z, divisions(ROWS)[0]).requires_grad_() for z in (a, b)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = sslkern.vicreg_loss(*own, group="world")
        loss.backward()
    assert loss.dtype == torch.float32 and own[0].grad.dtype == torch.bfloat16
    close(mean_over_ranks(loss), expected, 1e-6, "bfloat16")


def modules_and_terms():
    """Modules hold their group; the terms are those of the loss."""
    own = [mine(z, divisions(ROWS)[0]) for z in views((ROWS, 10))]
    for module, function, count in (
        (VICRegLoss, sslkern.vicreg_loss, 2),
        (BarlowTwinsLoss, sslkern.barlow_twins_loss, 2),
        (VCRegLoss, sslkern.vcreg_loss, 1),
    ):
        loss, terms = function(*own[:count], group="world", return_terms=True)
        assert torch.equal(module(group="world")(*own[:count]), loss)
        assert "group='world'" in repr(module(group="world")) and "group" not in repr(module())
        assert not any(t.requires_grad for t in terms.values())


def compiled():
    """Whole, without a graph break, with the numbers of eager; in more than two processes, the dual form alone."""
    unbiased = partial(sslkern.vicreg_loss, estimator="unbiased")
    cases = ((sslkern.vicreg_loss, 40), (unbiased, 7), (sslkern.barlow_twins_loss, 7))
    for function, width in cases[: 3 if dist.get_world_size() == 2 else 1]:
        own = [mine(z, divisions(ROWS)[0]).requires_grad_() for z in views((ROWS, width))]
        torch._dynamo.reset()
        whole = torch.compile(partial(function, group="world"), fullgraph=True, backend="aot_eager")
        losses = whole(*own), function(*own, group=distributed.over(even=True))
        for found, expected in zip(*((x, *torch.autograd.grad(x, own)) for x in losses), strict=True):
            close(found, expected, 1e-12, "compiled")


def transformed():
    """torch.func.grad of a joint loss is autograd's; a second derivative is refused on all ranks."""
    own = [mine(z, divisions(ROWS)[1]).requires_grad_() for z in views((ROWS, 9))]
    for loss in (sslkern.vicreg_loss, sslkern.barlow_twins_loss):
        joint = partial(loss, group=distributed.over(even=False))
        (expected,) = torch.autograd.grad(joint(*own), own[:1])
        assert torch.equal(torch.func.grad(joint)(*(z.detach() for z in own)), expected)
        with pytest.raises(RuntimeError, match="once, not twice"):
            torch.func.grad(lambda x, f=joint: torch.func.grad(f)(x, own[1].detach()).sum())(own[0].detach())


def settings_with_gradients():
    """The mean over the ranks of a setting's gradients is that of the joint batch."""
    values = {"sim_coeff": 25.0, "std_coeff": 5.0, "cov_coeff": 0.7, "gamma": 1.7, "eps": 1e-2}
    joint, own = views((ROWS, 9)), [mine(z, divisions(ROWS)[1]) for z in views((ROWS, 9))]
    found, expected = (
        {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in values.items()}
        for _ in range(2)
    )
    sslkern.vicreg_loss(*own, **found, group="world").backward()
    sslkern.vicreg_loss(*joint, **expected).backward()
    for name in values:
        close(mean_over_ranks(found[name].grad), expected[name].grad, 1e-12, name)


def forced_back_ends():
    """The joint products are plain torch: "reference" holds, and another one that is forced raises on all ranks."""
    own = [mine(z, divisions(ROWS)[0]) for z in views((ROWS, 9))]
    for loss in (
        sslkern.vicreg_loss,
        sslkern.barlow_twins_loss,
        lambda a, _, group: sslkern.vcreg_loss(a, group=group),
    ):
        with sslkern.backend.use("reference"):
            assert torch.isfinite(loss(*own, group="world"))
        with sslkern.backend.use("native"), pytest.raises(RuntimeError, match="'native' was asked for and cannot be"):
            loss(*own, group="world")


def refused():
    """On one rank: an error on all. Of all ranks together: too few rows."""
    x = normal(4, 3)
    first = dist.get_rank() == 0
    with pytest.raises(
        ValueError if first else RuntimeError, match="at least one column" if first else "Invalid input on rank 0"
    ):
        ops.covariance(x[:, :0] if first else x, group="world")
    with pytest.raises(
        TypeError if first else RuntimeError, match="must be a torch" if first else "Invalid input on rank 0"
    ):
        sslkern.vicreg_loss(None if first else x, x, group="world")
    for other in (x[:, :2], x.float(), x[None], x.clone().requires_grad_()):
        with pytest.raises(ValueError, match="all ranks of a group must be given tensors of one dtype and shape"):
            sslkern.vcreg_loss(other if first else x, group="world")
    with pytest.raises(ValueError, match="all ranks together must have at least 4 rows"):
        sslkern.vcreg_loss(x[: int(first)], estimator="unbiased", group="world")
    with pytest.raises(ValueError, match="stats must be one of"):
        sslkern.barlow_twins_loss(x, x, group="world", stats="global")
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sslkern.vcreg_loss(z, group="world"), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()


CHECKS = (vicreg, vcreg, barlow_twins, both_forms, local_statistics, large_means, transport, half_precision)
CHECKS += (modules_and_terms, compiled, transformed, settings_with_gradients, forced_back_ends, refused)


@pytest.mark.parametrize("size", (2, 4))
def test_ranks_are_one_process(size, tmp_path):
    run(size, CHECKS, tmp_path)


def test_alone():
    """A world of one costs nothing: the bits of no group, whether torch.distributed is initialised or not."""
    a, b = views((ROWS, 10))
    for loss in (sslkern.vicreg_loss, sslkern.barlow_twins_loss):
        assert torch.equal(loss(a, b, group="world"), loss(a, b))
        assert torch.equal(loss(a, b, group=distributed.over()), loss(a, b))
