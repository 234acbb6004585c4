"""Losses over prototypes against their definitions in fp64, and what their block-wise computation must not lose."""

import prototype_heads as plain
import pytest
import torch
from memory import allocated
from prototype_heads import unit

from sslkern.core.ranks import ALONE
from sslkern.losses import (
    DINOLoss,
    IBOTPatchLoss,
    dino_center,
    dino_loss,
    ibot_patch_loss,
    msn_loss,
    swav_loss,
)
from sslkern.ops import _prototype_blocks as blocks
from sslkern.ops import prototypes as ops

MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]]).bool()


@pytest.fixture(params=("few", "blocks"))
def kept(request, monkeypatch):
    """Few logits, which are kept; and blocks of at most 3 rows, of which nothing is kept."""
    if request.param == "blocks":
        monkeypatch.setattr(blocks, "_NUMBERS", {"cpu": 1, "cuda": 1})
        monkeypatch.setattr(blocks, "_LEAST_ROWS", 3)
        monkeypatch.setattr(blocks, "_COLUMNS", 4)
        monkeypatch.setattr(blocks, "_KEPT", 0)


def views(number, n, d, seed=0):
    return [unit(n, d, seed=seed + k) for k in range(number)]


def calls():
    """(name, ours, the definition, leaves), where both functions take the leaves."""
    for number, codes, n, d, k, iterations in (
        (2, 2, 7, 5, 11, 3),
        (4, 2, 8, 3, 6, 1),
        (3, 1, 1, 1, 2, 2),
        (3, 3, 5, 4, 1, 3),
    ):
        settings = {"codes": codes, "iterations": iterations, "temperature": 0.3, "epsilon": 0.2}
        yield (
            f"swav {number} {codes} {n} {d} {k}",
            lambda *z, s=settings: swav_loss(z[:-1], z[-1], **s),
            lambda *z, s=settings: plain.swav(*z, **s),
            [*views(number, n, d), unit(k, d, seed=9)],
        )
    queue = views(2, 4, 5, seed=20)
    yield (
        "swav, queue",
        lambda *z: swav_loss(z[:-1], z[-1], queue=queue),
        lambda *z: plain.swav(*z, queue=queue),
        [*views(3, 7, 5), unit(11, 5, seed=9)],
    )
    for students, teachers, n, d, e, k in (
        (2, 2, 7, 5, 4, 11),
        (5, 2, 4, 3, 3, 9),
        (1, 2, 3, 2, 6, 4),
        (2, 1, 1, 1, 1, 1),
    ):
        y, v, center = views(teachers, n, e, seed=30), unit(k, e, seed=40), torch.linspace(-0.3, 0.5, k).double()
        for c in (None, center):
            yield (
                f"dino {students} {teachers} {n} {d} {k} {c is None}",
                lambda *z, y=y, v=v, c=c: dino_loss(z[:-1], y, z[-1], v, c),
                lambda *z, y=y, v=v, c=c: plain.dino(z[:-1], y, z[-1], v, c),
                [*views(students, n, d), unit(k, d, seed=9)],
            )
    y, v, c = unit(6, 3, seed=50), unit(11, 3, seed=51), torch.linspace(-0.3, 0.5, 11).double()
    yield (
        "ibot",
        lambda z, w, y=y, v=v: ibot_patch_loss(z, y, w, v, MASK, c),
        lambda z, w, y=y, v=v: plain.ibot(z, y, w, v, MASK, c),
        [unit(6, 5), unit(11, 5, seed=1)],
    )
    for number, iterations, entropy, normalize in ((1, 0, 1.0, True), (3, 3, 0.7, True), (2, 1, 0.0, False)):
        settings = {"iterations": iterations, "entropy": entropy, "normalize": normalize}
        y = 3 * unit(7, 5, seed=60)
        yield (
            f"msn {number} {iterations} {entropy}",
            lambda *z, s=settings, y=y: msn_loss(z[:-1], y, z[-1], **s),
            lambda *z, s=settings, y=y: plain.msn(z[:-1], y, z[-1], **s),
            [*(2 * z for z in views(number, 7, 5)), unit(13, 5, seed=9)],
        )


CALLS = {name: rest for name, *rest in calls()}


def value_and_grads(function, leaves, dtype=torch.float64):
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in leaves]
    value = function(*leaves)
    return [
        value.detach(),
        *(g.double() for g in torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)),
    ]


def close(found, expected, tolerance):
    for f, e in zip(found, expected, strict=True):
        assert (f.double() - e).abs().max() <= tolerance * e.abs().max().clamp_min(1e-2), (f, e)


@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradients(name, kept):
    ours, definition, leaves = CALLS[name]
    expected = value_and_grads(definition, leaves)
    close(value_and_grads(ours, leaves), expected, 1e-12)
    close(value_and_grads(ours, leaves, torch.float32), expected, 2e-5)
    with torch.no_grad():
        assert torch.equal(ours(*leaves), ours(*(x.clone().requires_grad_() for x in leaves)))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_rows_are_computed_in_float32(dtype):
    """As the same numbers in float32, with or without autocast, and gradients in the dtype of the rows."""
    for ours, _, leaves in CALLS.values():
        half = [x.to(dtype) for x in leaves]
        expected = value_and_grads(ours, [x.float() for x in half], torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = value_and_grads(ours, half, dtype)
        close(found, [e.double() for e in expected], 2**-7)


def test_mixed_dtypes_and_layouts():
    a, b = views(2, 7, 5)
    w = unit(11, 5, seed=9)
    strided = torch.stack([w, w], -1)[..., 0]
    value = swav_loss([a.float(), b.T.contiguous().T], strided)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, plain.swav(a.float().double(), b, w))


def test_temperatures_are_learnable():
    a, b = views(2, 7, 5)
    w, y = unit(11, 5, seed=9), unit(7, 5, seed=3)
    for ours, definition in (
        (lambda t: swav_loss([a, b], w, t), lambda t: plain.swav(a, b, w, temperature=t)),
        (lambda t: dino_loss([a, b], [a], w, w, temperature=t), lambda t: plain.dino([a, b], [a], w, w, temperature=t)),
        (lambda t: msn_loss([a, b], y, w, t), lambda t: plain.msn([a, b], y, w, t)),
    ):
        grads = []
        for function in (ours, definition):
            t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
            grads.append(torch.autograd.grad(function(t), t)[0])
        torch.testing.assert_close(*grads, rtol=1e-10, atol=0)


@pytest.mark.parametrize("epsilon", (1e-4, 0.003, 0.05, 1e4))
def test_no_temperature_and_no_length_overflows(epsilon, kept):
    """exp(t / epsilon) overflows in float32 from t = 88 epsilon on; codes come from potentials instead."""
    generator = torch.Generator().manual_seed(0)
    a, b, w = (torch.randn(n, 16, generator=generator) for n in (40, 40, 70))
    a[3] *= 30  # an outlier that is far from all others
    settings = {"epsilon": epsilon, "temperature": max(epsilon, 0.01)}
    found = value_and_grads(lambda *z: swav_loss(z[:2], z[2], **settings), [a, b, w], torch.float32)
    exact = value_and_grads(lambda *z: swav_loss(z[:2], z[2], **settings), [a, b, w])
    expected = value_and_grads(lambda *z: plain.swav(*z, **settings), [a, b, w])
    assert all(x.isfinite().all() for x in found)
    close(exact, expected, 1e-8)
    if epsilon >= 0.05:
        close(found, expected, 1e-3)
    half = {"temperature": 1e-4, "teacher_temperature": 1e-5}
    assert dino_loss([a, b], [a, b], w, w, **half).isfinite()
    assert msn_loss([a, b], a, w, 1e-3, target_temperature=1e-4, iterations=3).isfinite()


def test_sinkhorn_makes_the_columns_equal(kept):
    x, w = unit(30, 6) / 0.1, unit(12, 6, seed=1)
    for rows_first in (False, True):
        bias = ops.sinkhorn_potentials(x, w, 200, ALONE, rows_first=rows_first)
        sums = (x @ w.T + bias).softmax(-1).sum(0)
        torch.testing.assert_close(sums, torch.full_like(sums, 30 / 12), rtol=1e-6, atol=0)


def test_few_logits_and_blocks_agree_in_float32(monkeypatch):
    a, b, w = unit(300, 32).float(), unit(300, 32, seed=1).float(), unit(500, 32, seed=2).float()
    results = []
    for numbers in (1 << 22, 0):
        monkeypatch.setattr(blocks, "_KEPT", numbers)
        results.append(value_and_grads(lambda *z: swav_loss(z[:2], z[2]), [a, b, w], torch.float32))
    close(*results, 2e-5)


def test_gradients_of_some_arguments():
    """Features alone, prototypes alone, none; a second backward gives the same, a second derivative raises."""
    a, b = views(2, 7, 5)
    w = unit(11, 5, seed=9)
    expected = value_and_grads(lambda *z: swav_loss(z[:2], z[2]), [a, b, w])
    leaf = w.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(swav_loss([a, b], leaf), leaf)[0], expected[3])
    leaf = a.clone().requires_grad_()
    loss = swav_loss([leaf, b], w)
    first = torch.autograd.grad(3 * loss, leaf, retain_graph=True)[0]
    torch.testing.assert_close(first, 3 * expected[1])
    assert torch.equal(first, torch.autograd.grad(3 * loss, leaf, retain_graph=True)[0])
    (once,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        once.sum().backward()
    assert not swav_loss([a, b], w).requires_grad


def test_the_teacher_gets_no_gradient():
    a, b = views(2, 7, 5)
    w, y, v = (unit(n, 5, seed=s).requires_grad_() for n, s in ((11, 1), (7, 2), (11, 3)))
    assert torch.autograd.grad(dino_loss([a, b], [y], w, v), [w, y, v], allow_unused=True)[1:] == (None, None)
    assert torch.autograd.grad(msn_loss([a, b], y, w), [w, y], allow_unused=True)[1] is None
    assert not dino_center([y], v).requires_grad


def test_nan_reaches_the_loss():
    a, b = views(2, 7, 5)
    w = unit(11, 5, seed=9)
    a[2, 1] = torch.nan
    assert swav_loss([a, b], w).isnan()
    assert dino_loss([b, b], [a, b], w, w).isnan()
    assert msn_loss([a], b, w).isnan()


def test_center():
    teacher, v = views(2, 7, 5), unit(11, 5, seed=1)
    expected = torch.cat([y @ v.T for y in teacher]).mean(0)
    torch.testing.assert_close(dino_center(teacher, v), expected)
    module = DINOLoss(11, momentum=0.8).double()
    w, student = unit(11, 4, seed=2), views(3, 7, 4)
    first = module(student, teacher, w, v)
    torch.testing.assert_close(first, plain.dino(student, teacher, w, v))
    torch.testing.assert_close(module.center, 0.2 * expected)
    second = module(student, teacher, w, v, teacher_temperature=0.07)
    torch.testing.assert_close(second, plain.dino(student, teacher, w, v, 0.2 * expected, teacher_temperature=0.07))
    torch.testing.assert_close(module.center, 0.36 * expected)
    module.eval()(student, teacher, w, v)
    torch.testing.assert_close(module.center, 0.36 * expected)


def test_center_of_patches():
    z, y, w, v = unit(6, 5), unit(6, 3, seed=1), unit(11, 5, seed=2), unit(11, 3, seed=3)
    module = IBOTPatchLoss(11).double()
    torch.testing.assert_close(module(z, y, w, v, MASK), plain.ibot(z, y, w, v, MASK))
    torch.testing.assert_close(module.center, 0.1 * (y @ v.T).mean(0))
    before = module.center.clone()
    assert module(z[:0], y[:0], w, v, MASK & False) == 0
    assert torch.equal(module.center, before)


def test_compiled_as_one_graph():
    a, b = views(2, 7, 5)
    w, y = unit(11, 5, seed=9), unit(7, 5, seed=3)

    def all_losses(a, b, w):
        module_free = (
            swav_loss([a, b], w) + dino_loss([a, b], [y], w, w.detach()) + msn_loss([a, b], y, w, iterations=2)
        )
        return module_free + ibot_patch_loss(a[:6], y[:6], w, w.detach(), MASK)

    compiled = torch.compile(all_losses, fullgraph=True, backend="eager")
    close(value_and_grads(compiled, [a, b, w]), value_and_grads(all_losses, [a, b, w]), 1e-12)


def test_modules_compiled_as_one_graph():
    """The centers move in the graph."""
    a, b = views(2, 6, 5)
    w = unit(11, 5, seed=9)
    for kind, arguments in ((DINOLoss, ([a, b], [a], w, w)), (IBOTPatchLoss, (a, b, w, w, MASK))):
        eager, compiled = kind(11).double(), kind(11).double()
        torch.testing.assert_close(
            torch.compile(compiled, fullgraph=True, backend="eager")(*arguments), eager(*arguments)
        )
        torch.testing.assert_close(compiled.center, eager.center)
        assert eager.center.abs().sum() > 0


def test_operators_are_well_behaved():
    """Schemas, fake kernels and aliasing."""
    x, w, y = torch.randn(2, 5, 3), torch.randn(7, 3), torch.randn(1, 5, 3)
    bias, h = torch.randn(1, 7), torch.randn(7)
    every = {"schema": "test_schema", "fake": "test_faketensor"}
    operators = torch.ops.sslkern_prototypes
    for operator, arguments in (
        (operators.softmax_sums, (x[0], w, None)),
        (operators.potentials, (x[0], None, 3, True)),
        (operators.cross_entropy, (x, w, y, w, bias, None, None, [1.0, 0.0], torch.rand(5), None, True, True)),
        (operators.cross_entropy, (x, w, None, None, bias, torch.tensor(2.0), None, [0.0, 1.0], None, h, False, True)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=tuple(every.values()))


def test_a_stack_by_vmap():
    x, w = torch.stack(views(6, 7, 5)).view(3, 2, 7, 5), unit(11, 5, seed=9)
    found = torch.vmap(lambda z: swav_loss(list(z), w))(x)
    torch.testing.assert_close(found, torch.stack([swav_loss(list(z), w) for z in x]))


def test_memory():
    """No N x K matrix: beside the gradients, a call at (1024, 16, 20000) takes less than half of one such matrix."""
    n, d, k = 1024, 16, 20000
    a, b, w = (unit(m, d, seed=s).float().requires_grad_() for m, s in ((n, 0), (n, 1), (k, 2)))
    matrix, gradients = 4 * n * k, 4 * d * (2 * n + k)

    def swav():
        return torch.autograd.grad(swav_loss([a, b], w), [a, b, w])

    def dino():
        return torch.autograd.grad(dino_loss([a, b], [b], w, w), [a, b, w])

    for call in (swav, dino):
        peak, left = allocated(call)
        assert peak <= 0.4 * matrix + 2 * gradients
        assert left <= gradients + (64 << 10)
    for loss in (swav_loss([a, b], w), dino_loss([a, b], [b], w, w)):
        peak, left = allocated(loss.backward)
        assert left <= peak <= gradients / 8  # the forward's gradients are scaled in place
        a.grad = b.grad = w.grad = None
