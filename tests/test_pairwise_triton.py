"""The Triton kernels over pairs: ragged tiles, both regimes of exponents, wide rows by chunks, bits, and bounds."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED, available
from pairwise import SHAPES, compare, settings

from sslkern import backend
from sslkern.ops import pairwise_reduce

RAGGED = {
    "own 70": ((), 70, 0, 16),
    "70 x 81": ((), 70, 81, 24),
    "stack": ((2,), 6, 5, 4),
    "own stack": ((2,), 9, 0, 2),
}
LOGSUMEXP = [("logsumexp", kernel, mask) for kernel in ("dot", "sqeuclidean") for mask in (None, "same offdiag")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def differences(cases, shapes, scales=(0.7,), tolerance=1e-5) -> str:
    """What differs from fp64, of every case at one of the shapes in turn."""
    shapes = list(shapes.items())
    found = []
    for k, case in enumerate(cases):
        key, shape = shapes[k % len(shapes)]
        for scale in scales:
            found += compare(key, shape, case, scale, torch.float32, DEVICE, tolerance)
    return "\n".join(found)


@pytest.mark.parametrize("reduction", ("logsumexp", "max", "sum", "matmul", "gram"))
def test_every_kernel_and_mask(reduction):
    """Values and gradients by x, y, scale and rhs, at sizes that end within a tile."""
    assert not differences([s for s in settings() if s[0] == reduction], RAGGED)


def test_smallest_shapes():
    small = {key: SHAPES[key] for key in ("1 x 1", "1 x 3", "own 2 x 1", "7 x 4")}
    assert not differences([s for s in settings() if s[2] in (None, "offdiag")], small)


@pytest.mark.parametrize("kernel, scale", (("dot", 30.0), ("dot", -30.0), ("sqeuclidean", -30.0), ("cosine", 1e3)))
def test_exponents_of_a_thousand(kernel, scale):
    """Every row has a maximum of its own; against itself and against others."""
    for key in ("own 70", "70 x 81"):
        for mask in (None, "same offdiag"):
            # t = 1e3 to 4e3 is rounded to 1e-4, and the interpreter's x y' is not (y x')' to the last bit
            assert not differences([("logsumexp", kernel, mask)], {key: RAGGED[key]}, (scale,), 3e-4)


@pytest.mark.parametrize("scale", (0.3, 40.0))
@pytest.mark.parametrize("wide", (False, True))
def test_columns(scale, wide, monkeypatch):
    """The columns of one pass are the rows of the transpose, with its gradients."""
    if wide:
        by_chunks(monkeypatch)
    x, y = (torch.randn(n, 12, device=DEVICE, requires_grad=True) for n in (70, 81))
    both = pairwise_reduce(x, y, scale=scale, both_sides=True)
    one = pairwise_reduce(x, y, scale=scale), pairwise_reduce(y, x, scale=scale)
    weights = [torch.randn_like(v) for v in both]
    for a, b in zip(both, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(both, (x, y), weights)
    for a, b in zip(ours, torch.autograd.grad(one, (x, y), weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_several_tiles_per_program(monkeypatch):
    """Programs that go through several tiles, as those of large inputs do."""
    from sslkern.triton_kernels import (
        pairwise_argmax,
        pairwise_gram,
        pairwise_gram_backward,
        pairwise_logsumexp,
        pairwise_matmul,
    )

    for module in (pairwise_argmax, pairwise_gram, pairwise_logsumexp):
        monkeypatch.setattr(module, "strips_of", lambda n, m, step: (3, -(-m // (3 * step))))
    for module in (pairwise_gram_backward, pairwise_matmul):
        monkeypatch.setattr(module, "PROGRAMS", 1)
    cases = [*LOGSUMEXP, ("max", "dot", "offdiag"), ("matmul", "rbf", None), ("gram", "rbf", None)]
    assert not differences(cases, {"own 200": ((), 200, 0, 6)}, (0.3,))
    x = torch.randn(2, 140, 5, device=DEVICE)
    for kernel in ("rbf", "dot"):
        gram, sums = pairwise_reduce(x, kernel=kernel, reduction="gram")
        with backend.use("reference"):
            expected = pairwise_reduce(x, kernel=kernel, reduction="gram")
        torch.testing.assert_close(gram, expected[0], rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(sums, expected[1], rtol=1e-6, atol=1e-3)


def test_tiles_without_wgmma(monkeypatch):
    """Processors other than Hopper's keep less on chip: their tiles give the same values and gradients."""
    from sslkern.triton_kernels import pairwise_matmul, pairwise_reduce

    assert [pairwise_matmul.tile_of(3, 128, 0, 0, wgmma=wgmma)["BK"] > 0 for wgmma in (True, False)] == [False, True]
    for module in (pairwise_matmul, pairwise_reduce):
        monkeypatch.setattr(module, "has_wgmma", lambda _: False)
    cases = [*LOGSUMEXP, ("sum", "rbf", None), ("matmul", "rbf", None), ("matmul", "softplus", "offdiag")]
    assert not differences(cases, {"own 70": ((), 70, 0, 120), "70 x 81": ((), 70, 81, 120)}, (0.05,))
    by_steps = [*LOGSUMEXP, ("max", "dot", None), ("max", "sqeuclidean", "offdiag")]
    assert not differences(by_steps, {"own 250": ((), 70, 0, 250)}, (0.02,))


def by_chunks(monkeypatch) -> None:
    """All widths as those of more columns than a tile keeps, 64 rows at a time."""
    from sslkern.triton_kernels import pairwise_chunks, pairwise_reduce

    monkeypatch.setattr(pairwise_reduce, "WIDEST", 0)
    monkeypatch.setattr(pairwise_chunks, "NUMBERS", 1)


@pytest.mark.parametrize("setting", ("highest", "high"))
def test_wide_rows(setting, precision, monkeypatch):
    by_chunks(monkeypatch)
    precision(setting)
    cases = [s for s in settings() if s[0] != "gram" and s[2] in (None, "same offdiag")]
    assert not differences(cases, RAGGED, tolerance=1e-5 if setting == "highest" else 1e-4)


def test_wide_tiles(precision):
    """Steps through wide rows, for which the registers have no room; two groups at once among them."""
    for setting, width in (("highest", 130), ("high", 250)):
        precision(setting)
        x = torch.randn(2, 70, width, device=DEVICE, requires_grad=True) / width**0.5
        results = []
        for name in ("triton", "reference"):
            with backend.use(name):
                gram, sums = pairwise_reduce(x, kernel="rbf", reduction="gram")
                over = pairwise_reduce(x, scale=2.0, mask="offdiag")
                outputs = gram.mean() + sums.mean() + over.mean()
                results.append((gram, sums, over, *torch.autograd.grad(outputs, x)))
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= (1e-6 if setting == "highest" else 1e-4) * (1 + b.abs().max())


def test_lower_precision(precision):
    """bf16x3 and bf16 err as they should, and not at all like each other."""
    x, y = (torch.randn(70, 24, device=DEVICE) for _ in range(2))
    expected = (x.double() @ y.double().mT).logsumexp(-1)
    errors = {}
    for setting in ("highest", "high", "medium"):
        precision(setting)
        errors[setting] = (pairwise_reduce(x, y) - expected).abs().max().item()
    assert errors["highest"] < 2e-5 and errors["high"] < 1e-3 and 1e-3 < errors["medium"] < 0.3, errors


def run(x, y, labels, case):
    reduction, kernel, mask = case
    leaves = [z.detach().requires_grad_() for z in (x, y)]
    a, b = (torch.stack(leaves, -3), None) if reduction == "gram" else leaves
    right = y.detach()[..., :2].contiguous() if reduction == "matmul" else None
    given = None if mask is None else (labels[..., : x.shape[-2]], labels[..., : y.shape[-2]])
    out = pairwise_reduce(a, b, kernel=kernel, reduction=reduction, scale=0.6, mask=mask, labels=given, rhs=right)
    out = out if isinstance(out, tuple) else (out,)
    value = sum(v.sum() for v in out if v.is_floating_point())
    return [*out, *torch.autograd.grad(value, leaves)]


CASES = [
    *(("logsumexp", "dot", "same"), ("max", "dot", None), ("sum", "softplus", "different")),
    *(("matmul", "rbf", None), ("gram", "rbf", None)),
]


@pytest.mark.parametrize("wide", (False, True))
def test_bits(wide, monkeypatch):
    """The same again, and for a slice of a stack."""
    if wide:
        by_chunks(monkeypatch)
    x, y = (torch.randn(2, 70, 9, device=DEVICE) for _ in range(2))
    labels = torch.randint(0, 3, (2, 70), device=DEVICE)
    for case in CASES[: 4 if wide else 5]:
        first = run(x, y, labels, case)
        assert all(map(torch.equal, first, run(x.clone(), y.clone(), labels, case))), case
        part = run(x[1].clone(), y[1].clone(), labels[1], case)
        assert all(torch.equal(a[1], b) for a, b in zip(first, part, strict=True)), case


def test_nothing_is_read_past_the_end():
    """NaN around the tensors never shows."""
    room = torch.full((2, 4000), torch.nan, device=DEVICE)
    x, y = (room[k, 96 : 96 + 70 * 9].view(70, 9).normal_() for k in range(2))
    labels = torch.randint(0, 3, (300,), device=DEVICE)[100:170]
    for case in CASES:
        assert all(v.isfinite().all() for v in run(x, y, labels, case)), case


@pytest.mark.parametrize("kernel", ("dot", "rbf"))
@pytest.mark.parametrize("band", (1, 2))
def test_partial_sums_of_some_rows_at_a_time(band, kernel, monkeypatch):
    """The same results where the sums over columns are folded after every band, in both regimes of exponents."""
    x, y = (torch.randn(2, n, 5, device=DEVICE) for n in (300, 200))
    similarity = "dot" if kernel == "dot" else "sqeuclidean"
    calls = [
        lambda scale: pairwise_reduce(x, kernel=similarity, scale=scale, mask="offdiag"),
        lambda scale: pairwise_reduce(x, y, kernel=similarity, scale=scale, both_sides=True),
        lambda _: pairwise_reduce(torch.stack([x, x + 1, 2 * x], -3), kernel=kernel, reduction="gram"),
        lambda _: pairwise_reduce(torch.stack([x, x.flip(-2)], -3), kernel=kernel, reduction="gram"),
    ]
    for scale in (0.3, 40.0):
        for call in calls:
            whole = call(scale)
            with monkeypatch.context() as patch:
                for module in ("pairwise_exponents", "pairwise_gram"):
                    patch.setattr(f"sslkern.triton_kernels.{module}.BAND", band)
                parts = call(scale)
            pairs = zip(whole, parts, strict=True) if isinstance(whole, tuple) else ((whole, parts),)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_partial_sums_take_memory_for_the_rows_alone():
    """No N x N / 64 of them: so many bytes per row, from 2^16 rows to 2^20."""
    from sslkern.triton_kernels.pairwise_exponents import Bands
    from sslkern.triton_kernels.pairwise_logsumexp import strips_of

    like = torch.empty(1, device="meta")
    for n in (1 << 16, 1 << 20):
        tiles, strips = strips_of(n, n, 32)
        for self_pairs in (True, False):
            bands = Bands(like, 1, (n, n), strips, tiles * 32, None, self_pairs, True)
            held = [t for t in vars(bands).values() if isinstance(t, torch.Tensor)]
            assert len(held) == 4 and sum(t.numel() * t.itemsize for t in held) <= 600 * n
