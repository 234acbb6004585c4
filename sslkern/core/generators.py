"""Generators of random numbers from what users pass as `random_state`."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch


def generator(random_state: Any) -> torch.Generator:
    """A generator on the CPU for `random_state`: None for a new seed at each call, an int, a NumPy RandomState or
    Generator, which is advanced, or a torch.Generator, which is used itself."""
    if isinstance(random_state, torch.Generator):
        return random_state
    made = torch.Generator()
    if random_state is None:
        made.seed()
        return made
    draw = getattr(random_state, "integers", getattr(random_state, "randint", None))  # NumPy's new and old name
    if draw is not None:
        random_state = draw(2**31 - 1)
    if not isinstance(random_state, Integral) or isinstance(random_state, bool):
        raise TypeError(
            "random_state must be None, an int, a numpy RandomState or Generator, or a torch.Generator, got "
            f"{type(random_state).__name__}."
        )
    made.manual_seed(int(random_state))
    return made
