"""What `python -m bench` counts of a call."""

import torch

from bench.run import allocated


def test_the_count_of_memory_sees_workspaces():
    """A temporary and a result count as such, and the result comes back."""
    peak, left, result = allocated(lambda: torch.empty(1000, 1000).add(1))
    assert 8_000_000 <= peak < 8_100_000 and 4_000_000 <= left < 4_100_000 and result.shape == (1000, 1000)
