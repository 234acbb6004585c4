"""The losses of `sslkern.train.compat.lightly` that are not contrastive and gather, in two processes."""

import pytest
import torch
import torch.distributed as dist
from compat_lightly_more import CASES, GATHERED, formula, leaves_of
from ranks import close, mean_over_ranks
from ranks import run as run_ranks

from sslkern.train.compat import lightly

GRID = ("SIGReg", "LeJEPA")  # the values of phi are float32, as in lightly
GATHERING = sorted({case.name for case in GATHERED.values()})


def first(name):
    return next(case for case in CASES.values() if case.name == name)


def of_case(case, **more):
    return getattr(lightly, case.name)(**case.settings, **more).double()


@pytest.mark.parametrize("name", GATHERING)
def test_gathering_asks_once_for_torch_distributed(name, monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "is_available", lambda: asked.append(1) or True)
    of_case(first(name), gather_distributed=False)
    assert not asked
    of_case(first(name), gather_distributed=True)
    assert asked == [1]
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed is True but torch"):
        of_case(first(name), gather_distributed=True)


def of_first_axis(case, shapes, rank, size):
    """The leaves of a rank are its rows of the leaves of all ranks."""
    axis = 1 if case.name in ("SIGReg", "LeJEPALoss") else 0
    joint = [torch.cat(parts, axis) for parts in zip(*(leaves_of(shapes, rank=r) for r in range(size)), strict=True)]
    return axis, [x.detach().requires_grad_() for x in joint]


def joint():
    """Value and gradient of the losses that gather, against the formula of the joint batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for key, case in GATHERED.items():
        if "VICRegL" in key:
            continue  # its grids are made from the maps, so the joint batch has others; see below
        for shapes in case.shapes:
            axis, all_rows = of_first_axis(case, shapes, rank, size)
            own = [x.detach().chunk(size, axis)[rank].clone().requires_grad_() for x in all_rows]
            results = []
            for loss, leaves in ((of_case(case, gather_distributed=True), own), (formula(case), all_rows)):
                args, kwargs = case.make(*leaves)
                if "DetCon" in key:
                    masks = case.make(*all_rows)[0][-2:]
                    args = (*args[:-2], *(m if leaves is all_rows else m.chunk(size)[rank] for m in masks))
                torch.manual_seed(3 + (rank if leaves is own else 0))  # the directions are those of the first rank
                value = loss(*args, **kwargs)
                results.append((value, torch.autograd.grad(value, leaves)))
            (value, grads), (expected, truth) = results
            limit = 1e-6 if key in GRID else 1e-12
            if key in ("SIGReg", "TiCo"):
                close(value, expected, limit, (key, "value on every rank"), scale=1.0)
            close(mean_over_ranks(value), expected, limit, (key, "value"), scale=1.0)
            for found, e in zip(grads, truth, strict=True):
                close(found / size, e.chunk(size, axis)[rank], limit, (key, shapes), scale=float(e.abs().max()))


def large_features():
    """Equal rows on all ranks: the joint batch has the same invariance, hinge and, but for N - 1, covariance."""
    case = CASES["VICRegL"]
    args, _ = case.make(*leaves_of(case.shapes[0]))
    found = of_case(case, gather_distributed=True, mu_param=0.0, nu_param=0.0)(*args)
    expected = of_case(case, mu_param=0.0, nu_param=0.0)(*args)
    close(found, expected, 1e-12, "invariance")
    assert of_case(case, gather_distributed=True)(*args) != of_case(case)(*args)


def errors_on_all_ranks():
    bad = torch.ones(4, 3 - 2 * dist.get_rank())
    said = ("Invalid input on rank 1", "same shape")[dist.get_rank()]
    with pytest.raises((ValueError, RuntimeError), match=said):
        lightly.TiCoLoss(gather_distributed=True)(torch.ones(4, 3), bad)


def test_ranks(tmp_path):
    run_ranks(2, [joint, large_features, errors_on_all_ranks], tmp_path)
