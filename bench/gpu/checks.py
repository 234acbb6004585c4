"""What smoke runs: every op, loss, metric, layer and optimizer, at odd shapes, large ones, and published ones."""

from __future__ import annotations

from .check import Check as Check
from .layer_checks import factored, modules, normed, rotations, steps
from .layer_checks import off_the_kink as off_the_kink
from .loss_checks import columns, contrastive, low_rank, measures, pair_ops, projections


def all_checks() -> list[Check]:
    groups = (
        columns,
        pair_ops,
        low_rank,
        projections,
        contrastive,
        measures,
        normed,
        rotations,
        factored,
        modules,
        steps,
    )
    return [check for group in groups for check in group()]
