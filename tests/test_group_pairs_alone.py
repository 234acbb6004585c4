"""A `group` of losses of all pairs in one process, and in their modules."""

import pytest
import torch
from group_pairs import LABELS, LOSSES, rows, value_and_grad

from sslkern import losses


@pytest.mark.parametrize("case", LOSSES)
def test_without_processes_a_group_is_none(case):
    """Where torch.distributed is not initialised, "world" is this process, and the bits are those of no group."""
    assert all(map(torch.equal, *(value_and_grad(*LOSSES[case], group) for group in ("world", None))))


MODULES = (
    losses.NTXentLoss,
    losses.InfoNCELoss,
    losses.SupervisedContrastiveLoss,
    losses.SigmoidLoss,
    losses.SpectralContrastiveLoss,
)


@pytest.mark.parametrize("module", MODULES)
def test_modules_hold_the_group(module):
    """It is shown if there is one, and taken by the call."""
    made = module(group="world")
    assert "group='world'" in repr(made) and "group" not in repr(module())
    a, b = rows(2)
    inputs = (a, LABELS) if module is losses.SupervisedContrastiveLoss else (a, b)
    assert torch.equal(made(*inputs), module()(*inputs))
    made.group = "everyone"
    with pytest.raises(TypeError, match="group must be None, 'world'"):
        made(*inputs)
