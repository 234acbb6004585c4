"""A weight and its optimizer state moved by factors, on every back-end, against float64."""

import pytest
import torch

from sslkern import backend as backends
from sslkern.ops import factored_update_

DOUBLE = torch.float64
FORMS = (("momentum", 0), ("momentum", 1), ("adam", 2), ("adam", 3))
SHAPES = ((1, 1, 1), (3, 17, 33), (0, 5, 7), (40, 9, 5), (300, 65, 130), (600, 40, 33), (64, 256, 512))


def arguments(shape, form, dtype=DOUBLE):
    """(w, state, dy, x, coefficients), for N, q and p."""
    (n, q, p), (rule, slots) = shape, form
    generator = torch.Generator().manual_seed(n + q + p)
    w, *state = torch.rand(1 + slots, q, p, generator=generator, dtype=DOUBLE).to(dtype).unbind()
    dy, x = (torch.randn(n, side, generator=generator, dtype=DOUBLE).to(dtype) for side in (q, p))
    return w, state, dy, x, torch.rand(6 if rule == "momentum" else 8, generator=generator, dtype=DOUBLE).to(dtype)


def moved(arguments, rule):
    """[w, state, square] after an update of copies."""
    w, state, *rest = arguments
    w, state = w.clone(), [t.clone() for t in state]
    square = factored_update_(w, state, *rest, rule)
    assert square.dtype == DOUBLE and square.shape == ()
    return [w, *state, square]


def error(found, truth):
    return max(((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item() for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(form, shape, cpu_backend):
    """In float64 to 1e-12; in float32 within twice the error of the reference."""
    with backends.use("reference"):
        truth = moved(arguments(shape, form), form[0])
    assert error(moved(arguments(shape, form), form[0]), truth) < 1e-12
    single = arguments(shape, form, torch.float32)
    doubles = [t.double() if isinstance(t, torch.Tensor) else [s.double() for s in t] for t in single]
    with backends.use("reference"):
        truth, plain = moved(doubles, form[0]), moved(single, form[0])
    found = moved(single, form[0])
    assert error(found, truth) <= 2 * error(plain, truth) + 1e-7
    assert all(map(torch.equal, found, moved(single, form[0])))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_factors_and_any_strides(dtype, cpu_backend):
    """The weight stays in float32, and the sum is in float32."""
    w, state, dy, x, k = arguments((30, 20, 24), ("momentum", 1), torch.float32)
    half = dy.to(dtype), x.to(dtype)
    expected = moved((w, state, *(t.float() for t in half), k), "momentum")
    torch.testing.assert_close(moved((w, state, *half, k), "momentum"), expected)
    strided = torch.stack([dy, dy], 2)[..., 0], x.mT.contiguous().mT
    torch.testing.assert_close(moved((w, state, *strided, k), "momentum"), moved((w, state, dy, x, k), "momentum"))
    row = x[:1].expand(30, -1)
    torch.testing.assert_close(
        moved((w, state, dy, row, k), "momentum"), moved((w, state, dy, row.contiguous(), k), "momentum")
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nan_and_infinity(form, cpu_backend):
    """They spread as far as in the reference. A maximum with NaN is NaN."""
    for bad in (torch.nan, torch.inf):
        given = arguments((5, 33, 20), form, torch.float32)
        given[2][3, 7] = bad
        if form[1] == 3:
            given[1][2][4, 4] = torch.nan
        found = moved(given, form[0])
        with backends.use("reference"):
            expected = moved(given, form[0])
        torch.testing.assert_close(found[:-1], expected[:-1], equal_nan=True)
        assert not found[-1].isfinite()


def test_bits_do_not_depend_on_the_number_of_threads():
    given, threads = arguments((70, 300, 260), ("momentum", 1), torch.float32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(moved(given, "momentum"))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


def test_what_is_refused():
    w, state, dy, x, k = arguments((3, 4, 5), ("momentum", 1), torch.float32)
    version = w._version
    factored_update_(w, state, dy, x, k)
    assert w._version > version
    for change, message in (
        ({"rule": "sgd"}, "rule must be one of 'momentum', 'adam', got 'sgd'"),
        ({"state": [w, w]}, "state must have 0 or 1 tensors for 'momentum', got 2"),
        ({"w": w.mT.contiguous().mT}, "w must be contiguous, because it is written in place"),
        ({"state": [torch.ones(4, 4)]}, "w and state"),
        ({"dy": dy[:2]}, r"x must have shape \(2, 5\), got \(3, 5\)"),
        ({"x": x[:, :4]}, r"x must have shape \(3, 5\), got \(3, 4\)"),
        ({"coefficients": k[:5]}, r"coefficients must be float32 of shape \(6,\) for 'momentum'"),
        ({"dy": dy.to("meta")}, "dy and w must be on the same device"),
    ):
        given = {"w": w, "state": state, "dy": dy, "x": x, "coefficients": k} | change
        with pytest.raises(ValueError, match=f"^{message}"):
            factored_update_(**given)
    with pytest.raises(TypeError, match=r"^w must be float32 or float64, got bfloat16"):
        factored_update_(w.bfloat16(), state, dy, x, k)
    with pytest.raises(
        TypeError, match=r"^dy and x must both be float32, bfloat16 or float16, got float64 and float32"
    ):
        factored_update_(w, state, dy.double(), x, k)
    with pytest.raises(RuntimeError, match=r"^factored_update_ cannot be differentiated"):
        factored_update_(w.requires_grad_(), state, dy, x, k)
    with pytest.raises(NotImplementedError, match=r"^factored_update_ takes one weight, not a stack"):
        torch.vmap(lambda dy: factored_update_(w.detach(), state, dy, x, k))(torch.stack([dy, dy]))
