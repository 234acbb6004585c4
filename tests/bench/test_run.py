"""What `python -m bench` counts of a call."""

import torch

from bench import report
from bench.more_losses import CASES, more_case
from bench.run import allocated
from bench.summary import FAMILIES


def test_the_count_of_memory_sees_workspaces():
    """A temporary and a result count as such, and the result comes back."""
    peak, left, result = allocated(lambda: torch.empty(1000, 1000).add(1))
    assert 8_000_000 <= peak < 8_100_000 and 4_000_000 <= left < 4_100_000 and result.shape == (1000, 1000)


def test_every_further_loss_has_a_table():
    for family, shape in CASES:
        case = more_case(family, shape, "cpu")
        assert case.family in FAMILIES and case.family in report.COLUMNS and case.note == family
