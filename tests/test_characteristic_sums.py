"""Sums of a characteristic function and their gradient, on every back-end, against the plain formula in float64."""

import pytest
import torch
from cases import interpreted
from memory import allocated

from sslkern.ops import characteristic_sums

USUAL = {"step": 3 / 16, "count": 17}
SHAPES = (  # of z, directions, settings
    ((1, 1), 1, USUAL),
    ((3, 2), 5, {"step": 2 / 3, "count": 5, "first": 1 / 3}),
    ((17, 70), 130, {"step": 0.4, "count": 3, "first": -0.5}),
    ((2, 2, 9, 65), 33, USUAL),
    ((130, 64), 128, USUAL),
    ((600, 9), 40, USUAL),
    ((5, 300), 3, {"step": 1e-3, "count": 40}),
)


def plain(z, directions, *, step, count, first=0.0):
    """The angles of all knots at once, as trainers write it."""
    t = first + step * torch.arange(count, dtype=z.dtype, device=z.device)
    angles = (z @ directions)[..., None] * t
    return angles.cos().sum(-3).mT, angles.sin().sum(-3).mT


def problem(*shape, k, scale=1.0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    z = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    a = torch.randn(shape[-1], k, generator=generator, dtype=torch.float64)
    return z.to(device, dtype), (a / a.norm(dim=0)).to(device, dtype if dtype == torch.float64 else torch.float32)


def results(call, z, a, **settings):
    """Both sums, and the gradient under weights of either sign."""
    z = z.detach().requires_grad_()
    both = call(z, a, **settings)
    weights = [torch.arange(x.numel(), dtype=x.dtype, device=x.device).view(x.shape).cos() for x in both]
    (grad,) = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, both, strict=True)), z)
    return [*(x.detach() for x in both), grad]


def check(z, a, **settings):
    """By the rule: 4 times the error of the plain formula, and 8 eps of the scale, which is N for a sum. In float64,
    which has no truth wider than itself, 1e-12 of the scale."""
    ours = results(characteristic_sums, z, a, **settings)
    truth = results(plain, z.double(), a.double(), **settings)
    rounded = results(plain, z.to(a.dtype), a, **settings)
    for x, b, c, scale in zip(ours, rounded, truth, (z.shape[-2], z.shape[-2], None), strict=True):
        assert x.shape == c.shape
        own = 1e-12 if x.dtype == torch.float64 else 8 * torch.finfo(x.dtype).eps
        limit = 4 * (b - c).abs().max() + own * (scale or c.abs().max())
        assert (x - c).abs().max() <= limit, (tuple(z.shape), settings)


@pytest.mark.parametrize(("shape", "k", "settings"), SHAPES, ids=str)
def test_agrees_with_the_formula(shape, k, settings, backend, device):
    if interpreted(backend) and shape[-2] > 100:
        pytest.skip("slow in the interpreter")
    check(*problem(*shape, k=k, device=device), **settings)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(dtype, backend, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no float64 in Triton")
    z, a = problem(20, 70, k=33, device=device, dtype=dtype)
    check(z, a, **USUAL)
    both = characteristic_sums(z, a.to(torch.bfloat16), **USUAL)
    assert {x.dtype for x in both} == {dtype if dtype == torch.float64 else torch.float32}


def test_large_projections_keep_their_angle(backend, device):
    """The angles are reduced before they are rounded. One column, since the error of a product would hide that."""
    if backend == "reference":
        pytest.skip("rounds the angles, as torch does")
    for scale, first in ((1e2, 0.0), (1e4, 0.3), (1e6, 0.0)):
        z, a = problem(12, 1, k=1, scale=scale, device=device)
        a = torch.ones_like(a)
        ours = results(characteristic_sums, z, a, step=3 / 16, count=5, first=first)
        truth = results(plain, z.double(), a.double(), step=3 / 16, count=5, first=first)
        for x, c in zip(ours, truth, strict=True):
            assert (x - c).abs().max() <= 2e-6 * c.abs().max()


def test_projections_beyond_the_reduction(native):
    """From the number of turns on that a reduction in parts does not hold, the angles are reduced one by one."""
    for dtype, size in ((torch.float32, 3e7), (torch.float64, 1e10)):
        z, a = problem(7, 1, k=1, scale=size, dtype=dtype)
        z[3] = 0.5
        check(z, torch.ones_like(a), **USUAL)


def test_any_strides_and_own_directions(backend, device):
    z, a = problem(20, 36, k=30, device=device)
    usual = {"step": 0.3, "count": 4}
    expected = results(characteristic_sums, z, a, **usual)
    for rows, directions in (
        (z.mT.contiguous().mT, a.mT.contiguous().mT),
        (z.repeat_interleave(2, 1)[:, ::2], a.repeat_interleave(2, 0)[::2]),
        (z.repeat_interleave(2, 0)[::2], a),
    ):
        for x, c in zip(results(characteristic_sums, rows, directions, **usual), expected, strict=True):
            torch.testing.assert_close(x, c, rtol=1e-5, atol=2e-5)
    own = torch.stack([a, -2 * a])
    for x, c in zip(
        results(characteristic_sums, z.expand(2, 20, 36), own, **usual),
        results(plain, z.double().expand(2, 20, 36), own.double(), **usual),
        strict=True,
    ):
        torch.testing.assert_close(x.double(), c, rtol=1e-4, atol=1e-4)


def test_gradients():
    z, a = problem(2, 5, 3, k=4, dtype=torch.float64)
    z.requires_grad_()
    for first in (0.0, -0.7):
        assert torch.autograd.gradcheck(lambda z, f=first: characteristic_sums(z, a, step=0.6, count=4, first=f), z)
    wide, a = problem(5, 70, k=4, dtype=torch.float64)  # whose projections are kept
    wide.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: characteristic_sums(z, a, step=0.6, count=3), wide)
    (grad,) = torch.autograd.grad(characteristic_sums(wide, a, **USUAL)[1].sum(), wide, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(grad.sum(), wide)


def test_transforms(native):
    """A map over the rows, over the directions, and over both."""
    z, a = problem(3, 8, 5, k=4)
    directions = torch.stack([a, 2 * a, 3 * a])
    call = lambda z, a: torch.stack(characteristic_sums(z, a, **USUAL))  # noqa: E731
    for dims in ((0, None), (None, 0), (0, 0)):
        inputs = (z if dims[0] == 0 else z[0], directions if dims[1] == 0 else a)
        mapped = torch.vmap(call, dims)(*inputs)
        each = [call(*(x if d is None else x[k] for x, d in zip(inputs, dims, strict=True))) for k in range(3)]
        torch.testing.assert_close(mapped, torch.stack(each))
    grads = torch.vmap(torch.func.grad(lambda z: call(z, a).square().sum()))(z)
    leaf = z[1].clone().requires_grad_()
    call(leaf, a).square().sum().backward()
    torch.testing.assert_close(grads[1], leaf.grad)


def test_bits(backend, device):
    """The same on each call, of a slice and of the slice alone, and for any number of threads."""
    z, a = problem(3, *((20, 66) if interpreted(backend) else (70, 68)), k=50, device=device)
    settings = {"step": 0.3, "count": 3} if interpreted(backend) else USUAL
    whole = results(characteristic_sums, z, a, **settings)
    again = results(characteristic_sums, z, a, **settings)
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    if backend == "reference":
        return
    alone = characteristic_sums(z[1], a, **settings)
    assert all(torch.equal(x, y[1]) for x, y in zip(alone, whole, strict=False))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        other = results(characteristic_sums, z, a, **settings)
        assert all(torch.equal(x, y) for x, y in zip(other, whole, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_not_finite_reaches_all_sums_and_its_row(value, backend, device):
    z, a = problem(20, 6, k=4, device=device)
    z[3, 2] = value
    cosines, sines, grad = results(characteristic_sums, z, a, **USUAL)
    assert cosines.isnan().all() and sines.isnan().all()
    assert grad.isnan().any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("shape", ((4, 128, 96), (512, 16)), ids=str)
def test_angles_are_not_formed(shape, native):
    """A step takes less than a tenth of the extra memory of the formula, what the kernel itself allocates included."""
    z, a = problem(*shape, k=512)
    z.requires_grad_()
    ours, left = allocated(lambda: sum(x.square().sum() for x in characteristic_sums(z, a, **USUAL)).backward())
    theirs, _ = allocated(lambda: sum(x.square().sum() for x in plain(z, a, **USUAL)).backward())
    assert left == z.numel() * 4 and ours < theirs / 10


@pytest.mark.parametrize(
    ("change", "error", "said"),
    (
        ({"z": [[1.0]]}, TypeError, "z must be a torch.Tensor of shape"),
        ({"z": torch.ones(5)}, ValueError, "z must have shape"),
        ({"z": torch.ones(0, 5)}, ValueError, "z must have at least 1 rows"),
        ({"directions": None}, TypeError, r"directions must be a torch.Tensor of shape \(D, K\), got NoneType"),
        ({"directions": torch.ones(5, 2).long()}, TypeError, "directions must be float32"),
        ({"directions": torch.ones(5, 2).to_sparse()}, TypeError, "directions must be a dense"),
        ({"directions": torch.ones(4, 2)}, ValueError, r"directions must have shape \(5, K\)"),
        ({"directions": torch.ones(5, 0)}, ValueError, r"directions must have shape \(5, K\)"),
        ({"directions": torch.ones(2, 5, 3)}, ValueError, r"directions must have shape \(5, K\)"),
        ({"directions": torch.ones(5, 2, device="meta")}, ValueError, "directions and z must be on the same device"),
        ({"directions": torch.ones(5, 2, requires_grad=True)}, ValueError, "directions must not require a gradient"),
        ({"step": 0}, ValueError, "step must be a finite number > 0, got 0"),
        ({"count": 0}, ValueError, "count must be an integer >= 1, got 0"),
        ({"first": torch.inf}, ValueError, "first must be a finite number, got inf"),
        ({"first": True}, ValueError, "first must be a finite number, got True"),
    ),
)
def test_bad_arguments(change, error, said):
    arguments = {"z": torch.ones(4, 5), "directions": torch.ones(5, 2), "step": 0.1, "count": 3} | change
    with pytest.raises(error, match=said):
        characteristic_sums(**arguments)
