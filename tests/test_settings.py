"""The settings of the column losses: a number or a tensor with its gradient, by name past the coefficients, checked."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from sslkern import losses, ops
from sslkern.losses import BarlowTwinsLoss, VCRegLoss, VICRegLoss

# by name: the loss of a and b, and of each setting its value; those that are tensors too; the module
LOSSES = {
    "vicreg": (
        losses.vicreg_loss,
        {"sim_coeff": 25.0, "std_coeff": 5.0, "cov_coeff": 0.7, "gamma": 1.7, "eps": 1e-2},
        ("sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps"),
        VICRegLoss,
    ),
    "vicreg, unbiased": (
        partial(losses.vicreg_loss, estimator="unbiased"),
        {"sim_coeff": 25.0, "std_coeff": 5.0, "cov_coeff": 0.7, "gamma": 1.7, "eps": 1e-2},
        ("sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps"),
        partial(VICRegLoss, estimator="unbiased"),
    ),
    "vcreg": (
        lambda a, _, **settings: losses.vcreg_loss(a, **settings),
        {"std_coeff": 5.0, "cov_coeff": 0.7, "gamma": 1.7, "eps": 1e-2},
        ("std_coeff", "cov_coeff", "gamma", "eps"),
        VCRegLoss,
    ),
    "info_vicreg": (
        losses.info_vicreg_loss,
        {"sim_coeff": 0.7, "ent_coeff": 1.7, "noise": 0.8},
        ("sim_coeff", "ent_coeff", "noise"),
        losses.InfoVICRegLoss,
    ),
    "info_vicreg, pairwise": (
        partial(losses.info_vicreg_loss, entropy="pairwise-kl"),
        {"sim_coeff": 0.7, "ent_coeff": 1.7, "noise": 1.5},
        ("sim_coeff", "ent_coeff", "noise"),
        partial(losses.InfoVICRegLoss, "pairwise-kl"),
    ),
    "barlow": (losses.barlow_twins_loss, {"lambd": 0.3, "eps": 1e-2}, ("lambd",), BarlowTwinsLoss),
}
SHAPES = {"primal": (9, 4), "dual": (6, 11), "positions": (6, 2, 9)}
EVERY = [(name, setting) for name, (_, settings, *_) in LOSSES.items() for setting in settings]
TENSORS = [(name, setting) for name, (*_, tensors, _) in LOSSES.items() for setting in tensors]


def views(shape, dtype=torch.float64):
    a = torch.randn(shape, dtype=torch.float64)
    return a.to(dtype), (a + torch.randn(shape, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_settings_have_gradients(name, shape, cpu_backend):
    """By finite differences in fp64, together with the views; and the value is that of the numbers."""
    loss, settings, tensors, _ = LOSSES[name]
    a, b = (x.requires_grad_() for x in views(SHAPES[shape]))
    numbers = {key: value for key, value in settings.items() if key not in tensors}
    leaves = [torch.tensor(settings[key], dtype=torch.float64, requires_grad=True) for key in tensors]

    def of_tensors(a, b, *values):
        return loss(a, b, **numbers, **dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(of_tensors, (a, b, *leaves))
    torch.testing.assert_close(of_tensors(a, b, *leaves), loss(a, b, **settings), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name, setting", TENSORS)
def test_one_tensor_among_numbers(name, setting):
    """Of any floating dtype and of one element in any shape, a parameter of a module too; the terms stay detached."""
    loss, settings, _, module = LOSSES[name]
    a, b = views((8, 12), torch.bfloat16)
    exact = torch.tensor(settings[setting], dtype=torch.float64, requires_grad=True)
    others = {key: value for key, value in settings.items() if key != setting}
    (expected,) = torch.autograd.grad(loss(a.double(), b.double(), **others, **{setting: exact}), exact)
    for dtype, shape in ((torch.float32, ()), (torch.float64, (1,)), (torch.bfloat16, (1, 1)), (torch.float16, (1,))):
        leaf = nn.Parameter(torch.full(shape, settings[setting], dtype=dtype))
        value, terms = loss(a, b, **others, **{setting: leaf}, return_terms=True)
        assert value.shape == () and value.dtype == torch.float32
        assert not any(term.requires_grad for term in terms.values())
        value.backward()
        assert leaf.grad.shape == shape and leaf.grad.dtype == dtype
        rounding = 8 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-5
        assert abs(float(leaf.grad) - float(expected)) <= rounding * abs(float(expected))
        built = module(**others, **{setting: leaf})
        assert [id(p) for p in built.parameters()] == [id(leaf)]
        assert "Parameter" not in repr(built)
        with torch.no_grad():
            assert torch.equal(built(a) if name == "vcreg" else built(a, b), value)


@pytest.mark.parametrize("name", LOSSES)
def test_tensors_under_compile(name):
    """Whole, with the numbers and gradients of eager, and no recompilation for another value."""
    loss, settings, tensors, _ = LOSSES[name]
    if "unbiased" in name:
        pytest.skip("the same graph but for the estimator")
    a, b = views((6, 11))
    numbers = {key: value for key, value in settings.items() if key not in tensors}
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for factor in (1.0, 1.5):
        leaves = {key: torch.tensor(factor * settings[key], requires_grad=True) for key in tensors}
        values = [f(a, b, **numbers, **leaves) for f in (compiled, loss)]
        found, expected = (torch.autograd.grad(value, list(leaves.values())) for value in values)
        assert torch.equal(*values) and all(map(torch.equal, found, expected))
    assert len(graphs) == 1


def test_no_wait_for_the_device():
    """Nothing reads a tensor among the settings: a loss of meta tensors, which have no numbers, goes through."""
    a = torch.randn(6, 11, device="meta", requires_grad=True)
    for loss, _, tensors, _ in LOSSES.values():
        leaves = {key: torch.ones((), device="meta", requires_grad=True) for key in tensors}
        loss(a, a, **leaves).backward()
        assert all(leaf.grad.shape == () for leaf in leaves.values())


WRONG = (True, False, "1", None, 1j, [1.0], math.nan, math.inf, -math.inf)
WRONG_TENSORS = (
    torch.ones(2),
    torch.ones(0),
    torch.ones((), dtype=torch.int64),
    torch.ones((), dtype=torch.bool),
    torch.ones((), dtype=torch.complex64),
    torch.ones((), device="meta"),
)


@pytest.mark.parametrize("name, setting", EVERY)
def test_wrong_settings(name, setting):
    """One sentence that begins with the name: of the function, and at the construction of the module."""
    loss, settings, tensors, module = LOSSES[name]
    a, b = views((6, 4))
    negative = (-1e-3,) if setting == "eps" else ()
    for value in (*WRONG, *WRONG_TENSORS, *negative):
        with pytest.raises((TypeError, ValueError), match=rf"^{setting} must be [^\n]*\.$"):
            loss(a, b, **{**settings, setting: value})
        if isinstance(value, torch.Tensor) and value.device.type == "meta" and setting in tensors:
            continue  # of a module, the device is compared in its forward
        with pytest.raises((TypeError, ValueError), match=rf"^{setting} must be [^\n]*\.$"):
            module(**{setting: value})
    for value in (1, 2.0, *map(torch.tensor, (0.5,) if setting in tensors else ())):
        assert torch.isfinite(loss(a, b, **{**settings, setting: value}))
        module(**{setting: value})


def test_other_settings_of_modules_are_checked():
    for module in (VICRegLoss, VCRegLoss, BarlowTwinsLoss):
        for setting, value in (
            ("dim", True),
            ("dim", 1.0),
            ("dim", "0"),
            ("batch_dim", None),
            ("positions", "all"),
            ("positions", 1),
            ("group", 3),
            ("stats" if module is BarlowTwinsLoss else "estimator", "x"),
            ("stats" if module is BarlowTwinsLoss else "estimator", None),
        ):
            with pytest.raises((TypeError, ValueError), match=f"^{setting} must be"):
                module(**{setting: value})


def test_settings_past_the_coefficients_go_by_name():
    """Another package's order of arguments is an error, not another loss."""
    a, b = views((6, 4))
    for wrong in (
        lambda: VICRegLoss(25, 25, 1, False, 1e-4),
        lambda: losses.vicreg_loss(a, b, 25, 25, 1, 1.0),
        lambda: VCRegLoss(25, 1, 1.0),
        lambda: losses.vcreg_loss(a, 25, 1, 1.0),
        lambda: BarlowTwinsLoss(5e-3, True),
        lambda: losses.barlow_twins_loss(a, b, 5e-3, 1e-5),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            wrong()


def test_settings_of_the_ops():
    a, b = views((6, 4))
    for eps in (*WRONG, torch.tensor(1e-5), torch.tensor(1e-5, requires_grad=True), -1.0):
        with pytest.raises((TypeError, ValueError), match=r"^eps must be [^\n]*\.$"):
            ops.cross_correlation(a, b, eps)
    for setting in ("estimator", "form"):
        for value in ("x", None, 1, ["dual"]):
            with pytest.raises(ValueError, match=f"^{setting} must be one of"):
                ops.covariance(a, **{setting: value})
