"""Losses of several ranks: invalid input, uneven rows or a dead process on one is an error on all."""

import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import mine, normal, run

import sslkern
from sslkern import distributed, ops
from sslkern.losses import spectral_contrastive_loss
from sslkern.metrics import hsic

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
    """Any invalid input on one rank, eager or compiled, raises on all, and their next collective is the same one."""
    first, views = dist.get_rank() == 0, [normal(6, 5, seed=k) for k in range(2)]
    for name, loss in REFUSED.items():
        torch._dynamo.reset()
        whole = torch.compile(loss, fullgraph=True, backend="eager")
        for function in (loss, whole, torch.compile(loss, backend="eager")):
            if function is not loss or not name.startswith("rows"):  # eager ranks may have different rows
                with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
                    function(*views, bad=first)
                said = r"must (be|have|differ)|Invalid input on rank 0|the same number of rows"
                assert re.search(said, str(caught.value)), (name, caught.value)
            ranks = torch.tensor([dist.get_rank()])
            dist.all_reduce(ranks)
            assert ranks.item() == dist.get_world_size() * (dist.get_world_size() - 1) // 2
        assert torch.isfinite(loss(*views, bad=False))


UNEVEN = {  # "aot_eager", which may drop and move calls, for losses that gather rows and losses that reduce sums
    "vicreg": (sslkern.vicreg_loss, "aot_eager"),
    "barlow": (sslkern.barlow_twins_loss, "eager"),
    "nt_xent": (sslkern.nt_xent_loss, "aot_eager"),
    "spectral": (spectral_contrastive_loss, "aot_eager"),
    "hsic": (hsic, "eager"),
}


def compiled_on_uneven_rows():
    """Every rank raises when the graph runs, whatever the loss does next: none returns a number or waits."""
    counts = [5] * (dist.get_world_size() - 1) + [7]
    own = [mine(normal(sum(counts), 6, seed=k), counts) for k in range(2)]
    for name, (loss, compiler) in UNEVEN.items():
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=r"Under torch\.compile all ranks of a group must be given the same"):
            torch.compile(partial(loss, group="world"), fullgraph=True, backend=compiler)(*own)
        assert torch.isfinite(loss(*own, group="world")), name  # the ranks are still in step, and eager has the value


def dead_peer():
    """A rank that waits for a process that has ended gets an error, not a number."""
    if dist.get_rank() == dist.get_world_size() - 1:
        return
    with pytest.raises(RuntimeError):
        for _ in range(2):  # the first all-gather may have been sent before the peer was gone
            sslkern.vcreg_loss(normal(4, 3), group="world")


def test_uneven_rows_under_compile(tmp_path):
    run(2, (compiled_on_uneven_rows,), tmp_path)


def test_bad_input_on_one_rank(tmp_path):
    run(2, (refused_on_one_rank,), tmp_path)


def test_who_waits_for_the_dead_gets_an_error(tmp_path):
    run(2, (dead_peer,), tmp_path, timeout=10)


def test_wrong_groups():
    x = normal(4, 3)
    with pytest.raises(TypeError, match=r"group must be None, 'world', a torch.*got int"):
        sslkern.vcreg_loss(x, group=3)
    with pytest.raises(ValueError, match=r"transport must be torch.bfloat16, torch.float16 or None"):
        distributed.over(transport=torch.int8)
    with pytest.raises(TypeError, match=r"group must be 'world' or a torch.distributed.ProcessGroup, got NoneType"):
        distributed.over(None)
