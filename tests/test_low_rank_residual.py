"""The loss of a low-rank model and its gradients, on every back-end, against the plain formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from cases import interpreted
from conftest import ROOT
from memory import allocated

from sslkern.ops import low_rank_residual

LOSSES = ("l2", "l1", "huber", "poisson")
SETTINGS = {"delta": 0.7, "eps": 0.05}
SHAPES = (
    (1, 1, 1),
    (3, 5, 2),
    (70, 45, 20),
    (2, 3, 20, 33, 4),
    (300, 130, 48),
    (64, 400, 16),
    (9, 20, 300),
    (17, 2000, 3),
)


def rho(m, t, loss):
    """Of every element, by torch's own losses where it has them."""
    if loss == "poisson":
        eps = torch.tensor(SETTINGS["eps"], dtype=t.dtype)
        log = torch.where(t < eps, eps.log() + (t - eps) / eps, t.clamp_min(eps).log())
        return t.clamp_min(eps) - m * log
    by_name = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
    return by_name[loss](t, m, reduction="none", **({"delta": SETTINGS["delta"]} if loss == "huber" else {}))


def plain(m, *factors, loss="l2", mask=None):
    t = factors[0] @ factors[1].mT if len(factors) == 2 else torch.einsum("...ir,...jr,...kr->...ijk", *factors)
    value = rho(m.nan_to_num() if mask is not None else m, t, loss)
    value = value if mask is None else torch.where(mask, value, 0)
    return value.sum((-2, -1) if len(factors) == 2 else (-3, -2, -1))


def problem(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Data near a model that is mostly positive, and the factors of the model; `shape` ends with the rank."""
    generator = torch.Generator().manual_seed(seed)
    *sizes, r = shape
    stack, sides = (sizes[:-2], sizes[-2:])
    factors = [torch.rand(*stack, n, r, generator=generator, dtype=torch.float64) - 0.2 for n in sides]
    m = factors[0] @ factors[1].mT + torch.randn(*stack, *sides, generator=generator, dtype=torch.float64)
    return [x.to(device, dtype) for x in (m.abs(), *factors)]


def results(call, m, *factors, **settings):
    """The values and the gradients under weights, one for each slice."""
    factors = [f.detach().requires_grad_() for f in factors]
    value = call(m, *factors, **settings)
    weights = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    return [value.detach(), *torch.autograd.grad((weights * value).sum(), factors)]


def check(m, *factors, **settings):
    """By the rule: 4 times the error of the plain formula, and 8 eps of the scale. In float64, which has no truth wider
    than itself, 1e-13 of the scale."""
    ours = results(lambda *z, **s: low_rank_residual(*z, **s, **SETTINGS), m, *factors, **settings)
    wide = [x.double() for x in (m, *factors)]
    truth = results(plain, *wide, **settings)
    rounded = results(plain, *(x.to(ours[0].dtype) for x in (m, *factors)), **settings)
    assert [a.dtype for a in ours[1:]] == [f.dtype for f in factors]
    for a, b, c in zip(ours, rounded, truth, strict=True):
        assert a.shape == c.shape and a.is_contiguous()
        own = 8 * torch.finfo(a.dtype).eps if a.dtype == torch.float32 else 1e-13
        limit = 4 * (b - c).abs().max() + own * c.abs().max()
        assert (a - c).abs().max() <= limit, settings


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_formula(shape, loss, backend, device):
    if backend == "triton" and SHAPES.index(shape) > 2 and loss != "poisson":
        pytest.skip("every loss at three shapes; more would take long to compile")
    if interpreted(backend) and max(shape) == 2000:
        pytest.skip("slow in the interpreter")
    m, u, v = problem(*shape, device=device)
    check(m, u, v, loss=loss)
    mask = torch.rand(m.shape[-2:], generator=torch.Generator().manual_seed(1)).to(device) > 0.3
    check(torch.where(mask, m, torch.nan), u, v, loss=loss, mask=mask)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_dtypes_of_the_data_and_of_the_factors(dtype, backend, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no float64 in Triton")
    m, u, v = problem(40, 33, 5, device=device)
    check(m.to(dtype), u, v, loss="huber")
    if dtype == torch.float64:
        check(*problem(40, 33, 5, dtype=dtype), loss="poisson")
    halves = low_rank_residual(m, u.to(dtype), v.to(dtype))
    assert halves.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_any_strides(backend, device):
    """Of the data and of the mask: by columns, every second element, expanded. The factors are copied if need be."""
    m, u, v = problem(40, 36, 7, device=device)
    mask = (m > 0.5).to(device)
    expected = results(low_rank_residual, m, u, v, mask=mask)
    for data, kept in (
        (m.mT.contiguous().mT, mask.mT.contiguous().mT),
        (m.repeat_interleave(2, 1)[:, ::2], mask),
        (m.repeat_interleave(2, 0)[::2], mask.repeat_interleave(2, 0)[::2]),
    ):
        for a, b in zip(results(low_rank_residual, data, u, v, mask=kept), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-4)
    strided = results(low_rank_residual, m, u.mT.contiguous().mT, v.repeat_interleave(2, 1)[:, ::2], mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(strided, expected, strict=True))
    row = m[:1].expand(40, 36)
    torch.testing.assert_close(low_rank_residual(row, u, v), low_rank_residual(row.contiguous(), u, v))
    u = u.requires_grad_()
    low_rank_residual(m.expand(3, 40, 36), u.expand(3, 40, 7), v.expand(3, 36, 7)).mean().backward()
    (one,) = torch.autograd.grad(low_rank_residual(m, u, v), u)
    torch.testing.assert_close(u.grad, one)


def test_a_small_residual_keeps_its_digits(backend, device):
    """At a residual of 1e-3 of the data, the error of the loss is below 1e-5; expanded into products it is about 1."""
    n = 128 if interpreted(backend) else 1024
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, 64, generator=generator, dtype=torch.float64).float().to(device) for _ in range(2))
    exact = u.double() @ v.double().mT
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64).to(device)
    m = (exact + 1e-3 * exact.std() * noise).float()
    truth = (exact - m.double()).square().sum()
    expanded = m.square().sum() - 2 * ((m @ v) * u).sum() + ((u.mT @ u) * (v.mT @ v)).sum()
    assert abs(low_rank_residual(m, u, v) - truth) / truth < 1e-5
    assert abs(expanded - truth) / truth > 1e-2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", ((4, 5, 6), (3, 40, 33), (40, 6, 3), (33, 2, 40), (2, 1, 1), (50, 40, 3)), ids=str)
def test_three_modes(shape, loss, native):
    """Whichever mode gives the columns, and by parts; any strides; the gradient of one factor alone."""
    generator = torch.Generator().manual_seed(2)
    factors = [torch.rand(n, 4, generator=generator, dtype=torch.float64) - 0.2 for n in shape]
    m = torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) > 0.2
    check(m, *factors, loss=loss)
    check(torch.where(mask, m, torch.nan), *factors, loss=loss, mask=mask)
    turned = m.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    check(turned, *factors, loss=loss)
    whole = results(low_rank_residual, m, *factors, loss=loss)[1:]
    for k in range(3):
        some = [f.clone().requires_grad_(i == k) for i, f in enumerate(factors)]
        low_rank_residual(m, *some, loss=loss).backward()
        torch.testing.assert_close(some[k].grad, whole[k] / 0.5)
        assert all(f.grad is None for i, f in enumerate(some) if i != k)


def test_three_modes_on_every_back_end(backend, device):
    factors = [torch.rand(n, 3).to(device) for n in (4, 5, 36)]
    check(torch.rand(4, 5, 36, device=device), *factors, loss="huber")


def test_gradients():
    m, u, v = problem(6, 5, 2, dtype=torch.float64)
    u, v = (1 + f.requires_grad_() for f in (u, v))
    for loss in LOSSES:
        assert torch.autograd.gradcheck(lambda a, b, k=loss: low_rank_residual(m, a, b, loss=k), (u, v))
    (grad,) = torch.autograd.grad(low_rank_residual(m, u, v), u, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(grad.sum(), u)


def test_nothing_of_the_size_of_the_data_is_formed(native):
    """Beside the gradients that it returns, a step takes less than a twentieth of the memory of the data."""
    n, r = 1024, 16
    m, u, v = torch.randn(n, n), torch.randn(n, r, requires_grad=True), torch.randn(n, r, requires_grad=True)
    peak, left = allocated(lambda: low_rank_residual(m, u, v).backward())
    assert left == 2 * n * r * 4 and peak - left < n * n * 4 / 20
    eager, _ = allocated(lambda: plain(m, u, v).backward())
    assert eager > n * n * 4 * 1.9


def test_bits(backend, device):
    """The same on each call, of a slice and of the slice alone, and for any number of threads."""
    m, u, v = problem(3, 70, 50, 7, device=device)
    whole = results(low_rank_residual, m, u, v)
    again = results(low_rank_residual, m, u, v)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    if backend == "reference":
        return
    alone = low_rank_residual(m[1], u[1], v[1])
    assert torch.equal(alone, whole[0][1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert all(torch.equal(a, b) for a, b in zip(results(low_rank_residual, m, u, v), whole, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_nan_reaches_the_loss_and_its_row_and_column(backend, device):
    for loss in LOSSES:
        m, u, v = problem(20, 30, 4, device=device)
        m[3, 5] = torch.nan
        value, of_u, of_v = results(low_rank_residual, m, u, v, loss=loss)
        assert value.isnan()
        assert of_u.isnan().any(1).nonzero().flatten().tolist() == [3]
        assert of_v.isnan().any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    (
        ({"m": [[1.0]]}, TypeError, "m must be a torch.Tensor of shape"),
        ({"m": torch.ones(4)}, ValueError, "m must have shape"),
        ({"m": torch.ones(0, 5)}, ValueError, "m must have at least 1 rows"),
        ({"m": torch.ones(4, 5).long()}, TypeError, "m must be float32"),
        ({"m": torch.ones(4, 5, requires_grad=True)}, ValueError, "m must not require a gradient"),
        ({"u": torch.ones(5, 2)}, ValueError, r"u must have shape \(4, R\) for m of \(4, 5\), got \(5, 2\)"),
        ({"v": torch.ones(5, 3)}, ValueError, r"v must have shape \(5, 2\) for m of \(4, 5\), got \(5, 3\)"),
        ({"v": torch.ones(5, 2).to("meta")}, ValueError, "v and m must be on the same device"),
        ({"w": torch.ones(3, 2)}, ValueError, r"m must have shape \(..., I, J, L\)"),
        ({"loss": "mse"}, ValueError, "loss must be one of 'l2', 'l1', 'huber', 'poisson', got 'mse'"),
        ({"loss": "huber", "delta": 0}, ValueError, "delta must be a finite number > 0, got 0"),
        ({"loss": "poisson", "eps": -1.0}, ValueError, "eps must be a finite number > 0, got -1.0"),
        ({"loss": "poisson", "eps": torch.ones(())}, TypeError, "eps must be a number > 0, not a torch.Tensor"),
        ({"mask": torch.ones(4, 5)}, TypeError, "mask must be a bool torch.Tensor, got float32"),
        ({"mask": torch.ones(5, 4).bool()}, ValueError, r"mask must broadcast to the shape of m, \(4, 5\)"),
    ),
)
def test_bad_arguments(change, error, said):
    arguments = {"m": torch.ones(4, 5), "u": torch.ones(4, 2), "v": torch.ones(5, 2)} | change
    with pytest.raises(error, match=said):
        low_rank_residual(**arguments)


def test_the_docstring_names_every_loss():
    text = (ROOT / "sslkern" / "ops" / "low_rank_residual.py").read_text()
    assert all(f"        {loss:14}rho(m, t) = " in text for loss in LOSSES)
