"""Kinds, sizes and units of the data of `DeepTensor`, generators, conventions, and messages."""

import pickle

import numpy as np
import pytest
import torch
from deep_tensors import SLIM, Fast, smooth, smooth_volume
from interpreters import python
from sklearn.base import clone
from torch import nn

from sslkern.decomposition import ConvGenerator, DeepTensor
from sslkern.decomposition._observed import standardize


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_kinds_of_arrays():
    """NumPy for NumPy and lists, tensors for tensors; the precision of X; integers in float64."""
    x = smooth(20, 15)
    model = Fast(2, max_iter=10).fit(x)
    for given in (x.tolist(), torch.from_numpy(x), torch.from_numpy(x).T.contiguous().T, np.asfortranarray(x)):
        other = Fast(2, max_iter=10).fit(given)
        assert isinstance(other.reconstruction_, torch.Tensor) == isinstance(given, torch.Tensor)
        np.testing.assert_allclose(np.asarray(other.reconstruction_), model.reconstruction_, rtol=1e-9)
    single = Fast(2, max_iter=10).fit(x.astype(np.float32))
    assert {a.dtype for a in (*single.factors_, single.reconstruction_)} == {np.dtype("f4")}
    np.testing.assert_allclose(single.reconstruction_, model.reconstruction_, atol=1e-4)
    for given in (x.astype(">f4"), x.astype(">f8"), (9 * x).astype(np.uint8), np.float16(x)):
        assert Fast(2, max_iter=2).fit(given).reconstruction_.dtype == ("f4" if given.dtype == np.float32 else "f8")
    assert Fast(2, max_iter=2).fit(torch.rand(9, 6, dtype=torch.bfloat16)).factors_[0].dtype == torch.float32
    with torch.inference_mode():
        inside = Fast(2, max_iter=10).fit(torch.from_numpy(x)).reconstruction_
    torch.testing.assert_close(inside, torch.from_numpy(model.reconstruction_), rtol=1e-9, atol=0)
    with torch.autocast("cpu"):
        assert np.array_equal(Fast(2, max_iter=10).fit(x).reconstruction_, model.reconstruction_)


@pytest.mark.parametrize("shape", ((1, 1), (1, 9), (9, 1), (2, 3), (3, 40), (5, 5), (16, 17), (33, 129)))
def test_every_size(shape):
    x = np.random.default_rng(0).random(shape)
    model = DeepTensor(2, max_iter=3, random_state=0).fit(x)
    assert model.reconstruction_.shape == shape and np.isfinite(model.reconstruction_).all()
    assert [f.shape for f in model.factors_] == [(n, 2) for n in shape]


@pytest.mark.parametrize("value", (0.0, -3.0, 1e30, 1e-30))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_constant_data(value, dtype):
    model = Fast(2, max_iter=5).fit(np.full((8, 6), value, dtype))
    assert np.abs(model.reconstruction_ - value).max() <= 4 * np.finfo(dtype).eps * (abs(value) or 1e-3)
    if value >= 0:
        for form in ("pca", "nmf"):
            assert np.isfinite(
                Fast(2, form=form, loss="poisson", max_iter=5).fit(np.full((8, 6), value, dtype)).history_
            ).all()


def test_scale_is_of_the_observed_elements():
    x = torch.tensor([[1.0, 3.0, torch.nan], [1.0, 3.0, 1e30]])
    data = standardize(x, torch.tensor([[True, True, False]] * 2), "l2", signed=True)
    assert data.offset == pytest.approx(2) and data.scale == pytest.approx(1) and data.count == 4


def test_same_random_state_same_bits():
    """And the global generator of torch is left alone; another seed gives another result."""
    x = smooth(20, 15)
    before = torch.random.get_rng_state()
    runs = [Fast(2, max_iter=8, random_state=s, stopping="holdout").fit(x).reconstruction_ for s in (3, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(runs[0], runs[1]) and not np.allclose(runs[0], runs[2])
    model = Fast(2, max_iter=8, random_state=3, stopping="holdout").fit(x).fit(x)
    assert np.array_equal(model.reconstruction_, runs[0])
    source = np.random.RandomState(0)
    one, two = (Fast(2, max_iter=2, random_state=source).fit(x).reconstruction_ for _ in range(2))
    assert not np.allclose(one, two)


def test_a_generator_per_mode_and_a_module_of_ones_own():
    class Line(nn.Module):
        """Every column is a straight line."""

        def __init__(self, n, rank):
            super().__init__()
            self.ends = nn.Parameter(torch.randn(2, rank))
            self.register_buffer("x", torch.linspace(0, 1, n)[:, None])

        def forward(self):
            return self.ends[0] * (1 - self.x) + self.ends[1] * self.x

    x = smooth(20, 15)
    model = DeepTensor(2, generator=[Line, "free"], max_iter=20, random_state=0).fit(x)
    bend = np.diff(model.factors_[0], 2, axis=0)
    assert np.abs(bend).max() < 1e-6 < np.abs(np.diff(model.factors_[1], 2, axis=0)).max()


@pytest.mark.parametrize("n, grid", ((2, None), (37, None), (35, (5, 7)), (72, (2, 36)), (210, (5, 6, 7))))
def test_conv_generator_makes_any_size(n, grid):
    module = ConvGenerator(n, 3, width=8, coarsest=4, grid=grid)
    out = module()
    assert out.shape == (n, 3)
    out.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_grid_has_its_last_axis_fastest():
    """A column of an (11, 40) grid is smooth along both axes: neighbours in the grid are neighbours in value."""
    torch.manual_seed(0)
    image = ConvGenerator(440, 1, width=16, coarsest=4, grid=(11, 40))()[:, 0].view(11, 40)
    steps = [image.diff(dim=d).square().mean() for d in (0, 1)]
    wrong = image.reshape(40, 11).diff(dim=0).square().mean()
    assert max(steps) < 0.5 * wrong


def test_conventions_of_scikit_learn(capfd):
    model = DeepTensor(np.int64(2), generator=SLIM, max_iter=2, loss="l1", random_state=0)
    other = clone(model).set_params(rank=3)
    assert other.get_params()["loss"] == "l1" and "rank=3" in repr(other)
    assert model.fit(smooth(9, 8), None) is model and not hasattr(model, "transform")
    assert np.array_equal(pickle.loads(pickle.dumps(model)).reconstruction_, model.reconstruction_)
    model.set_params(progress=True, max_iter=7).fit(smooth(9, 8))
    assert "DeepTensor" in capfd.readouterr().err


def test_without_tqdm_and_scikit_learn():
    """It imports and has its parameters; the progress bar is refused before any work."""
    code = """
import sys
for name in ("tqdm", "sklearn", "scipy"):
    sys.modules[name] = None
from sslkern.decomposition import DeepTensor
model = DeepTensor(1).set_params(max_iter=2)
print(model.get_params()["rank"], model)
model.set_params(progress=True).fit([[]])
"""
    done = python("-c", code)
    assert done.stdout.startswith("1 DeepTensor(rank=1"), done.stderr
    assert done.stderr.strip().endswith("ImportError: progress=True needs tqdm: pip install tqdm.")


X = smooth(9, 8)
BAD = (
    ({"rank": 0}, X, "rank must be an integer >= 1, got 0"),
    ({"max_iter": 0}, X, "max_iter must be an integer"),
    ({"patience": 1.5}, X, "patience must be an integer"),
    ({"form": "svd"}, X, "form must be one of 'pca', 'cp', 'nmf', got 'svd'"),
    ({"loss": "kl"}, X, "loss must be one of"),
    ({"averaging": 1.0}, X, "averaging must be below 1"),
    ({"averaging": -0.1}, X, "averaging must be a number >= 0"),
    ({"holdout": 1}, X, "holdout must be between 0 and 1"),
    ({"learning_rate": 0}, X, "learning_rate must be a finite number > 0"),
    ({"stopping": "early"}, X, "stopping must be one of 'holdout', 'discrepancy'"),
    ({"stopping": "discrepancy"}, X, "noise_std must be a finite number > 0, got None"),
    ({"stopping": "discrepancy", "loss": "l1"}, X, "stopping='discrepancy' needs loss='l2', got 'l1'"),
    ({"stopping": "holdout"}, [[1.0]], "X must have more observed elements"),
    ({"progress": "yes"}, X, "progress must be True or False"),
    ({"random_state": "a"}, X, "random_state must be None, an int"),
    ({"generator": "mlp"}, X, "generator must be 'conv', 'free' or a function"),
    ({"generator": nn.Linear(1, 1)}, X, "generator must be a function .* not a module"),
    ({"generator": ["conv"]}, X, "generator must have one entry per mode of X, 2, got 1"),
    ({"generator": ["conv", 3]}, X, r"generator\[1\] must be"),
    ({"generator": lambda n, rank: n}, X, "generator must return an nn.Module, got int"),
    ({"generator": lambda n, rank: ConvGenerator(n, 2 * rank)}, X, r"mode 0 must return a tensor of shape \(9, 2\)"),
    ({"generator": lambda n, rank: FIXED}, X, "modules with parameters"),
    ({}, X[0], r"X must be a matrix or a 3-way array .* got shape \(8,\)"),
    ({}, np.zeros((0, 3)), "at least one element"),
    ({}, X[None], r"X must be a matrix for form='pca', got shape \(1, 9, 8\): take form='cp'"),
    ({"form": "cp"}, X, "X must be a 3-way array for form='cp'"),
    ({}, X + 1j, "X must be an array of numbers, got complex128"),
    ({}, torch.eye(3).to_sparse(), "X must be a dense tensor"),
    ({}, [["a"]], "X must be an array of numbers"),
    ({}, np.full((3, 3), np.nan), "at least one observed element"),
    ({}, X + np.inf, "X must not contain infinity"),
    ({"loss": "poisson"}, -X, "X must not be negative for loss='poisson'"),
    ({"learning_rate": 1e300}, X, "the loss became nan at iteration 5: lower learning_rate"),
)  # fmt: skip
FIXED = nn.Identity()


@pytest.mark.parametrize("settings, x, message", BAD)
def test_one_sentence(settings, x, message):
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        DeepTensor(**{"rank": 2, "max_iter": 5, **settings}).fit(x)
    assert str(raised.value).count("\n") == 0


def test_one_sentence_about_the_rest():
    for mask, message in (
        (np.ones((2, 2), bool), "mask must have the shape of X"),
        (np.ones(X.shape), "array of bool"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            DeepTensor(2).fit(X, mask=mask)
    for settings, message in (({"n": 1}, "grid must"), ({"n": 6, "grid": (2, 2)}, "n = 6"), ({"width": 0}, "width")):
        with pytest.raises(ValueError, match=message):
            ConvGenerator(**{"n": 8, "rank": 2, **settings})
    with pytest.raises(ValueError, match="coarsest must be"):
        ConvGenerator(8, 2, coarsest=1)
    with pytest.raises(AttributeError, match="not fitted yet"):
        _ = DeepTensor(2).reconstruction_
    assert not hasattr(DeepTensor(2), "reconstruction_")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ("pca", "cp"))
def test_on_a_gpu(form):
    """The same start and nearly the same first iterations as on a CPU; tensors stay on their device."""
    x = smooth_volume() if form == "cp" else smooth(40, 30)
    expected = Fast(3, form=form, max_iter=10).fit(x)
    model = Fast(3, form=form, max_iter=10, stopping="holdout").fit(torch.tensor(x, device="cuda"))
    assert model.reconstruction_.is_cuda and model.factors_[0].is_cuda
    by_device = Fast(3, form=form, max_iter=10, device="cuda").fit(x)
    np.testing.assert_allclose(by_device.reconstruction_, expected.reconstruction_, atol=1e-6)
