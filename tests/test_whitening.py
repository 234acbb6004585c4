"""Whitening, as a loss and as a layer: its methods, sub-batches, statistics, precision and messages."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from sslkern.losses import WhiteningMSELoss, whitening_mse_loss
from sslkern.nn import Whitening

SETTINGS = {
    "cholesky": {},
    "cholesky, shrunk": {"eps": 0.1},
    "zca": {"method": "zca"},
    "zca, floor": {"method": "zca", "eps": 0.8},
    "iterative": {"method": "iterative", "steps": 4},
    "groups": {"groups": 2},
    "zca, groups": {"method": "zca", "groups": 2},
}


def views(*shape, count=2, dtype=torch.float64, offset=0.3, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    shared = torch.randn(*shape, generator=generator, dtype=torch.float64)
    made = [shared + 0.6 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(x + offset).to(dtype).requires_grad_() for x in made]


def plain(z, method="cholesky", eps=None, steps=5, groups=1):
    """By torch's own decompositions and explicit inverses."""
    if groups > 1:
        return torch.cat([plain(part, method, eps, steps) for part in z.chunk(groups, 1)], 1)
    x, n, eye = z - z.mean(0), len(z), torch.eye(z.shape[1], dtype=z.dtype)
    s = x.T @ x / (n - 1)
    if method == "cholesky":
        eps = eps or 0.0
        return x @ torch.linalg.inv(torch.linalg.cholesky((1 - eps) * s + eps * eye)).T
    if method == "zca":
        values, vectors = torch.linalg.eigh(s)
        return x @ vectors @ torch.diag(values.clamp_min(1e-3 if eps is None else eps).rsqrt()) @ vectors.T
    sigma = x.T @ x / n + 1e-5 * eye
    p = eye
    for _ in range(steps):
        p = 1.5 * p - 0.5 * torch.matrix_power(p, 3) @ sigma / sigma.trace()
    return x @ p / sigma.trace().sqrt()


def distance(*whitened):
    u = [F.normalize(y, dim=1) for y in whitened]
    pairs = [2 - 2 * (x * y).sum(1).mean() for k, x in enumerate(u) for y in u[k + 1 :]]
    return sum(pairs) / len(pairs)


def same(found, expected, leaves, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(value, leaves, retain_graph=True) for value in (found, expected)]
    for f, e in zip(*gradients, strict=True):
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", ((9, 4), (40, 6), (3, 2)), ids=str)
@pytest.mark.parametrize("case", SETTINGS)
def test_it_is_its_formula(case, shape):
    settings, leaves = SETTINGS[case], views(*shape)
    loss = whitening_mse_loss(*leaves, **settings)
    same(loss, distance(*(plain(z, **settings) for z in leaves)), leaves)
    assert torch.equal(WhiteningMSELoss(**settings)(*leaves), loss)


@pytest.mark.parametrize("case", ("zca", "zca, floor", "iterative"))
def test_fewer_rows_than_columns(case):
    """The N x N side: the same loss, as the zero eigenvalues meet no row. The gradient is by differences, for torch's
    backward of an eigendecomposition is NaN there."""
    settings, leaves = SETTINGS[case], views(4, 9)
    loss = whitening_mse_loss(*leaves, **settings)
    torch.testing.assert_close(loss, distance(*(plain(z, **settings) for z in leaves)), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda *z: whitening_mse_loss(*z, **settings), leaves)


def test_equal_eigenvalues_have_a_gradient():
    z = torch.cat([torch.eye(4), -torch.eye(4)]).double().requires_grad_()
    other = views(8, 4)[0].detach()
    assert torch.autograd.gradcheck(lambda z: whitening_mse_loss(z, other, method="zca"), z)


def test_three_views_and_positions():
    leaves = views(9, 4, count=3)
    same(whitening_mse_loss(*leaves[:2], others=leaves[2:]), distance(*map(plain, leaves)), leaves)
    a, b = views(11, 4, 2)
    each = [distance(plain(a[..., k]), plain(b[..., k])) for k in range(2)]
    same(whitening_mse_loss(a, b, dim=1), (each[0] + each[1]) / 2, (a, b))
    rows = [z.movedim(1, -1).flatten(0, 1) for z in (a, b)]
    same(WhiteningMSELoss(dim=1, positions="pooled")(a, b), distance(*map(plain, rows)), (a, b))


@pytest.mark.parametrize("method", ("cholesky", "zca"))
def test_joint_statistics(method):
    """Both views together, as stable-pretraining whitens them."""
    a, b = views(7, 4)
    same(
        whitening_mse_loss(a, b, together=True, method=method),
        distance(*plain(torch.cat([a, b]), method).chunk(2)),
        (a, b),
    )


def test_sub_batches():
    a, b = views(12, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    parts = [distance(plain(a[rows]), plain(b[rows])) for rows in order.view(2, 6)]
    expected = (parts[0] + parts[1]) / 2
    same(whitening_mse_loss(a, b, w_size=6, permutation=order), expected, (a, b))
    drawn = WhiteningMSELoss(w_size=6)(a, b, generator=torch.Generator().manual_seed(5))
    same(drawn, expected, (a, b))
    twice = torch.stack([order, order.flip(0)])
    other = [distance(plain(a[rows]), plain(b[rows])) for rows in order.flip(0).view(2, 6)]
    found = whitening_mse_loss(a, b, w_size=6, w_iter=2, permutation=twice)
    same(found, (expected + (other[0] + other[1]) / 2) / 2, (a, b))
    torch.manual_seed(0)
    draws = {WhiteningMSELoss(w_size=6, w_iter=2)(a, b).item() for _ in range(2)}
    assert len(draws) == 2


def test_precision():
    """In float32 beside a large mean, in half precision, and inside autocast."""
    a, b = (z.detach() for z in views(64, 8, offset=1e4, dtype=torch.float32))
    expected = distance(plain(a.double()), plain(b.double())).item()
    assert whitening_mse_loss(a, b).item() == pytest.approx(expected, rel=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        a, b = views(64, 8, dtype=dtype)
        expected = distance(*(plain(z.detach().double()) for z in (a, b))).item()
        with torch.autocast("cpu", torch.bfloat16):
            loss = whitening_mse_loss(a, b)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
        assert torch.autograd.grad(loss, a)[0].dtype == dtype
    a, step = (z.detach() for z in views(64, 8, dtype=torch.float32))
    near = a + 1e-6 * step
    expected = whitening_mse_loss(a.double(), near.double()).item()
    assert 0 < expected < 1e-10 and whitening_mse_loss(a, near).item() == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("method", ("cholesky", "zca", "iterative"))
def test_bad_numbers_show(method):
    a, b = (z.detach() for z in views(9, 4, dtype=torch.float32))
    bad = a.clone()
    bad[2, 1] = torch.nan
    assert whitening_mse_loss(bad, b, method=method).isnan()
    if method == "cholesky":
        flat = a.clone()
        flat[:, 1] = 1.0
        flat.requires_grad_()
        loss = whitening_mse_loss(flat, b)
        assert loss.isnan() and torch.autograd.grad(loss, flat)[0].isnan().all()
        assert whitening_mse_loss(flat, b, eps=0.01).isfinite()


@pytest.mark.parametrize("case", ("cholesky", "zca", "iterative"))
def test_compiled(case):
    torch._dynamo.reset()
    whole = torch.compile(WhiteningMSELoss(**SETTINGS[case]), fullgraph=True, backend="aot_eager")
    leaves = views(9, 4)
    same(whole(*leaves), WhiteningMSELoss(**SETTINGS[case])(*leaves), leaves, 1e-10)


@pytest.mark.parametrize("case", SETTINGS)
def test_layer(case):
    """Training whitens by the batch and moves the statistics; evaluation whitens by them."""
    layer = Whitening(4, **SETTINGS[case], momentum=0.25).double()
    (z,) = views(30, 4, count=1)
    y, w = layer(z), torch.linspace(-1, 2, 120, dtype=torch.float64).view(30, 4)
    expected = plain(z, **SETTINGS[case])
    same((y * w).sum(), (expected * w).sum(), (z,))
    rows = z.detach()
    torch.testing.assert_close(layer.running_mean, 0.25 * rows.mean(0))
    width, divisor = 4 // layer.groups, 30 if layer.method == "iterative" else 29
    x = rows - rows.mean(0)
    s = torch.stack([x[:, k : k + width].T @ x[:, k : k + width] / divisor for k in range(0, 4, width)])
    torch.testing.assert_close(layer.running_covariance, 0.75 * torch.eye(width).double() + 0.25 * s)
    full = Whitening(4, **SETTINGS[case], momentum=1.0).double()
    full(z)
    torch.testing.assert_close(full.eval()(z), y, rtol=1e-9, atol=1e-9)
    assert full(z[:1]).shape == (1, 4) and full(z[:0]).shape == (0, 4)
    fresh = Whitening(4, **SETTINGS[case]).double().eval()
    fresh.load_state_dict(full.state_dict())
    assert torch.equal(fresh(z), full(z))
    assert torch.autograd.gradcheck(full, z[:3].detach().requires_grad_())


def test_layer_is_white_over_positions():
    """Channels of images, in the dtype of the input; and where N < d, statistics of all d columns."""
    x = views(6, 5, 3, 2, dtype=torch.bfloat16)[0]
    y = Whitening(5)(x)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    torch.testing.assert_close(torch.cov(y.float().movedim(1, 0).flatten(1)), torch.eye(5), rtol=0.02, atol=0.02)
    layer = Whitening(9, method="zca", momentum=1.0).double()
    z = views(4, 9)[0]
    torch.testing.assert_close(layer(z), layer.eval()(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.running_covariance[0], torch.cov(z.detach().T))
    assert not Whitening(4, track_running_stats=False).state_dict()


A = torch.ones(4, 3)
REFUSED = {
    "list": (lambda: whitening_mse_loss([1.0], A), TypeError, "a must be a torch.Tensor"),
    "shapes": (lambda: whitening_mse_loss(A, A[:2]), ValueError, "a and b must have the same shape"),
    "dtypes": (lambda: whitening_mse_loss(A, A.double()), TypeError, "a and b must have the same dtype"),
    "others": (lambda: whitening_mse_loss(A, A, others=A), TypeError, "others must be a list or tuple"),
    "another": (lambda: whitening_mse_loss(A, A, others=[A[:2]]), ValueError, r"a and others\[0\] must have the same"),
    "one row": (lambda: whitening_mse_loss(A[:1], A[:1], eps=0.1), ValueError, "at least 2 rows"),
    "singular": (lambda: whitening_mse_loss(A.T, A.T), ValueError, "more rows .* got 3 rows for 4 columns"),
    "singular parts": (lambda: whitening_mse_loss(A, A, w_size=2), ValueError, "got 2 rows for 3 columns"),
    "w_size": (lambda: whitening_mse_loss(A, A, w_size=3), ValueError, "w_size must be .* divide the 4 rows"),
    "w_iter": (lambda: WhiteningMSELoss(w_iter=2), ValueError, "w_iter is for sub-batches"),
    "permutation": (lambda: whitening_mse_loss(A, A, permutation=torch.arange(4)), ValueError, "it needs w_size"),
    "order": (
        lambda: whitening_mse_loss(A, A, w_size=4, permutation=torch.arange(5)),
        ValueError,
        r"permutation must have shape \(4,\)",
    ),
    "method": (lambda: WhiteningMSELoss(method="pca"), ValueError, "method must be one of"),
    "eps": (lambda: WhiteningMSELoss(eps=1.5), ValueError, r"eps must be None or a number in \[0, 1\]"),
    "eps zca": (lambda: WhiteningMSELoss(method="zca", eps=-1), ValueError, "eps must be None or a number >= 0"),
    "steps": (lambda: WhiteningMSELoss(steps=0), ValueError, "steps must be an integer >= 1"),
    "groups": (lambda: whitening_mse_loss(A, A, groups=2), ValueError, r"columns \(D\) of a must be a multiple"),
    "together": (lambda: WhiteningMSELoss(together=1), TypeError, "together must be True or False"),
    "group": (lambda: WhiteningMSELoss(group=3), TypeError, "group must be"),
    "layer": (lambda: Whitening(0), ValueError, "num_features must be an integer >= 1"),
    "layer groups": (lambda: Whitening(5, groups=2), ValueError, "num_features must be a multiple of groups=2"),
    "momentum": (lambda: Whitening(5, momentum=2), ValueError, r"momentum must be a number in \[0, 1\]"),
    "channels": (lambda: Whitening(5)(A), ValueError, "input must have 5 channels"),
    "layer rows": (lambda: Whitening(3)(A[:3]), ValueError, "input must have more rows"),
    "layer row": (lambda: Whitening(3, eps=0.1)(A[:1]), ValueError, "input must have at least 2 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_modules():
    loss = WhiteningMSELoss(method="iterative", groups=2, w_size=8, dim=1)
    assert repr(loss) == (
        "WhiteningMSELoss(method='iterative', eps=1e-05, steps=5, groups=2, together=False, w_size=8, w_iter=1, dim=1, "
        "batch_dim=0, positions='separate')"
    )
    layer = Whitening(6, method="zca")
    assert repr(layer) == (
        "Whitening(6, method='zca', eps=0.001, steps=5, groups=1, momentum=0.01, track_running_stats=True)"
    )
    for module in (loss, layer):
        assert repr(pickle.loads(pickle.dumps(module))) == repr(module)
