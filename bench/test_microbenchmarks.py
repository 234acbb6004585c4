"""`pytest bench --benchmark-only`: forward + backward of the losses at small shapes."""

from __future__ import annotations

import pytest

import sslkern

from . import baselines
from .cases import views

LOSSES = {
    "vicreg": {
        "sslkern": sslkern.vicreg_loss,
        "three-line": baselines.vicreg_dual,
        "published": baselines.vicreg_published,
    },
    "barlow": {
        "sslkern": sslkern.barlow_twins_loss,
        "three-line": baselines.barlow_dual,
        "published": baselines.barlow_published,
    },
}


@pytest.mark.parametrize("shape", [(128, 512), (256, 2048)], ids=str)
@pytest.mark.parametrize("implementation", ["sslkern", "three-line", "published"])
@pytest.mark.parametrize("loss", ["vicreg", "barlow"])
def test_loss(benchmark, loss, implementation, shape):
    a, b = views(*shape, "cpu")
    f = LOSSES[loss][implementation]
    benchmark.group = f"{loss} {shape}"

    def step():
        a.grad = b.grad = None
        f(a, b).backward()

    benchmark(step)
    assert a.grad.isfinite().all()
