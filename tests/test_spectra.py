"""VIbCReg, TiCo, FroSSL, the coding rate and MMCR beyond the walk of all functions: both sides of their Gram matrices,
states, degenerate spectra, precision and messages."""

import pickle

import pytest
import support_spectra as plain
import torch

from sslkern import losses
from sslkern.losses import (
    CodingRateLoss,
    FroSSLLoss,
    MMCRLoss,
    TiCoLoss,
    VIbCRegLoss,
    coding_rate_loss,
    frossl_loss,
    mmcr_loss,
    tico_loss,
    vibcreg_loss,
)

SHAPES = ((9, 4), (5, 13), (6, 6), (2, 3), (2, 1))


def views(*shape, count=2, dtype=torch.float64, offset=0.3):
    generator = torch.Generator().manual_seed(sum(shape))
    shared = torch.randn(*shape, generator=generator, dtype=torch.float64)
    made = [shared + 0.6 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(x + offset).to(dtype).requires_grad_() for x in made]


def same(found, expected, leaves, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(value, leaves, retain_graph=True) for value in (found, expected)]
    for f, e in zip(*gradients, strict=True):
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ("frossl", "coding_rate", "mmcr"))
def test_three_views(name, shape):
    loss, formula = getattr(losses, f"{name}_loss"), getattr(plain, name)
    leaves = views(*shape, count=3)
    same(loss(*leaves[:2], others=leaves[2:]), formula(*leaves), leaves)
    same(loss(*leaves[:2]), formula(*leaves[:2]), leaves[:2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vibcreg(shape):
    a, b = views(*shape)
    loss, terms = vibcreg_loss(a, b, 2.0, 3.0, 5.0, return_terms=True)
    same(loss, plain.vibcreg(a, b, 2.0, 3.0, 5.0), (a, b))
    total = 2 * terms["invariance"] + 3 * terms["variance"] + 5 * terms["covariance"]
    torch.testing.assert_close(total, loss.detach())


def test_vibcreg_of_a_constant_column():
    a, b = (z.detach() for z in views(8, 4))
    a[:, 2] = 7.0
    a.requires_grad_()
    loss = vibcreg_loss(a, b, 0.0, 0.0)
    same(loss, plain.vibcreg(a, b, 0.0, 0.0), (a,))
    assert torch.autograd.grad(loss, a)[0][:, 2].abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tico_steps(shape):
    """With a state, without, by both sides; and as a module over steps."""
    a, b = views(*shape)
    before = views(shape[1], shape[1])[0].detach()
    before = before @ before.T
    kept = before.clone()
    for state in (None, before):
        expected = plain.tico(a, b, state, 0.7, 3.0)
        same(tico_loss(a, b, state, 0.7, 3.0), expected, (a, b))
        loss, after = tico_loss(a, b, state, 0.7, 3.0, return_covariance=True)
        same(loss, expected, (a, b))
        x = torch.nn.functional.normalize(a.detach(), dim=1)
        torch.testing.assert_close(after, 0.3 * x.T @ x / len(x) + (0 if state is None else 0.7 * state))
        assert not after.requires_grad
    assert torch.equal(before, kept)
    module, state = TiCoLoss(shape[1]).double(), torch.zeros(shape[1], shape[1]).double()
    for _ in range(3):
        same(module(a, b), plain.tico(a, b, state), (a, b))
        state = tico_loss(a, b, state, return_covariance=True)[1]
        torch.testing.assert_close(module.covariance, state)
    module(a, b, update=False)
    module.eval()(a, b)
    torch.testing.assert_close(module.covariance, state)
    fresh = TiCoLoss(shape[1]).double()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(a, b), module(a, b))


def test_tico_in_half_precision_and_autocast():
    a, b = views(16, 8, dtype=torch.bfloat16)
    module = TiCoLoss(8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(a, b)
    expected = plain.tico(a.detach().double(), b.detach().double(), torch.zeros(8, 8).double())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_column_of_zeros():
    """FroSSL's trace counts the other columns, as the trace of the Gram matrix does."""
    a, b = (z.detach() for z in views(8, 4))
    a[:, 1] = 0
    torch.testing.assert_close(frossl_loss(a, b), plain.frossl(a, b))
    a.requires_grad_()
    assert torch.autograd.grad(frossl_loss(a, b), a)[0].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_degenerate_singular_values(dtype):
    """Equal ones have the gradient UV', and zero ones none, where torch's backward of an SVD has NaN or noise."""
    a = torch.eye(4, 6, dtype=dtype).requires_grad_()
    loss = mmcr_loss(a, a.detach())
    expected = -0.5 * torch.eye(4, 6, dtype=dtype) + 0.005 / 4 * torch.eye(4, 6, dtype=dtype) / 2**0.5
    torch.testing.assert_close(torch.autograd.grad(loss, a)[0], expected)
    b = torch.ones(4, 6, dtype=dtype).requires_grad_()  # of rank 1
    (found,) = torch.autograd.grad(mmcr_loss(b, b.detach(), 0.0), b)
    torch.testing.assert_close(found, torch.full_like(b, -0.5 / 24**0.5), rtol=1e-5, atol=1e-6)


def test_precision_of_the_nuclear_norm():
    """Singular values over five decades in float32: the eigenvalues in float64 are as accurate as torch's SVD."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 16, generator=generator).double()).Q for n in (16, 64))
    z = ((u * torch.logspace(0, -5, 16).double()) @ v.T).float()
    exact, svd = (mmcr_loss(x, x, 0.0).item() for x in (z.double(), z)), torch.linalg.svdvals(z).sum().item()
    exact, found = exact
    assert abs(found - exact) <= 4 * abs(-svd - exact) + 8 * torch.finfo(torch.float32).eps * abs(exact)


@pytest.mark.parametrize("collapse", (0.0, 0.9, 0.9999))
def test_precision_of_the_coding_rate(collapse):
    """In float32 on either side, against the determinant of the published D x D matrix in float32."""
    for n, d in ((16, 64), (64, 16)):
        a, b = (x.detach() for x in views(n, d, dtype=torch.float32))
        a, b = ((1 - collapse) * x + collapse * x[:1] for x in (a, b))
        a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
        exact = plain.coding_rate(a.double(), b.double(), inv_coeff=0.0).item()
        theirs, ours = plain.coding_rate(a, b, inv_coeff=0.0).item(), coding_rate_loss(a, b, inv_coeff=0.0).item()
        assert abs(ours - exact) <= 4 * abs(theirs - exact) + 8 * torch.finfo(torch.float32).eps * abs(exact)


def test_bad_numbers_show():
    for loss in (vibcreg_loss, tico_loss, frossl_loss, coding_rate_loss, mmcr_loss):
        a, b = (x.detach() for x in views(5, 4, dtype=torch.float32))
        a[1, 2] = torch.nan
        assert loss(a, b).isnan()


A = torch.ones(4, 3)
MANY = {"frossl": frossl_loss, "coding_rate": coding_rate_loss, "mmcr": mmcr_loss}
REFUSED = {
    **{f"{n} list": (lambda f=f: f([1.0], A), TypeError, "a must be a torch.Tensor") for n, f in MANY.items()},
    **{f"{n} shapes": (lambda f=f: f(A, A[:2]), ValueError, "a and b must have the same") for n, f in MANY.items()},
    **{f"{n} others": (lambda f=f: f(A, A, others=A), TypeError, "others must be a list") for n, f in MANY.items()},
    **{f"{n} third": (lambda f=f: f(A, A, others=[1]), TypeError, r"others\[0\] must be") for n, f in MANY.items()},
    "frossl one row": (lambda: frossl_loss(A[:1], A[:1]), ValueError, "at least 2 rows"),
    "frossl weight": (lambda: FroSSLLoss("1"), TypeError, "invariance_weight must be"),
    "eps": (lambda: CodingRateLoss(eps=0), ValueError, "eps must be a finite number > 0"),
    "eps tensor": (lambda: coding_rate_loss(A, A, eps=A.sum()), TypeError, "eps must be a number > 0, not a"),
    "lambd": (lambda: MMCRLoss(float("nan")), ValueError, "lambd must be"),
    "group": (lambda: MMCRLoss(group=3), TypeError, "group must be"),
    "vibcreg dtype": (lambda: vibcreg_loss(A, A.double()), TypeError, "must have the same dtype"),
    "vibcreg eps": (lambda: VIbCRegLoss(eps=-1.0), ValueError, "eps must be a finite number >= 0"),
    "vibcreg row": (lambda: vibcreg_loss(A[:1], A[:1]), ValueError, "at least 2 rows"),
    "tico beta": (lambda: TiCoLoss(3, beta=1.5), ValueError, r"beta must be a number in \[0, 1\]"),
    "tico features": (lambda: TiCoLoss(4)(A, A), ValueError, r"covariance must have shape \(3, 3\)"),
    "tico state": (lambda: tico_loss(A, A, [1]), TypeError, "covariance must be a torch.Tensor"),
    "tico rho": (lambda: TiCoLoss(3, rho=None), TypeError, "rho must be"),
    "tico size": (lambda: TiCoLoss(0), ValueError, "num_features must be an integer >= 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


REPRS = {
    "CodingRateLoss(rate_coeff=1.0, inv_coeff=200.0, eps=0.2)": CodingRateLoss,
    "FroSSLLoss(invariance_weight=1.0)": FroSSLLoss,
    "MMCRLoss(lambd=0.005)": MMCRLoss,
    "TiCoLoss(3, beta=0.9, rho=8.0)": lambda: TiCoLoss(3),
    "VIbCRegLoss(sim_coeff=25.0, std_coeff=25.0, cov_coeff=200.0, gamma=1.0, eps=0.0001, dim=-1, batch_dim=0, "
    "positions='separate')": VIbCRegLoss,
}


@pytest.mark.parametrize("text", REPRS)
def test_modules(text):
    module = REPRS[text]()
    assert repr(module) == text and repr(pickle.loads(pickle.dumps(module))) == text
