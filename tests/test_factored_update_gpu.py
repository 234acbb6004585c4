"""The Triton kernels that move a weight by the factors of its gradient, against float64: both rules, tiles that end
within the matrix, dtypes and precisions of the factors, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED, available
from torch import Tensor

from sslkern import backend
from sslkern.ops import factored_update_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = {"momentum": (0, 1), "adam": (2, 3)}  # how many tensors the state has
COEFFICIENTS = {
    "momentum": (0.9, 0.7, 0.01, 0.98, -0.1, 0.05),
    "adam": (0.5, 0.1, 0.99, 0.01, 0.999, 0.03, 1.2, 1e-3),
}
SHAPES = ((1, 1, 1), (0, 5, 3), (5, 70, 130), (70, 33, 16), (130, 64, 128), (3, 700, 200), (33, 1, 1100))  # N, q, p
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def triton():
    with backend.use(available("triton")):
        yield


@pytest.fixture
def precision():
    """torch's switch, as it was afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def problem(n: int, q: int, p: int, rule: str, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """w, the state, dy, x and coefficients. Second moments are positive."""
    w, *state = torch.randn(1 + size, q, p).unbind()
    state[1:] = [t.square() for t in state[1:]]
    factors = [torch.randn(n, side).to(dtype) for side in (q, p)]
    given = [w, *state, *factors, torch.tensor(COEFFICIENTS[rule])]
    return [t.to(DEVICE, copy=True) for t in given]


def moved(given: list[Tensor], rule: str) -> list[Tensor]:
    """The new w and state, and the squared norm."""
    w, *state, dy, x, coefficients = [t.clone() for t in given]
    return [w, *state, factored_update_(w, state, dy, x, coefficients, rule)]


def truth(given: list[Tensor], rule: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    with backend.use("reference"):
        return moved([t.to(dtype) for t in given], rule)


def errors(given: list[Tensor], rule: str) -> list[float]:
    """The greatest of each matrix, against its largest number; and whether the norm is that of the new w."""
    ours = moved(given, rule)
    assert ours[-1].dtype == torch.float64
    assert abs(ours[-1] - ours[0].double().square().sum()) <= 1e-6 * ours[-1]
    pairs = zip(ours[:-1], truth(given, rule)[:-1], strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def check(given: list[Tensor], rule: str) -> None:
    """By the rule: 4 times the error of the plain formula, and 8 eps of the scale."""
    ours, exact = moved(given, rule), truth(given, rule)
    plain = truth(given, rule, torch.float32)
    for a, b, c in zip(ours, plain, exact, strict=True):
        limit = 4 * (b - c).abs().max() + 8 * torch.finfo(torch.float32).eps * c.abs().max()
        assert a.shape == c.shape and (a - c).abs().max() <= limit


@pytest.mark.parametrize("rule, size", [(rule, size) for rule, sizes in RULES.items() for size in sizes])
def test_every_shape(rule, size):
    for shape in SHAPES:
        check(problem(*shape, rule, size), rule)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_short_factors(dtype):
    """They are not rounded again: the update is that of their values in float64. Of aligned rows and of others."""
    for shape in ((70, 33, 130), (40, 64, 48)):
        check(problem(*shape, "momentum", 1, dtype), "momentum")
        check(problem(*shape, "adam", 2, dtype), "adam")


def test_no_rows():
    """P = 0, by any dtype of the factors."""
    for dtype in (torch.float32, torch.bfloat16):
        given = problem(0, 20, 130, "momentum", 1, dtype)
        w, m, *_ = moved(given, "momentum")
        torch.testing.assert_close(m, 0.9 * given[1] + 0.01 * given[0])
        torch.testing.assert_close(w, 0.98 * given[0] - 0.1 * m)


def test_precision(precision):
    """Of float32 factors, by torch's switch; and not at all alike."""
    given, found = problem(100, 70, 40, "momentum", 0), {}
    for setting in ("highest", "high", "medium"):
        precision(setting)
        (found[setting],) = errors(given, "momentum")
    assert found["highest"] < 1e-6 and 1e-7 < found["high"] < 3e-5 and 1e-4 < found["medium"] < 2e-2, found


def test_any_strides():
    w, m, dy, x, coefficients = problem(37, 48, 130, "momentum", 1)
    expected = moved([w, m, dy, x, coefficients], "momentum")
    new, state = w.clone(), m.clone()
    wide = x.repeat_interleave(2, 1)[:, ::2]
    square = factored_update_(new, [state], dy.mT.contiguous().mT, wide, coefficients)
    assert all(map(torch.equal, (new, state, square), expected))
    shifted = torch.cat([dy.new_zeros(1), dy.flatten()])[1:].view(dy.shape)  # rows that begin between 16 bytes
    short = [t.bfloat16() for t in (dy, x)]
    odd = torch.cat([short[0].new_zeros(1), short[0].flatten()])[1:].view(dy.shape)
    for factors, others in (((dy, x), (shifted, x)), (short, (odd, short[1]))):
        results = [moved([w, m, *pair, coefficients], "momentum") for pair in (factors, others)]
        assert all(map(torch.equal, *results))


def test_what_is_not_finite():
    """NaN of a factor goes through one row or column, NaN of a weight or of the state stays where it is, and the
    largest second moment is NaN where either is."""
    given = problem(9, 40, 20, "adam", 3)
    given[0][0, 0] = given[2][1, 1] = given[3][2, 2] = given[4][3, 7] = torch.nan
    ours, exact = moved(given, "adam"), truth(given, "adam")
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert ours[3][1, 1].isnan() and ours[3][2, 2].isnan() and not ours[2][2, 2].isnan() and ours[0][:, 0].isnan().any()
    given = problem(9, 40, 20, "momentum", 1)
    given[1][5, 3] = given[0][6, 6] = torch.nan
    for a, b in zip(moved(given, "momentum"), truth(given, "momentum"), strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_small_second_moments():
    """A subnormal v has a root, which divides where eps is 0."""
    given = problem(4, 5, 6, "adam", 2)
    for t in (given[0], given[1], given[3]):
        t.zero_()
    given[1].fill_(1e-20)
    given[2].fill_(1e-39)
    given[-1][-1] = 0
    (ours, *_, square), (exact, *_) = moved(given, "adam"), truth(given, "adam")
    torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(square, ours.double().square().sum())


def test_what_overflows():
    """An infinite row of P is one of w, and the norm is infinite, not NaN."""
    w, dy, x, coefficients = problem(6, 5, 7, "momentum", 0, torch.bfloat16)
    dy[2, 3] = torch.inf
    ours, square = moved([w, dy, x.abs() + 1, coefficients], "momentum")
    assert ours[3].isinf().all() and ours.isinf().sum() == 7 and square.isinf()


def test_bits():
    """The same again; a program adds a sum of squares of its own, and no order is left to chance."""
    given = problem(40, 150, 300, "adam", 2)
    assert all(map(torch.equal, moved(given, "adam"), moved(given, "adam")))


def test_nothing_is_touched_past_the_end():
    """NaN around the tensors never shows, and stays."""
    room = torch.full((4, 8000), torch.nan, device=DEVICE)
    n, q, p = 9, 70, 37
    w, m = (room[k, 96 : 96 + q * p].view(q, p).normal_() for k in range(2))
    dy, x = (room[k, 96 : 96 + n * side].view(n, side).normal_() for k, side in ((2, q), (3, p)))
    factored_update_(w, [m], dy, x, torch.tensor(COEFFICIENTS["momentum"], device=DEVICE))
    assert w.isfinite().all() and m.isfinite().all()
    assert room.isfinite().sum() == 2 * q * p + n * (q + p)


def test_weights_of_float64_are_refused():
    given = [t.double() for t in problem(3, 4, 5, "momentum", 1)]
    with pytest.raises(RuntimeError, match="float64 is not among its kernel's dtypes"):
        moved(given, "momentum")
