"""Covariance and cross-correlation losses of several ranks against one process on the joint batch."""

import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import TOLERANCE, assert_joint, close, divisions, mean_over_ranks, mine, normal, run

import sslkern
from sslkern import ops
from sslkern.losses import BarlowTwinsLoss, VCRegLoss, VICRegLoss, spectral_contrastive_loss
from sslkern.metrics import hsic
from sslkern.train import distributed

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


REFUSED = {
    "gamma": lambda a, b, bad: sslkern.vcreg_loss(a, gamma="x" if bad else 1.0, group="world"),
    "lambd": lambda a, b, bad: sslkern.barlow_twins_loss(a, b, torch.inf if bad else 0.1, group="world"),
    "stats": lambda a, b, bad: sslkern.barlow_twins_loss(a, b, stats="all" if bad else "sync", group="world"),
    "eps": lambda a, b, bad: sslkern.vicreg_loss(a, b, eps=-1.0 if bad else 1e-4, group="world"),
    "dim": lambda a, b, bad: sslkern.vicreg_loss(a, b, dim=5 if bad else -1, group="world"),
    "positions": lambda a, b, bad: sslkern.vcreg_loss(a, positions="all" if bad else "pooled", group="world"),
    "estimator": lambda a, b, bad: sslkern.vcreg_loss(a, estimator="no" if bad else "unbiased", group="world"),
    "form": lambda a, b, bad: ops.covariance(a, form="no" if bad else "auto", group="world")[0].sum(),
    "rows": lambda a, b, bad: sslkern.vicreg_loss(a[: 0 if bad else None], b[: 0 if bad else None], group="world"),
    "rows, info_nce": lambda a, b, bad: sslkern.info_nce_loss(a, b[: 1 if bad else None], group="world"),
    "rows, hsic": lambda a, b, bad: hsic(a[: 0 if bad else None], b[: 0 if bad else None], group="world"),
    "temperature": lambda a, b, bad: sslkern.nt_xent_loss(a, b, True if bad else 0.5, group="world"),
}


def refused_on_one_rank():
    """Whatever it is, and compiled or not: an error on every rank, and the next collective is the same on all."""
    first, views = dist.get_rank() == 0, [normal(6, 5, seed=k) for k in range(2)]
    for name, loss in REFUSED.items():
        torch._dynamo.reset()
        whole = torch.compile(loss, fullgraph=True, backend="eager")
        for function in (loss, whole, torch.compile(loss, backend="eager")):
            if function is not loss or not name.startswith("rows"):  # eager ranks may have different rows
                with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
                    function(*views, bad=first)
                said = r"must (be|have|differ)|rank 0 was given bad input|equally many rows"
                assert re.search(said, str(caught.value)), (name, caught.value)
            ranks = torch.tensor([dist.get_rank()])
            dist.all_reduce(ranks)
            assert ranks.item() == dist.get_world_size() * (dist.get_world_size() - 1) // 2
        assert torch.isfinite(loss(*views, bad=False))


UNEVEN = {  # "aot_eager", which may drop and move calls, where rows are gathered and where sums are reduced
    "vicreg": (sslkern.vicreg_loss, "aot_eager"),
    "barlow": (sslkern.barlow_twins_loss, "eager"),
    "nt_xent": (sslkern.nt_xent_loss, "aot_eager"),
    "spectral": (spectral_contrastive_loss, "aot_eager"),
    "hsic": (hsic, "eager"),
}


def compiled_on_uneven_rows():
    """No rank gets a number, and none waits: all raise, when the graph runs, whatever the loss does next."""
    counts = [5] * (dist.get_world_size() - 1) + [7]
    own = [mine(normal(sum(counts), 6, seed=k), counts) for k in range(2)]
    for name, (loss, compiler) in UNEVEN.items():
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=r"Under torch\.compile all ranks of a group must be given equally"):
            torch.compile(partial(loss, group="world"), fullgraph=True, backend=compiler)(*own)
        assert torch.isfinite(loss(*own, group="world")), name  # the ranks are still in step, and eager has the value


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
    with pytest.raises(ValueError if first else RuntimeError, match="at least one column" if first else "rank 0 was"):
        ops.covariance(x[:, :0] if first else x, group="world")
    with pytest.raises(TypeError if first else RuntimeError, match="must be a torch" if first else "rank 0 was given"):
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


def dead_peer():
    """Who waits for a process that has ended gets an error, not a number."""
    if dist.get_rank() == dist.get_world_size() - 1:
        return
    with pytest.raises(RuntimeError):
        for _ in range(2):  # the first all-gather may have been sent before the peer was gone
            sslkern.vcreg_loss(normal(4, 3), group="world")


CHECKS = (vicreg, vcreg, barlow_twins, both_forms, local_statistics, large_means, transport, half_precision)
CHECKS += (modules_and_terms, compiled, transformed, settings_with_gradients, forced_back_ends, refused)


@pytest.mark.parametrize("size", (2, 4))
def test_ranks_are_one_process(size, tmp_path):
    run(size, CHECKS, tmp_path)


def test_uneven_rows_under_compile(tmp_path):
    run(2, (compiled_on_uneven_rows,), tmp_path)


def test_bad_input_on_one_rank(tmp_path):
    run(2, (refused_on_one_rank,), tmp_path)


def test_who_waits_for_the_dead_gets_an_error(tmp_path):
    run(2, (dead_peer,), tmp_path, timeout=10)


def test_alone():
    """A world of one costs nothing: the bits of no group, whether torch.distributed is initialised or not."""
    a, b = views((ROWS, 10))
    for loss in (sslkern.vicreg_loss, sslkern.barlow_twins_loss):
        assert torch.equal(loss(a, b, group="world"), loss(a, b))
        assert torch.equal(loss(a, b, group=distributed.over()), loss(a, b))


def test_wrong_groups():
    x = normal(4, 3)
    with pytest.raises(TypeError, match=r"group must be None, 'world', a torch.*got int"):
        sslkern.vcreg_loss(x, group=3)
    with pytest.raises(ValueError, match=r"transport must be torch.bfloat16, torch.float16 or None"):
        distributed.over(transport=torch.int8)
    with pytest.raises(TypeError, match=r"group must be 'world' or a torch.distributed.ProcessGroup, got NoneType"):
        distributed.over(None)
