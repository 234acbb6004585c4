"""VCRegICA and the Amari distance: sources are found, conventions of scikit-learn hold, wrong input gets a sentence."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from sslkern.decomposition import VCRegICA
from sslkern.decomposition._separation import dependence, drawing
from sslkern.losses import vcreg_loss
from sslkern.metrics import amari_distance, hsic

ROOT = Path(__file__).parents[1]
FAST = {"max_iter": 20, "n_restarts": 1, "tol": 0.06}


def mixed(n, d, seed, families=("uniform", "laplace", "exponential", "uniform")):
    """Mixed sources with a variance of 1, their mixing matrix and a mean that is not 0."""
    random = np.random.default_rng(seed)
    s = np.stack([getattr(random, families[k % 4])(size=n) for k in range(d)], 1)
    s = (s - s.mean(0)) / s.std(0)
    a = random.standard_normal((d, d))
    return s @ a.T + 3, a


def amari(a, b):
    return amari_distance(torch.as_tensor(a), torch.as_tensor(b)).item()


# the loss


@pytest.mark.parametrize("kind", ("cosine", "tanh"))
def test_the_loss_is_vcreg_between_sources_and_hsic(kind):
    """The numerator is the covariance term of VCReg less the terms within each source, and the sum of the HSICs."""
    y = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y[:, 1] += y[:, 0].square()
    z = drawing(kind, y, torch.Generator().manual_seed(1))(4, 6)(y)
    assert z.shape == (60, 4, 6)

    def of_vcreg(z):
        return vcreg_loss(z, 0.0, 1.0) * z.shape[1]

    between = of_vcreg(z.flatten(1)) - sum(of_vcreg(z[:, i]) for i in range(4))
    blocks = torch.stack([torch.stack([hsic(z[:, i], z[:, j], "linear") for j in range(4)]) for i in range(4)])
    torch.testing.assert_close(between, blocks.sum() - blocks.trace(), rtol=1e-11, atol=0)
    for i, j in ((0, 1), (1, 3), (2, 2)):
        cross = torch.cov(torch.cat([z[:, i], z[:, j]], 1).T)[:6, 6:]
        torch.testing.assert_close(blocks[i, j], cross.square().sum(), rtol=1e-12, atol=0)
    wanted = between / (3 * blocks.trace())
    torch.testing.assert_close(dependence(z), wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(dependence(torch.stack([z, z + 5])), wanted.expand(2), rtol=1e-10, atol=0)


def test_cosine_features_average_to_the_rbf_kernels():
    """cos(w u) cos(w v) + sin(w u) sin(w v), on average over w, is the mean of the two RBF kernels."""
    y = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    z = drawing("cosine", y, torch.Generator().manual_seed(0))(1, 200_000)(y)[:, 0]
    kernel = sum((-(y - y.T).square() / (2 * s**2)).exp() for s in (1, 2)) / 2
    torch.testing.assert_close(z @ z.T / 100_000, kernel, rtol=0, atol=0.01)


# Amari distance


def test_amari_is_its_definition():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 5, 3, dtype=torch.float64)
    for k, found in enumerate(amari_distance(a, b)):
        p, total = (a[k].double() @ b[k]).abs().tolist(), 0.0
        for lines in (p, list(zip(*p, strict=True))):
            total += sum(sum(line) / max(line) - 1 for line in lines)
        assert found.item() == pytest.approx(total / 12, rel=1e-12)
    assert amari_distance(a, b.float()).dtype == torch.float32 and amari_distance(a, b).dtype == torch.float64


def test_amari_at_its_ends_and_its_invariances():
    a, b = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    order, signs = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1, -1, 1])[:, None]
    base = amari_distance(a, b)
    assert 0.05 < base < 1
    for other in (amari_distance(signs * a[order] * 7, b), amari_distance(a, b[:, order] * signs.T / 3)):
        torch.testing.assert_close(other, base)
    scaled = torch.diag(torch.tensor([1.0, -2, 30, 0.1], dtype=torch.float64))[order]
    assert amari_distance(scaled @ torch.linalg.inv(b), b) < 1e-12
    assert amari_distance(torch.ones(4, 4), torch.eye(4)) == 1
    assert amari_distance(torch.ones(1, 2), torch.ones(2, 1)) == 0
    none = torch.eye(3)
    none[1] = 0  # a source that is missed: one row, and one column, of equal entries
    assert amari_distance(none, torch.eye(3)).item() == pytest.approx(4 / 12)
    assert amari_distance(none * float("nan"), torch.eye(3)).isnan()


@pytest.mark.parametrize(
    ("error", "message", "a", "b"),
    (
        (TypeError, "a must be a torch.Tensor of shape (..., N, D), got list", [1.0], torch.eye(2)),
        (TypeError, "b must be float32", torch.eye(2), torch.eye(2).long()),
        (ValueError, "got (2, 3) and (2, 3)", torch.ones(2, 3), torch.ones(2, 3)),
        (ValueError, "got (4, 2, 2) and (2, 2)", torch.ones(4, 2, 2), torch.ones(2, 2)),
    ),
)
def test_amari_refuses(error, message, a, b):
    with pytest.raises(error, match=re.escape(message)):
        amari_distance(a, b)


# sources


@pytest.mark.parametrize(("d", "seed"), ((2, 0), (3, 0), (3, 1)))
def test_finds_sources(d, seed):
    x, a = mixed(2000, d, seed)
    ica = VCRegICA(random_state=seed)
    s = ica.fit_transform(x)
    assert amari(ica.components_, a) < 0.05 < 0.2 < amari(ica.whitening_, a)
    assert 0 < ica.loss_ < 0.01 and 0 < ica.n_iter_ <= 500
    np.testing.assert_allclose(np.cov(s.T, bias=True), np.eye(d), atol=1e-10)
    np.testing.assert_allclose(ica.mixing_, np.linalg.pinv(ica.components_), atol=1e-10)
    np.testing.assert_allclose(ica.inverse_transform(s), x, atol=1e-10)
    assert (np.diff((ica.mixing_**2).sum(0)) <= 0).all()
    assert (ica.mixing_[np.abs(ica.mixing_).argmax(0), range(d)] > 0).all()


def test_escapes_the_rotation_of_four_binary_sources():
    """Sums and differences of four binary sources are a local minimum, in which descent alone ends."""
    random = np.random.default_rng(0)
    s = np.sign(random.standard_normal((2000, 4))) + 0.4 * random.standard_normal((2000, 4))
    a = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert amari(VCRegICA(n_restarts=1, random_state=0).fit(s @ a.T).components_, a) < 0.05


def test_tanh_finds_sources():
    x, a = mixed(1500, 3, 4)
    assert amari(VCRegICA(projector="tanh", random_state=0).fit(x).components_, a) < 0.06


def test_wider_than_samples_and_fewer_components():
    """Sources that few samples of many features span, whitened from the smaller side."""
    x, _ = mixed(300, 3, 0)
    wide = x @ np.random.default_rng(1).standard_normal((3, 400))
    ica = VCRegICA(random_state=0, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = ica.fit_transform(wide)
        two = VCRegICA(2, random_state=0, **FAST).fit(wide)
    assert ica.components_.shape == (3, 400) and ica.mixing_.shape == (400, 3)  # the rank, not min(300, 400)
    np.testing.assert_allclose(ica.mixing_, np.linalg.pinv(ica.components_), atol=1e-9)
    np.testing.assert_allclose(ica.inverse_transform(s), wide, atol=1e-8)
    assert two.components_.shape == (2, 400)
    axes = np.linalg.svd(wide - wide.mean(0), full_matrices=False)[2][:2]
    np.testing.assert_allclose(two.components_ @ axes.T @ axes, two.components_, atol=1e-9)


@pytest.mark.filterwarnings("ignore:VCRegICA did not converge")
def test_kinds_dtypes_and_reproducible_numbers():
    x, _ = mixed(200, 2, 0)
    one, two, other = (VCRegICA(random_state=k, **FAST).fit(x) for k in (0, 0, 1))
    np.testing.assert_array_equal(one.components_, two.components_)
    assert (one.components_ != other.components_).any()
    assert isinstance(one.components_, np.ndarray) and one.components_.dtype == np.float64
    listed = VCRegICA(random_state=0, **FAST).fit(x.tolist())
    np.testing.assert_array_equal(one.components_, listed.components_)
    for dtype in (torch.float32, torch.float64):
        tensor = VCRegICA(random_state=0, **FAST)
        s = tensor.fit_transform(torch.from_numpy(x).to(dtype))
        assert all(isinstance(v, torch.Tensor) and v.dtype == dtype for v in (s, tensor.mixing_, tensor.mean_))
        np.testing.assert_allclose(s, one.transform(x), atol=2e-3 if dtype == torch.float32 else 0)
        assert isinstance(tensor.inverse_transform(s), torch.Tensor)
        assert isinstance(tensor.transform(x), np.ndarray)  # fitted on tensors, asked with an array
    single = VCRegICA(random_state=0, **FAST).fit(x.astype(np.float32))
    assert single.components_.dtype == single.transform(x.astype(np.float32)).dtype == np.float32
    assert one.get_feature_names_out().tolist() == ["vcregica0", "vcregica1"]


def test_parameters_are_kept_and_cloned():
    ica = VCRegICA(2, projector="tanh", width=8, max_iter=7, n_restarts=3, tol=0.1, random_state=5)
    assert clone(ica).get_params() == ica.get_params()
    assert clone(ica).get_params()["projector"] == "tanh"
    with pytest.warns(UserWarning, match="did not converge in max_iter=7 steps"):
        assert ica.set_params(tol=1e-9).fit(mixed(50, 2, 0)[0]).n_iter_ == 7


@pytest.mark.filterwarnings("ignore:VCRegICA did not converge")
def test_rank_bounds_the_sources():
    """Constant features, duplicates and few samples; one warning where more were asked for."""
    x, _ = mixed(100, 2, 0)
    full = np.concatenate([x, np.full((100, 1), 7.3), x[:, :1]], 1)
    for data in (full, full.astype(np.float32)):
        ica = VCRegICA(random_state=0, **FAST).fit(data)
        assert ica.components_.shape == (2, 4) and np.isfinite(ica.components_).all()
        np.testing.assert_allclose(ica.inverse_transform(ica.transform(data)), data, atol=1e-4)
    with pytest.warns(UserWarning, match=r"n_components=3 is larger than the rank of the centred data: 2 are used\."):
        assert VCRegICA(3, random_state=0, **FAST).fit(full).components_.shape == (2, 4)
    few = VCRegICA(random_state=0, **FAST).fit(np.random.default_rng(0).standard_normal((3, 5)))
    assert few.components_.shape == (2, 5) and np.isfinite(few.components_).all()
    one = VCRegICA(random_state=0).fit(x[:, :1])
    assert one.n_iter_ == 0 and one.loss_ == 0
    np.testing.assert_allclose(one.transform(x[:, :1]), (x[:, :1] - x[:, 0].mean()) / x[:, 0].std(), rtol=1e-12)


X = np.random.default_rng(0).standard_normal((20, 2))
BAD = {
    "NaN": (ValueError, "NaN", {}, np.full((5, 2), np.nan)),
    "NaN in a tensor": (ValueError, "X must be finite", {}, torch.full((5, 2), float("nan"))),
    "one sample": (ValueError, "minimum of 2 is required", {}, X[:1]),
    "one sample in a tensor": (ValueError, "with at least 2 sample(s)", {}, torch.ones(1, 2)),
    "equal rows": (ValueError, "X must have at least one feature that is not constant", {}, np.ones((5, 2)) / 3),
    "projector": (ValueError, "projector must be one of 'cosine', 'tanh', got 'relu'", {"projector": "relu"}, X),
    "no components": (ValueError, "n_components must be an integer >= 1, got 0", {"n_components": 0}, X),
    "width": (ValueError, "width must be even, got 3", {"width": 3}, X),
    "steps": (ValueError, "max_iter must be an integer >= 1, got 2.5", {"max_iter": 2.5}, X),
    "restarts": (ValueError, "n_restarts must be an integer >= 1, got True", {"n_restarts": True}, X),
    "tolerance": (ValueError, "tol must be a finite number > 0, got 0", {"tol": 0}, X),
    "random state": (TypeError, "random_state must be None, an int", {"random_state": "0"}, X),
}


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    error, message, settings, x = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        VCRegICA(**settings).fit(x)


def test_inverse_transform_refuses_other_widths():
    with pytest.raises(ValueError, match="not fitted yet"):
        VCRegICA().inverse_transform(X)
    ica = VCRegICA(1).fit(X)
    with pytest.raises(ValueError, match=re.escape("X must be sources of shape (n_samples, 1), got shape (20, 2).")):
        ica.inverse_transform(X)


@pytest.mark.filterwarnings("ignore::UserWarning")
@parametrize_with_checks([VCRegICA(max_iter=5, n_restarts=1)])
def test_scikit_learn(estimator, check):
    """Every check of scikit-learn, without an exception."""
    check(estimator)


def test_without_scikit_learn():
    program = (
        "import sys; sys.modules['sklearn'] = None; import numpy as np; from sslkern.decomposition import VCRegICA\n"
        "x = np.random.default_rng(0).uniform(size=(100, 2)); ica = VCRegICA(max_iter=5, random_state=0)\n"
        "s = ica.fit_transform(x); print(s.shape, ica.get_feature_names_out().tolist(), ica.set_params(tol=1.0).tol)\n"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == "(100, 2) ['vcregica0', 'vcregica1'] 1.0", ran.stderr
