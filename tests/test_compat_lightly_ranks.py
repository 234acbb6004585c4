"""The losses of `sslkern.train.compat.lightly` that gather, in two processes."""

import pytest
import torch
import torch.distributed as dist
from compat_lightly import GATHERED, NTXent, views
from ranks import TOLERANCE, close, divisions, mean_over_ranks, mine, run
from torch import nn

from sslkern.train.compat import lightly


def joint():
    """Value and gradient of every loss that gathers, against the formula of the joint batch."""
    for key, case in GATHERED.items():
        for dtype, tolerance in TOLERANCE.items():
            a, b = (x.detach().to(dtype) for x in views((9, 7)))
            for counts in divisions(9):
                if "Barlow" in key and min(counts) < 2:
                    continue  # a batch norm of one row
                doubles = [x.double().requires_grad_() for x in (a, b)]
                expected = case.formula(**case.settings, counts=counts)(*doubles)
                truth = torch.autograd.grad(expected, doubles)
                leaves = [mine(x, counts).requires_grad_() for x in (a, b)]
                value = getattr(lightly, case.name)(**case.settings, gather_distributed=True)(*leaves)
                close(mean_over_ranks(value), expected, tolerance, (key, counts, "value"), scale=1.0)
                for found, e in zip(torch.autograd.grad(value, leaves), truth, strict=True):
                    found = found.double() / dist.get_world_size()
                    close(found, mine(e, counts), 2 * tolerance, (key, counts), scale=float(e.abs().max()))


def bank_of_all_ranks():
    """All banks get the rows of all ranks in rank order; the loss is that of this rank's rows."""
    for counts in divisions(5):
        torch.manual_seed(0)
        loss = lightly.NTXentLoss(memory_bank_size=(12, 3), gather_distributed=True).double()
        plain = NTXent(memory_bank_size=(12, 3))
        plain.bank = loss.memory_bank.bank.clone()
        for step in range(3):
            a, b = (x.detach() for x in views((5, 3), step))
            leaves = [mine(x, counts).requires_grad_() for x in (a, b)]
            value = loss(*leaves)
            own = [x.detach().requires_grad_() for x in leaves]
            held, plain.place = plain.place, 0
            expected = plain_value(plain, own)
            plain.place = held
            plain.put(nn.functional.normalize(b))
            close(value, expected, 1e-12, (counts, step))
            for found, truth in zip(
                torch.autograd.grad(value, leaves), torch.autograd.grad(expected, own), strict=True
            ):
                close(found, truth, 1e-12, (counts, step, "gradient"))
            close(loss.memory_bank.bank, plain.bank, 1e-12, (counts, step, "bank"))
            assert int(loss.memory_bank.bank_ptr) == plain.place


def plain_value(plain, own):
    """Its loss, without an update."""
    kept = plain.bank
    value = plain(*own)
    plain.bank = kept
    return value


def errors_on_all_ranks():
    """Bad views in one of them stop the other too."""
    rank = dist.get_rank()
    for name in sorted({case.name for case in GATHERED.values()}):
        with pytest.raises(
            ValueError if rank else RuntimeError, match="same shape" if rank else "Invalid input on rank 1"
        ):
            getattr(lightly, name)(gather_distributed=True)(torch.ones(4, 3), torch.ones(4, 3 - 2 * rank))


def test_ranks(tmp_path):
    run(2, [joint, bank_of_all_ranks, errors_on_all_ranks], tmp_path)
