"""A weight and its state, moved by the factors of the gradient, against the dense rules in fp64."""

import pytest
import torch

import sslkern
from sslkern.ops import factored_update_

backend = pytest.fixture(lambda cpu_backend: cpu_backend)
SHAPES = ((1, 1, 1), (3, 17, 33), (65, 130, 47), (0, 5, 7), (40, 6, 3), (2, 35, 1100), (300, 40, 30), (530, 150, 20))
CASES = (("momentum", 0), ("momentum", 1), ("adam", 2), ("adam", 3))
NUMBERS = {"momentum": (0.9, 0.7, 0.01, 0.99, -0.1, 0.02), "adam": (0.5, 0.1, 0.99, 0.01, 0.98, 0.01, 1.1, 1e-4)}


def given(n, q, p, count, dtype=torch.float64, factors=None):
    """w, its state, dy and x. Second moments are positive."""
    w, *state = (torch.randn(q, p, dtype=dtype).abs_() if k > 1 else torch.randn(q, p, dtype=dtype)
                 for k in range(count + 1))  # fmt: skip
    dy, x = (torch.randn(n, columns, dtype=factors or dtype) for columns in (q, p))
    return w, state, dy, x


def coefficients(rule, dtype=torch.float64):
    return torch.tensor(NUMBERS[rule], dtype=dtype)


def dense(w, state, dy, x, k, rule):
    """The new w and state, in fp64."""
    w, dy, x, *state = (t.double() for t in (w, dy, x, *state))
    k, gradient = k.double().tolist(), dy.T @ x
    if rule == "momentum":
        a, b, c, d, e, f = k
        m = [a * state[0] + b * gradient + c * w] if state else []
        return [d * w + f * gradient + (e * m[0] if state else 0), *m]
    s, one_beta1, beta2, one_beta2, d, step, r, eps = k
    m = state[0] + one_beta1 * (s * gradient - state[0])
    v = beta2 * state[1] + one_beta2 * (s * gradient) ** 2
    highest = [torch.maximum(state[2], v)] if len(state) == 3 else []
    return [d * w - step * m / ((highest or [v])[0].sqrt() * r + eps), m, v, *highest]


def moved(w, state, dy, x, k, rule):
    """The squared norm, and the new w and state."""
    w, *state = (t.clone() for t in (w, *state))
    square = factored_update_(w, state, dy, x, k, rule)
    assert square.shape == () and square.dtype == torch.float64
    return square, [w, *state]


def distance(found, expected):
    return max(float((y - z).abs().max() / z.abs().max()) for y, z in zip(found, expected, strict=True))


@pytest.mark.parametrize(("rule", "count"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_dense_rules(shape, rule, count, backend):
    inputs = (*given(*shape, count), coefficients(rule), rule)
    square, found = moved(*inputs)
    expected = dense(*inputs)
    assert distance(found, expected) < 1e-12
    assert abs(float(square / expected[0].square().sum()) - 1) < 1e-12


@pytest.mark.parametrize(("rule", "count"), CASES)
@pytest.mark.parametrize("factors", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_single_precision(factors, rule, count, backend):
    """Within twice the error of plain torch in fp32, for factors of any dtype; the norm is summed in fp64 but for short
    pieces."""
    for shape in SHAPES:
        inputs = (*given(*shape, count, torch.float32, factors), coefficients(rule, torch.float32), rule)
        square, found = moved(*inputs)
        with sslkern.backend.use("reference"):
            plain = moved(*inputs)[1]
        expected, eps = dense(*inputs), torch.finfo(torch.float32).eps
        for y, z, right in zip(found, plain, expected, strict=True):
            limit = 2 * (z - right).abs().max() + 2 * eps * right.abs().max()
            assert (y - right).abs().max() <= limit, shape
        assert abs(float(square / found[0].double().square().sum()) - 1) < 1e-6


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_any_strides(dtype, backend):
    w, state, dy, x = given(37, 50, 33, 1, torch.float32, dtype)
    k = coefficients("momentum", torch.float32)
    expected = moved(w, state, dy, x, k, "momentum")
    for left, right in (
        (dy.T.contiguous().T, x.T.contiguous().T),
        (torch.stack([dy, dy], -1)[..., 1], torch.cat([x, x], 1)[:, :33]),
    ):
        found = moved(w, state, left, right, torch.stack([k, k], 1)[:, 0], "momentum")
        assert all(torch.equal(y, z) for y, z in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True))
    same = dy[:1].expand(37, -1)
    assert torch.equal(
        moved(w, state, same, x, k, "momentum")[1][0], moved(w, state, same.contiguous(), x, k, "momentum")[1][0]
    )


@pytest.mark.parametrize(("rule", "count"), CASES)
def test_nan_and_infinity_go_where_they_go_in_the_rule(rule, count, backend):
    w, state, dy, x = given(9, 20, 19, count)
    dy[3, 4], x[2, 5], w[0, 0], dy[1, 6] = torch.nan, torch.inf, torch.nan, -torch.inf
    for tensor in state:
        tensor[7, 7] = torch.nan
    if count == 3:
        state[1][8, 8], state[2][9, 9] = torch.nan, torch.nan  # either one makes the maximum NaN
    inputs = (w, state, dy, x, coefficients(rule), rule)
    square, found = moved(*inputs)
    for y, z in zip(found, dense(*inputs), strict=True):
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert bool(y.isfinite().any())
    assert square.isnan()


@pytest.mark.parametrize(("rule", "count"), CASES)
def test_bits_are_those_of_one_thread(rule, count, native):
    threads = torch.get_num_threads()
    for shape in ((20, 300, 2100), (300, 280, 400)):
        inputs = (*given(*shape, count, torch.float32), coefficients(rule, torch.float32), rule)
        found = []
        try:
            for number in (1, 2, 2, 3):
                torch.set_num_threads(number)
                square, tensors = moved(*inputs)
                found.append((square, *tensors))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(y, z) for other in found[1:] for y, z in zip(found[0], other, strict=True))


def test_saved_tensors_notice_the_update(backend):
    w, state, dy, x = given(4, 5, 6, 3)
    before = [t._version for t in (w, *state, dy, x)]
    factored_update_(w, state, dy, x, coefficients("adam"), "adam")
    after = [t._version for t in (w, *state, dy, x)]
    assert all(b > a for a, b in zip(before[:4], after[:4], strict=True)) and after[4:] == before[4:]
    w = w.requires_grad_()
    loss = (w * w).sum()
    with torch.no_grad():
        factored_update_(w, state, dy, x, coefficients("adam"), "adam")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def bad(**changes):
    """What is raised for a call with these arguments changed."""
    w, state, dy, x = given(4, 5, 6, 1)
    arguments = {"w": w, "state": state, "dy": dy, "x": x, "coefficients": coefficients("momentum")} | changes
    before = w.clone()
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)) as caught:
        factored_update_(**arguments)
    assert torch.equal(w, before)
    return f"{caught.type.__name__}: {caught.value}"


def test_errors(backend):
    w = torch.ones(5, 6, dtype=torch.float64)
    assert bad(state=[w, w]) == "ValueError: state must have 0 or 1 tensors for 'momentum', got 2."
    assert bad(rule="adam").startswith("ValueError: state must have 2 or 3 tensors for 'adam', got 1.")
    assert bad(rule="sgd").startswith("ValueError: rule must be")
    assert bad(w=w.half(), state=[]) == "TypeError: w must be float32 or float64, got float16."
    assert bad(w=w.T.contiguous().T).startswith("ValueError: w must be contiguous, because it is written in place")
    assert "state[0]" in bad(state=[w[:4]]) and "state[0]" in bad(state=[w.float()])
    assert bad(dy=torch.ones(4, 6).double()) == "ValueError: dy must have shape (4, 5), got (4, 6)."
    assert bad(x=torch.ones(3, 6).double()) == "ValueError: x must have shape (4, 6), got (3, 6)."
    assert bad(x=torch.ones(4, 6)).startswith("TypeError: dy and x must both be float64, bfloat16 or float16")
    assert bad(coefficients=torch.ones(5).double()).startswith("ValueError: coefficients must be float64 of shape (6,)")
    assert bad(coefficients=torch.ones(6)).startswith("ValueError: coefficients must be float64 of shape (6,)")
    assert bad(w=w.clone().requires_grad_()).startswith("RuntimeError: factored_update_ cannot be differentiated")
    with pytest.raises(NotImplementedError, match=r"does not run inside torch\.vmap"):
        torch.vmap(lambda y, z: factored_update_(w, [], y, z, coefficients("momentum")))(
            torch.ones(2, 4, 5).double(), torch.ones(2, 4, 6).double()
        )
