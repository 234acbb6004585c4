"""SIGReg and LeJEPA beyond the walk of all functions: the statistic, the knots, the directions, the messages."""

import math
import pickle

import pytest
import torch
from memory import allocated

import sslkern
from sslkern.losses import LeJEPALoss, SIGRegLoss, lejepa_loss, sigreg_loss


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def directions(d, k):
    a = normal(d, k, seed=7)
    return a / a.norm(dim=0)


def trapezoid(z, a, t):
    """The integral of |mean exp(i t x) - phi|^2 phi over all of the knots."""
    phi = torch.exp(-t.square() / 2)
    errors = torch.exp(1j * (z @ a)[..., None] * t).mean(-3) - phi
    return torch.trapezoid(errors.abs().square() * phi, t).mean()


@pytest.mark.parametrize("shape", ((9, 4), (1, 3), (5, 1), (2, 33, 17), (3, 8, 70)), ids=str)
@pytest.mark.parametrize(("knots", "symmetric"), ((17, False), (2, False), (10, True), (9, True), (2, True)))
def test_it_is_the_integral_over_both_signs(shape, knots, symmetric):
    z, a = normal(*shape).requires_grad_(), directions(shape[-1], 6)
    loss = sigreg_loss(z, directions=a, knots=knots, t_max=2.5, symmetric=symmetric)
    t = torch.linspace(-2.5, 2.5, knots if symmetric else 2 * knots - 1, dtype=torch.float64)
    expected = shape[-2] * trapezoid(z, a, t)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    found, gradient = (torch.autograd.grad(x, z)[0] for x in (loss, expected))
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_it_falls_as_rows_become_normal():
    """Of normal rows, the statistic does not grow with N; of others, it does."""
    a, small, large = directions(8, 64), normal(256, 8), normal(4096, 8)
    expected = math.sqrt(2 * math.pi) * (1 - math.sqrt(1 / 3))  # int (1 - phi^2) phi dt
    for z in (small, large):
        assert expected / 3 < sigreg_loss(z, directions=a, t_max=6.0, knots=33).item() < 3 * expected
    wide = [sigreg_loss(2 * z, directions=a).item() for z in (small, large)]
    assert wide[1] > 10 * wide[0] > 30 * expected


def test_directions():
    """Unit vectors; the same of a seed; those of torch's generator; in the dtype of the loss."""
    z = normal(20, 6, dtype=torch.float32)
    assert torch.equal(sigreg_loss(z, generator=3), sigreg_loss(z, generator=3))
    assert not torch.equal(sigreg_loss(z, generator=3), sigreg_loss(z, generator=4))
    torch.manual_seed(3)
    default = sigreg_loss(z, num_slices=50)
    assert torch.equal(default, sigreg_loss(z, num_slices=50, generator=3))
    assert torch.equal(default, sigreg_loss(z, num_slices=50, generator=torch.Generator().manual_seed(3)))
    a = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(default, sigreg_loss(z, directions=a / a.norm(dim=0)), rtol=1e-6, atol=0)
    assert sigreg_loss(z.bfloat16()).dtype == torch.float32 and sigreg_loss(z.double()).dtype == torch.float64


def test_drawn_directions_compile():
    torch.manual_seed(0)
    expected = sigreg_loss(torch.ones(6, 4), num_slices=9)
    torch._dynamo.reset()
    call = torch.compile(lambda z: sigreg_loss(z, num_slices=9), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    torch.testing.assert_close(call(torch.ones(6, 4)), expected)


def test_lejepa():
    """The centres are the means of the global views alone, and get a gradient."""
    g, z, a = normal(2, 9, 5).requires_grad_(), normal(4, 9, 5, seed=1).requires_grad_(), directions(5, 8)
    loss = lejepa_loss(g, z, 0.2, directions=a)
    views = torch.cat((g, z))
    expected = 0.2 * sigreg_loss(views, directions=a) + 0.8 * (views - g.mean(0)).square().mean()
    torch.testing.assert_close(loss, expected)
    for x, y in zip(torch.autograd.grad(loss, (g, z)), torch.autograd.grad(expected, (g, z)), strict=True):
        torch.testing.assert_close(x, y)
    alone = 0.05 * sigreg_loss(g, directions=a) + 0.95 * (g - g.mean(0)).square().mean()
    torch.testing.assert_close(lejepa_loss(g, directions=a), alone)


def test_memory(native):
    """Less than a tenth of the extra memory of the formula that trainers use."""
    z, a = normal(4, 128, 64, dtype=torch.float32).requires_grad_(), directions(64, 256).float()
    ours, _ = allocated(lambda: sigreg_loss(z, directions=a).backward())
    theirs, _ = allocated(lambda: trapezoid_of_angles(z, a).backward())
    assert ours < theirs / 10


def trapezoid_of_angles(z, a):
    angles = (z @ a)[..., None] * torch.linspace(0, 3, 17)
    return angles.cos().mean(-3).square().sum() + angles.sin().mean(-3).square().sum()


Z, V = torch.ones(4, 3), torch.ones(2, 4, 3)
REFUSED = {
    "list": (lambda: sigreg_loss([1.0]), TypeError, "z must be a torch.Tensor"),
    "none": (lambda: sigreg_loss(Z[:0]), ValueError, "at least 1 rows"),
    "slices": (lambda: sigreg_loss(Z, num_slices=0), ValueError, "num_slices must be an integer >= 1, got 0"),
    "knots": (lambda: sigreg_loss(Z, knots=1), ValueError, "knots must be an integer >= 2, got 1"),
    "t_max": (lambda: sigreg_loss(Z, t_max=-1.0), ValueError, "t_max must be a finite number > 0"),
    "symmetric": (lambda: sigreg_loss(Z, symmetric=1), TypeError, "symmetric must be True or False"),
    "directions": (
        lambda: sigreg_loss(Z, directions=torch.ones(4, 2)),
        ValueError,
        r"directions must have shape \(3, K",
    ),
    "stack": (lambda: sigreg_loss(V, directions=V), ValueError, r"directions must have shape \(3, K\), got"),
    "generator": (lambda: sigreg_loss(Z, generator="3"), TypeError, "generator must be a torch.Generator, an integer"),
    "module": (lambda: SIGRegLoss(knots=0), ValueError, "knots must be"),
    "group": (lambda: SIGRegLoss(group=3), TypeError, "group must be"),
    "views": (
        lambda: lejepa_loss(Z),
        ValueError,
        r"global_views must have shape \(V, N, D\) with V >= 1, got \(4, 3\)",
    ),
    "local": (lambda: lejepa_loss(V, V[:, :3]), ValueError, "global_views and local_views must have the same N and D"),
    "device": (lambda: lejepa_loss(V, V.to("meta")), ValueError, "must be on the same device"),
    "lambd": (lambda: LeJEPALoss("x"), TypeError, "lambd must be a finite number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_modules():
    loss = SIGRegLoss(num_slices=64, generator=3, group="world")
    assert repr(loss) == "SIGRegLoss(num_slices=64, knots=17, t_max=3.0, symmetric=False, generator=3, group='world')"
    assert repr(pickle.loads(pickle.dumps(loss))) == repr(loss) and not list(loss.parameters())
    z = normal(12, 5)
    assert torch.equal(SIGRegLoss(num_slices=64, generator=3)(z), sigreg_loss(z, num_slices=64, generator=3))
    weight = torch.nn.Parameter(torch.tensor(0.3))
    views = LeJEPALoss(weight, knots=9)
    assert dict(views.named_parameters()) == {"lambd": weight} and "lambd=tensor(0.3000), num_slices=1024" in repr(
        views
    )
    assert sslkern.sigreg_loss is sigreg_loss
