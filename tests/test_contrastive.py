"""Contrastive losses against their formulas, written with the matrix in fp64: values and all gradients."""

import math
from functools import partial

import pytest
import torch
from contrastive import (
    FORMS,
    TIGHT,
    cosines,
    info_nce_matrix,
    leaves_of,
    nt_xent_matrix,
    sigmoid_matrix,
    supervised_matrix,
    value_and_grad,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sslkern import losses

SIZES = ((9, 5), (5, 9), (40, 24), (81, 3))


pytestmark = pytest.mark.usefixtures("cpu_backend")  # of the pairs; the Triton kernels have tests of their own


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_are_those_of_the_matrix(name, size):
    """Every setting, N above and below D, with the gradients by temperature, scale, bias and bank."""
    form = FORMS[name]
    leaves = leaves_of(form, *size)
    for ours, wanted in zip(value_and_grad(form.ours, leaves), value_and_grad(form.matrix, leaves), strict=True):
        torch.testing.assert_close(ours, wanted, **TIGHT)
        assert wanted.abs().max() > 1e-6


def test_simclr_as_torch_writes_it():
    """F.cross_entropy over the 2N samples, the sample itself at -inf."""
    a, b = torch.randn(2, 12, 7, dtype=torch.float64)
    logits = cosines(torch.cat([a, b]), torch.cat([a, b])) / 0.5
    wanted = F.cross_entropy(logits.fill_diagonal_(-math.inf), torch.arange(24).roll(12))
    torch.testing.assert_close(losses.nt_xent_loss(a, b), wanted, **TIGHT)
    labels = torch.arange(12).repeat(2)
    for inside in (False, True):
        same = losses.supervised_contrastive_loss(torch.cat([a, b]), labels, temperature=0.5, inside=inside)
        torch.testing.assert_close(same, wanted, **TIGHT)


def test_lightly_at_equal_temperature():
    """Its layout: four blocks of logits, the diagonals of two dropped, targets in the other two."""
    a, b = torch.randn(2, 11, 6, dtype=torch.float64)
    off = ~torch.eye(11, dtype=torch.bool)
    aa, bb = (cosines(x, x)[off].view(11, 10) for x in (a, b))
    logits = torch.cat([torch.cat([cosines(a, b), aa], 1), torch.cat([cosines(b, a), bb], 1)])
    for temperature in (0.5, 0.1, -0.5):
        wanted = F.cross_entropy(logits / temperature, torch.arange(11).repeat(2))
        torch.testing.assert_close(losses.nt_xent_loss(a, b, temperature), wanted, **TIGHT)
    memory = torch.randn(30, 6, dtype=torch.float64)
    logits = torch.cat([cosines(a, b).diagonal()[:, None], cosines(a, memory)], 1) / 0.5
    wanted = F.cross_entropy(logits, torch.zeros(11, dtype=torch.int64))
    torch.testing.assert_close(losses.nt_xent_loss(a, b, negatives=memory), wanted, **TIGHT)


def test_shares_of_the_queries_average_to_the_whole():
    """Queries of two ranks against the keys of both, by their positives."""
    q, k = torch.randn(2, 10, 6, dtype=torch.float64)
    parts = [losses.info_nce_loss(q[i : i + 5], k, positives=torch.arange(5) + i) for i in (0, 5)]
    torch.testing.assert_close(sum(parts) / 2, losses.info_nce_loss(q, k), **TIGHT)


@pytest.mark.parametrize("rows", (6, 9))
def test_positives_in_order_are_those_by_default(rows):
    """Bit for bit, by the kernel of the default; other positives are not taken for these."""
    q, k = torch.randn(6, 5, requires_grad=True), torch.randn(rows, 5, requires_grad=True)
    values, gradients = [], []
    for positives in (None, torch.arange(6), torch.arange(6).flip(0)):
        values.append(losses.info_nce_loss(q, k, positives=positives))
        gradients.append(torch.cat(torch.autograd.grad(values[-1], (q, k))))
    assert torch.equal(values[0], values[1]) and torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(values[2], losses.info_nce_loss(q.flip(0), k))
    assert not torch.isclose(values[2], values[0])


def test_cold_logits_do_not_overflow():
    """exp without a maximum is infinite at temperature .01 in fp32; ours agrees with fp64."""
    a, b = (z.detach().float() for z in leaves_of(FORMS["nt_xent"], 40, 24)[:2])
    z = F.normalize(torch.cat([a, b]), dim=1)
    assert not (z @ z.T / 0.01).exp().sum(1).log().isfinite().all()
    for temperature in (0.01, 0.001, -0.001):
        wanted = nt_xent_matrix(a.double(), b.double(), temperature=temperature)
        torch.testing.assert_close(losses.nt_xent_loss(a, b, temperature).double(), wanted, rtol=1e-6, atol=1e-6)
        wanted = info_nce_matrix(a.double(), b.double(), 1 / temperature, symmetric=True)
        ours = losses.info_nce_loss(a, b, temperature, symmetric=True)
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=1e-6)


def test_small_losses_keep_their_digits():
    """Where the positives have won, the loss is as right as its logits, and no less than 0."""
    a = torch.randn(30, 48)
    b = a + 1e-3 * torch.randn(30, 48)
    for ours, matrix in (
        (losses.nt_xent_loss(a, b, 0.05), nt_xent_matrix(a.double(), b.double(), temperature=0.05)),
        (losses.info_nce_loss(a, b, 0.05), info_nce_matrix(a.double(), b.double(), 20)),
        (losses.info_nce_loss(a, b, 0.05, symmetric=True), info_nce_matrix(a.double(), b.double(), 20, None, True)),
        (losses.sigmoid_loss(a, b, 40.0, -30.0), sigmoid_matrix(a.double(), b.double(), 40, -30)),
    ):
        assert 1e-7 < matrix < 1e-2
        torch.testing.assert_close(ours.double(), matrix, rtol=2e-5, atol=0)


def test_hot_sigmoids_do_not_overflow():
    """exp(t) is infinite in fp32 from t = 89 on; log(1 + exp(t)) is t."""
    a = torch.randn(1, 5).expand(6, 5)
    torch.testing.assert_close(losses.sigmoid_loss(a, a, 1000.0, -10.0), torch.tensor(5 * 990.0))


@pytest.mark.parametrize("name", FORMS)
def test_a_nan_in_a_row_is_a_nan_in_the_loss(name):
    leaves = [leaf.detach() for leaf in leaves_of(FORMS[name], 9, 5, torch.float32)]
    assert FORMS[name].ours(*leaves).isfinite()
    leaves[0][4, 2] = math.nan
    assert FORMS[name].ours(*leaves).isnan()


def coefficient_scale(coefficient, leaves, truth):
    """The gradient by log(coefficient) is a sum of x dL/dx, in which nearly all may cancel."""
    terms = sum((x * grad).abs().sum() for x, grad in zip(leaves, truth[1:], strict=True) if x.dim())
    return terms.detach() / coefficient.detach().abs()


@pytest.mark.parametrize("name", FORMS)
def test_fp32_is_as_exact_as_the_matrix(name):
    """Error against fp64 at most 4 times the matrix formula's in fp32, plus 8 eps of what is added up."""
    form = FORMS[name]
    leaves = leaves_of(form, 64, 24, torch.float32)
    truth = value_and_grad(form.matrix, [leaf.double() for leaf in leaves])
    plain = value_and_grad(form.matrix, leaves)
    ours = value_and_grad(form.ours, leaves)
    for at, mine, eager, exact in zip([None, *leaves], ours, plain, truth, strict=True):
        assert mine.dtype == torch.float32
        error, allowed = ((x.double() - exact).abs().max() for x in (mine, eager))
        scale = exact.abs().max() if at is None or at.dim() else coefficient_scale(at, leaves, truth)
        assert error <= 4 * allowed + 8 * torch.finfo(torch.float32).eps * scale, (error, allowed, scale)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_16_bits_follow_fp64_of_the_rounded_rows(name, dtype):
    """A float32 loss, right to fp32; gradients in the rows' dtype, right to its rounding."""
    form = FORMS[name]
    leaves = leaves_of(form, 40, 24, dtype)
    truth = value_and_grad(form.matrix, [leaf.double() for leaf in leaves])
    loss, *grads = value_and_grad(form.ours, leaves)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-5)
    for leaf, ours, exact in zip(leaves, grads, truth[1:], strict=True):
        assert ours.dtype == leaf.dtype
        bound = 2 * torch.finfo(leaf.dtype).eps + 1e-6
        assert (ours.double() - exact).abs().max() <= bound * exact.abs().max() + 1e-6


@pytest.mark.parametrize("name", FORMS)
def test_autocast_changes_no_bit(name):
    leaves = leaves_of(FORMS[name], 9, 5, torch.float32)
    wanted = value_and_grad(FORMS[name].ours, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = FORMS[name].ours(*leaves)
    ours = (loss.detach(), *torch.autograd.grad(loss, leaves))
    assert all(map(torch.equal, ours, wanted))


EDGES = {
    "one row": (1, 7),
    "one column": (9, 1),
    "one number": (1, 1),
    "two rows": (2, 3),
}


@pytest.fixture
def anomalies():
    """A NaN anywhere in a backward raises, also where it would be masked later."""
    with torch.autograd.set_detect_anomaly(True):
        yield


@pytest.mark.usefixtures("anomalies")
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("supervised")])
def test_edges_are_finite_and_right(name, edge):
    """N = 1, D = 1, a row of zeros: the matrix's number, and finite gradients."""
    form, (n, d) = FORMS[name], EDGES[edge]
    if n == 1 and name.startswith("decoupled"):
        return
    for zeros in (False, True):
        leaves = [leaf.detach() for leaf in leaves_of(form, n, d)]
        if zeros:
            leaves[0][-1] = 0
        loss, *grads = value_and_grad(form.ours, leaves)
        torch.testing.assert_close(loss, form.matrix(*leaves), **TIGHT)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("inside", (False, True))
@pytest.mark.usefixtures("anomalies")
def test_supervised_edges(inside):
    """No positive for some rows or for all, one class alone, one row, one column: finite, and the matrix's number."""
    loss = partial(losses.supervised_contrastive_loss, temperature=0.1, inside=inside)
    z = torch.randn(6, 3, dtype=torch.float64)
    for labels in ([0, 1, 2, 3, 4, 5], [5, 5, 5, 5, 5, 5], [0, 0, 1, 2, 3, 4]):
        labels = torch.tensor(labels)
        positive = (labels[:, None] == labels) & ~torch.eye(6, dtype=torch.bool)
        index = torch.where(positive, torch.arange(6), -1)
        for rows in (z, z[:, :1]):
            wanted = supervised_matrix(rows, 0.1, positive, inside) if positive.any() else torch.zeros(()).double()
            for given in ({"labels": labels}, {"positives": index}):
                ours, grad = value_and_grad(partial(loss, **given), [rows])
                torch.testing.assert_close(ours, wanted, **TIGHT)
                assert grad.isfinite().all()
    for given in ({"labels": torch.zeros(1).long()}, {"positives": torch.full((1, 1), -1)}):
        ours, grad = value_and_grad(partial(loss, **given), [z[:1]])
        assert ours == 0 and not grad.any()


def test_spectral_leaves_short_rows_and_shortens_long_ones():
    """Rows of at most sqrt(mu) pass with their bits; longer ones count by their direction alone."""
    a = F.normalize(torch.randn(8, 5), dim=1)
    loss, long = (losses.spectral_contrastive_loss(x, x, mu=4.0) for x in (a, 2 * a))
    torch.testing.assert_close(losses.spectral_contrastive_loss(100 * a, 3 * a, mu=4.0), long)
    assert not torch.isclose(loss, long)
    assert losses.spectral_contrastive_loss(a[:1], a[:1], mu=4.0) == -2 * a[0].square().sum() / 4


def test_a_bank_keeps_out_of_the_graph():
    """A bank of another dtype serves, and gets a gradient where it asks for one alone."""
    a, b, memory = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), torch.randn(9, 3)
    losses.nt_xent_loss(a, b, negatives=memory).backward()
    assert memory.grad is None and a.grad.abs().sum() > 0
    half = losses.nt_xent_loss(a.detach(), b, negatives=memory.bfloat16())
    assert torch.equal(half, losses.nt_xent_loss(a.detach(), b, negatives=memory.bfloat16().float()))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        self.numbers = max([self.numbers, *(x.numel() for x in tensors if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("cpu_backend", ("native",), indirect=True)
@pytest.mark.parametrize("name", FORMS)
def test_no_matrix_of_pairs_is_made(name):
    leaves = leaves_of(FORMS[name], 80, 4, torch.float32)
    with Largest() as seen:
        loss = FORMS[name].ours(*leaves)
        torch.autograd.grad(loss, leaves)
    assert 80 * 4 <= seen.numbers <= 80 * 4 * 4  # four views at most
