"""What functions over pairs of rows take: dtypes, coefficients, short rows, few rows, settings."""

import inspect
import math

import contrastive
import pairs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sslkern import losses, metrics
from sslkern.ops import kernel_matmul, pairwise_reduce

on_each = pairs.on_each
NT, NCE, SUP = losses.nt_xent_loss, losses.info_nce_loss, losses.supervised_contrastive_loss
SIG, SPEC = losses.sigmoid_loss, losses.spectral_contrastive_loss
A, B = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(7) % 3
COEFFICIENTS = {
    "nt_xent temperature": lambda c: NT(A, B, c),
    "nt_xent temperature, bank": lambda c: NT(A, B, c, negatives=B),
    "info_nce temperature": lambda c: NCE(A, B, c),
    "info_nce scale": lambda c: NCE(A, B, scale=c),
    "info_nce symmetric scale": lambda c: NCE(A, B, scale=c, symmetric=True),
    "supervised temperature": lambda c: SUP(A, IDS, temperature=c),
    "supervised temperature, inside": lambda c: SUP(A, IDS, temperature=c, inside=True),
    "sigmoid scale": lambda c: SIG(A, B, c),
    "sigmoid bias": lambda c: SIG(A, B, 3.0, c),
    "spectral mu": lambda c: SPEC(A, B, c),
    "pairwise_reduce scale": lambda c: pairwise_reduce(A, B, scale=c).sum(),
    "pairwise_reduce scale, sum": lambda c: pairwise_reduce(A, kernel="rbf", reduction="sum", scale=c).sum(),
    "kernel_matmul bandwidth": lambda c: kernel_matmul(A, B, B, bandwidth=c).sum(),
    "hsic bandwidth": lambda c: metrics.hsic(A, B, bandwidth=c),
    "hsic bandwidths": lambda c: metrics.hsic(A, B, bandwidth=(c, 1.0)),
    "pairwise_hsic bandwidth": lambda c: metrics.pairwise_hsic(A, bandwidth=c).sum(),
    "dhsic bandwidth": lambda c: metrics.dhsic(A, B, bandwidth=c),
    "entropy noise": lambda c: metrics.entropy(A, noise=c),
    "entropy noise, pairwise": lambda c: metrics.entropy(A, "pairwise-kl", c),
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficients_as_tensors(name):
    """The value of the number and the slope of its differences, in the tensor's shape and dtype, of any one element."""
    function = COEFFICIENTS[name]
    assert torch.equal(function(torch.tensor(0.75)), function(0.75)) or name.startswith("spectral")
    step = 0.002
    slope = (function(0.75 + step) - function(0.75 - step)) / (2 * step)
    for shape in ((), (1,), (1, 1)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            c = torch.full(shape, 0.75, dtype=dtype, requires_grad=True)
            value = function(c)
            torch.testing.assert_close(value.detach(), function(0.75))
            (grad,) = torch.autograd.grad(value, c)
            assert grad.shape == shape and grad.dtype == dtype
            torch.testing.assert_close(grad.double().sum(), slope.double(), rtol=2e-2, atol=2e-3)
    for bad in (
        torch.ones(2),
        torch.ones((), dtype=torch.int64),
        torch.ones((), dtype=torch.bool),
        True,
        "1",
        None,
        1j,
    ):
        if bad is None and ("hsic" in name or "info_nce" in name):
            continue  # of the median; of the temperature
        with pytest.raises((TypeError, ValueError), match=r"must (be|broadcast)[^.]*\S.*\.$"):
            function(bad)
    with pytest.raises(ValueError, match="must be on the device"):
        function(torch.ones((), device="meta"))
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="must be a finite"):
            assert not function(value).isfinite()
            raise ValueError("the result shows it: must be a finite number")
    assert not function(torch.tensor(math.nan)).isfinite()


MODULES = {
    losses.NTXentLoss: {"temperature": 0.0, "inside": 1, "decoupled": None, "normalize": 2, "eps": 0, "group": "all"},
    losses.InfoNCELoss: {"temperature": True, "scale": math.nan, "symmetric": 0, "normalize": "no", "eps": -1.0},
    losses.SupervisedContrastiveLoss: {"temperature": "0.1", "inside": "all", "eps": True, "group": 3},
    losses.SigmoidLoss: {"scale": math.inf, "bias": True, "eps": torch.ones(())},
    losses.SpectralContrastiveLoss: {"mu": 0, "group": 1.0},
}


@pytest.mark.parametrize("module", MODULES)
def test_modules_check_their_settings_when_they_are_made(module):
    """Each one, by name; and what follows the coefficients goes by name alone."""
    for name, value in MODULES[module].items():
        with pytest.raises((TypeError, ValueError), match=rf"{name} must be .*\.$"):
            module(**{name: value})
    kinds = {p.name: p.kind for p in inspect.signature(module).parameters.values()}
    places = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert set(places) <= {"temperature", "scale", "bias", "mu"}


TWO_VIEWS = {
    "nt_xent": NT,
    "nt_xent, three views": lambda a, b: NT(a, b, others=[a]),
    "bank": lambda a, b: NT(a, a, negatives=b),
    "info_nce": NCE,
    "info_nce, more keys": lambda q, k: NCE(q[:4], k),
    "info_nce, as they are": lambda q, k: NCE(q, k, scale=0.3, normalize=False),
    "clip": lambda q, k: NCE(q, k, symmetric=True),
    "info_nce, positives": lambda q, k: NCE(q, k, positives=IDS),
    "sigmoid": SIG,
    "spectral": SPEC,
    "pairwise_reduce": lambda x, y: pairwise_reduce(x, y),
    "pairwise_reduce, cosine": lambda x, y: pairwise_reduce(x, y, kernel="cosine", reduction="sum"),
    "kernel_matmul": lambda x, y: kernel_matmul(x, y, y),
    "hsic": metrics.hsic,
    "hsic, linear": lambda x, y: metrics.hsic(x, y, "linear"),
    "dhsic": lambda x, y: metrics.dhsic(x, y, y),
}
MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("name", TWO_VIEWS)
def test_views_of_two_dtypes(name):
    """Both orders, with autocast and without: the values of the rounded numbers in the wider precision, gradients in
    each one's own dtype."""
    function = TWO_VIEWS[name]
    for dtypes in (*MIXED, *(pair[::-1] for pair in MIXED)):
        views = [v.to(d) for v, d in zip((A, B), dtypes, strict=True)]
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        leaves = [v.clone().requires_grad_() for v in views]
        exact = [v.to(wide).requires_grad_() for v in views]
        wanted = function(*exact)
        grads = torch.autograd.grad(wanted.sum(), exact)
        for autocast in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=bool(autocast)):
                ours = function(*leaves)
            assert ours.dtype == wanted.dtype == wide and torch.equal(ours, wanted)
            for leaf, mine, theirs in zip(leaves, torch.autograd.grad(ours.sum(), leaves), grads, strict=True):
                assert mine.dtype == leaf.dtype
                error = (mine.double() - theirs.double()).abs().max()
                assert error <= 4 * torch.finfo(leaf.dtype).eps * theirs.abs().max() + torch.finfo(wide).eps


NORMALISING = {
    "nt_xent": lambda a, b, **k: NT(a, b, **k),
    "nt_xent, three views": lambda a, b, **k: NT(a, b, others=[b.flip(0)], **k),
    "bank": lambda a, b, **k: NT(a, b, negatives=b.flip(1), **k),
    "info_nce": lambda a, b, **k: NCE(a, b, **k),
    "clip": lambda a, b, **k: NCE(a, b, symmetric=True, **k),
    "supervised": lambda a, b, **k: SUP(torch.cat([a, b]), torch.cat([IDS, IDS]), **k),
    "supervised, inside": lambda a, b, **k: SUP(torch.cat([a, b]), torch.cat([IDS, IDS]), inside=True, **k),
    "sigmoid": lambda a, b, **k: SIG(a, b, **k),
}


def short_rows(dtype=torch.float64):
    """Rows of zeros in both views, and two of length 0.03 and 0.2."""
    a, b = A.to(dtype).clone(), B.to(dtype).clone()
    a[2], b[4] = 0, 0
    a[5] *= 0.03 / a[5].norm()
    b[1] *= 0.2 / b[1].norm()
    return a, b


@pytest.mark.parametrize("name", NORMALISING)
def test_short_rows(name):
    """With eps, rows are x/max(|x|, eps), values and gradients, on both sides of eps and at 0."""
    function = NORMALISING[name]
    a, b = (z.requires_grad_() for z in short_rows())
    for eps in (0.1, 1e-3):
        ours = function(a, b, eps=eps)
        # rows of length 1 or less by 1e-30, which is what eps would make of them: dividing again changes none
        scaled = [F.normalize(z, dim=-1, eps=eps) for z in (a, b)]
        lengths = [z.norm(dim=-1, keepdim=True) for z in scaled]
        assert all((n < 1.001).all() for n in lengths)
        wanted = function(*scaled, eps=1.0 + 1e-9)
        torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-9)
        for x, y in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(wanted, (a, b)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        assert torch.autograd.gradcheck(lambda a, b, eps=eps: function(a, b, eps=eps), (a, b), eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("name", NORMALISING)
def test_zero_rows_are_finite_in_float16(name):
    """By default, with a row of zeros in a small batch and in one of two rows; and no bit of ordinary rows changes."""
    function = NORMALISING[name]
    a, b = (z.requires_grad_() for z in short_rows(torch.float16))
    assert all(g.isfinite().all() for g in torch.autograd.grad(function(a, b), (a, b)))
    z = A.half()
    assert torch.equal(function(z, B.half()), function(z.float(), B.half().float()))
    for dtype, eps in ((torch.float32, 1e-12), (torch.bfloat16, 1e-12), (torch.float64, 1e-12), (torch.float16, 1e-3)):
        views = [v.detach().clone().requires_grad_() for v in short_rows(dtype)]
        default, given = (torch.autograd.grad(function(*views, **k), views) for k in ({}, {"eps": eps}))
        assert all(map(torch.equal, default, given))


def test_a_far_row_spoils_no_other():
    """Distances of new points are computed about the mean of the support, in which a far point has no share."""
    x, s, b = torch.randn(6, 3) + 5, torch.randn(8, 3) + 5, torch.randn(8, 2)
    far = torch.cat([x, torch.full((1, 3), 1e8)])
    assert torch.equal(kernel_matmul(far, s, b)[:-1], kernel_matmul(x, s, b))
    assert torch.equal(kernel_matmul(far, s, b)[-1], torch.zeros(2))
    sums = pairwise_reduce(far, s, kernel="sqeuclidean", scale=-0.5)
    torch.testing.assert_close(sums[:-1], pairwise_reduce(x, s, kernel="sqeuclidean", scale=-0.5))


def test_cosines_of_zero_rows_in_float16():
    a, b = (z.requires_grad_() for z in short_rows(torch.float16))
    for out in (pairwise_reduce(a, b, kernel="cosine"), kernel_matmul(a, b, b, "cosine")):
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (a, b)))


def test_unusual_numbers_of_rows_and_slices():
    """Stacks of no slices, one row, one column: the shapes of the others, with gradients."""
    for lead, n, d in (((0,), 4, 3), ((2, 0), 5, 1), ((), 1, 1), ((3,), 1, 4)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x, y = (torch.randn(*lead, n, d).to(dtype).requires_grad_() for _ in range(2))
            outs = [pairwise_reduce(x, y), kernel_matmul(x, y, y), pairwise_reduce(x, y, reduction="max")[0]]
            outs += [pairwise_reduce(x, kernel="cosine", reduction="sum"), metrics.entropy(x, "pairwise-kl")]
            outs += [metrics.entropy(x)] + ([metrics.hsic(x, y)] if n > 1 else [])
            assert [o.shape[: len(lead)] for o in outs] == [torch.Size(lead)] * len(outs)
            grads = torch.autograd.grad(sum(o.sum() for o in outs), (x, y))
            assert [g.dtype for g in grads] == [dtype] * 2 and all(g.isfinite().all() for g in grads)


REFUSED = {
    "int32 labels": lambda: SUP(A, IDS.int()),
    "labels elsewhere": lambda: SUP(A, IDS.to("meta")),
    "bool labels": lambda: SUP(A, IDS > 0),
    "positives beyond": lambda: NCE(A, B, positives=IDS + 7),
    "lists beyond": lambda: SUP(A, positives=IDS[:, None] - 2),
    "no rows": lambda: NCE(A[:0], B),
    "no keys": lambda: pairwise_reduce(A, B[:0]),
    "int32 labels of pairs": lambda: pairwise_reduce(A, mask="same", labels=IDS.int()),
    "list of labels": lambda: pairwise_reduce(A, B, mask="same", labels=[IDS, IDS]),
    "kernel of a tensor": lambda: pairwise_reduce(A, kernel=A),
    "mask of a bool": lambda: pairwise_reduce(A, mask=True),
    "estimator of a number": lambda: metrics.entropy(A, 1.0),
    "normalized by place": lambda: metrics.pairwise_hsic(A, "rbf", "biased", None, True),
    "eps by place": lambda: SIG(A, B, 1.0, 1.0, 1e-3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name):
    with pytest.raises((TypeError, ValueError)) as raised:
        REFUSED[name]()
    text = str(raised.value)
    assert "\n" not in text and (text.endswith(".") or "positional" in text)


def test_a_queue_in_full_precision_under_autocast():
    """MoCo's step: bfloat16 queries of an autocast encoder, a float32 queue; the encoder's gradient is that of fp32."""
    encoder, queue = nn.Linear(5, 4), torch.randn(30, 4)
    with torch.autocast("cpu", torch.bfloat16):
        q, k = encoder(A), encoder(B).detach()
        assert q.dtype == torch.bfloat16
        loss = NT(q, k, 0.2, negatives=queue)
        keys = NCE(q, torch.cat([k.float(), queue]), 0.2)
    wanted = contrastive.bank_matrix(q.double(), k.double(), queue.double(), 0.2)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss + 0 * keys, loss)
    loss.backward()
    assert encoder.weight.grad.isfinite().all() and encoder.weight.grad.any()
