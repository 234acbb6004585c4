"""Contrastive losses as modules, compiled whole, and what they refuse."""

import copy
import math
import pickle
from functools import partial
from unittest.mock import patch

import pytest
import torch
from conftest import running_on
from contrastive import FORMS, labels_of, leaves_of, lists_of, shuffled, value_and_grad
from torch import nn

from sslkern import losses
from sslkern.losses import info_nce_loss as NCE
from sslkern.losses import nt_xent_loss as NT
from sslkern.losses import sigmoid_loss as SIG
from sslkern.losses import spectral_contrastive_loss as SPEC
from sslkern.losses import supervised_contrastive_loss as SUP

MODULES = {
    losses.NTXentLoss: (
        losses.nt_xent_loss,
        {"temperature": 0.2, "inside": True, "decoupled": True, "normalize": False},
    ),
    losses.InfoNCELoss: (
        losses.info_nce_loss,
        {"temperature": 0.3, "scale": 7.0, "symmetric": True, "normalize": False},
    ),
    losses.SigmoidLoss: (losses.sigmoid_loss, {"scale": 3.0, "bias": -1.0}),
    losses.SpectralContrastiveLoss: (losses.spectral_contrastive_loss, {"mu": 3.0}),
}


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_the_functions(module):
    """By default settings, each other one and all; repr names them, and neither state nor pickling changes them."""
    function, settings = MODULES[module]
    a, b = torch.randn(2, 9, 5, dtype=torch.float64)
    assert torch.equal(module()(a, b), function(a, b))
    for kept in (*({name: value} for name, value in settings.items()), settings):
        made = module(**kept)
        assert torch.equal(made(a, b), function(a, b, **kept))
        assert all(f"{name}={value!r}" in repr(made) for name, value in kept.items())
        assert not made.state_dict()
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert repr(twin) == repr(made) and torch.equal(twin(a, b), made(a, b))


def test_modules_pass_on_what_is_of_a_call():
    """Views, banks, keys' positives, labels and a scale of this step."""
    a, b, c = torch.randn(3, 8, 5)
    module = losses.NTXentLoss(0.2, inside=True)
    assert torch.equal(module(a, b, others=[c]), losses.nt_xent_loss(a, b, 0.2, others=[c], inside=True))
    assert torch.equal(module(a, b, negatives=c), losses.nt_xent_loss(a, b, 0.2, negatives=c))
    assert torch.equal(
        losses.InfoNCELoss()(a, b, positives=shuffled(8, 8)), losses.info_nce_loss(a, b, positives=shuffled(8, 8))
    )
    assert torch.equal(losses.InfoNCELoss(scale=2.0)(a, b, scale=4.0), losses.info_nce_loss(a, b, 0.25))
    assert torch.equal(losses.SigmoidLoss(bias=-2.0)(a, b, scale=4.0), losses.sigmoid_loss(a, b, 4.0, -2.0))
    for inside in (False, True):
        module = losses.SupervisedContrastiveLoss(0.2, inside=inside)
        loss = partial(losses.supervised_contrastive_loss, a, temperature=0.2, inside=inside)
        assert torch.equal(module(a, labels_of(8)), loss(labels_of(8)))
        assert torch.equal(module(a, positives=lists_of(8)), loss(positives=lists_of(8)))
        assert repr(module) == f"SupervisedContrastiveLoss(temperature=0.2, inside={inside})"


def test_parameters_learn():
    """Temperatures, scales and biases given as parameters belong to the module, and get their gradients."""
    a, b = torch.randn(2, 8, 5)
    made = [losses.NTXentLoss(nn.Parameter(torch.tensor(0.5))), losses.InfoNCELoss(nn.Parameter(torch.tensor(0.5)))]
    made.append(losses.SigmoidLoss(nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(-3.0))))
    for module in made:
        module(a, b).backward()
        assert [p.grad.abs() > 0 for p in module.parameters()] == [True] * (2 if module is made[2] else 1)
        assert "tensor(" in repr(module) and "Parameter" not in repr(module)


def as_compiled(form, leaves):
    """Value and gradients, eager, by the formulas that a compiler is given: those of unit rows are for it to join."""
    with patch("torch.compiler.is_compiling", return_value=True):
        return value_and_grad(form, leaves)


WHOLE = (  # of each kind one: the others differ by numbers, or are combinations of what is here
    "nt_xent, 4 views", "decoupled", "decoupled, 3 views inside", "bank, decoupled", "info_nce, positives", "clip",
    "info_nce, as they are", "supervised", "supervised, lists inside", "sigmoid", "spectral, long",
)  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_compiled_whole(name):
    """fullgraph=True, with gradients, by coefficients that are tensors: no graph break, and the numbers of eager."""
    form = FORMS[name]
    leaves = leaves_of(form, 9, 5, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(form.ours, fullgraph=True, backend="aot_eager")
    with running_on("native"):
        for ours, eager in zip(value_and_grad(compiled, leaves), as_compiled(form.ours, leaves), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-7)


A, INT = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
REFUSED = {
    "list": (lambda: NT([1.0], A), TypeError, "a must be a torch.Tensor of shape"),
    "integers": (lambda: SIG(A, INT[:, None]), TypeError, "b must be float32, float64, bfloat16 or float16, got int64"),
    "three dimensions": (lambda: NT(A[None], A[None]), ValueError, r"a must have shape \(N, D\), got \(1, 4, 3\)"),
    "no rows": (lambda: SPEC(A[:0], A[:0]), ValueError, r"a must have at least 1 rows \(N\), got shape \(0, 3\)"),
    "no columns": (lambda: NCE(A[:, :0], A[:, :0]), ValueError, r"q must have at least one column"),
    "shapes": (lambda: NT(A, A[:3]), ValueError, r"a and b must have the same shape, got \(4, 3\) and \(3, 3\)"),
    "spectral shapes": (lambda: SPEC(A, A[:, :2]), ValueError, "a and b must have the same shape"),
    "third view": (lambda: NT(A, A, others=[A, A[:2]]), ValueError, r"a and others\[1\] must have the same shape"),
    "others": (lambda: NT(A, A, others=A), TypeError, r"others must be a list or tuple .* got Tensor"),
    "temperature 0": (lambda: NT(A, A, 0.0), ValueError, "temperature must be a finite number other than 0 .* got 0.0"),
    "temperature inf": (
        lambda: SUP(A, INT, temperature=math.inf),
        ValueError,
        "temperature must be a finite .* got inf",
    ),
    "temperature nan": (lambda: NCE(A, A, math.nan), ValueError, "temperature must be a finite .* got nan"),
    "temperature word": (lambda: NT(A, A, "0.5"), TypeError, "temperature must be a finite .* got str"),
    "temperature bool": (lambda: NT(A, A, True), TypeError, "temperature must be a finite .* got bool"),
    "temperatures": (lambda: NT(A, A, torch.ones(2)), ValueError, r"temperature must .* one element, got shape \(2,\)"),
    "temperature int": (lambda: NT(A, A, torch.tensor(1)), TypeError, "temperature must be .* got a tensor of int64"),
    "temperature elsewhere": (
        lambda: NT(A, A, torch.ones((), device="meta")),
        ValueError,
        "temperature must be on the device of the rows, cpu, got meta",
    ),
    "scale": (lambda: NCE(A, A, scale=math.nan), ValueError, "scale must be a finite number or a floating torch"),
    "sigmoid scale": (lambda: SIG(A, A, "1"), TypeError, "scale must be a finite number .* got str"),
    "bias": (lambda: SIG(A, A, 1.0, math.inf), ValueError, "bias must be a finite number .* got inf"),
    "bank": (
        lambda: NT(A, A, negatives=A[:, :2]),
        ValueError,
        r"negatives must have shape \(K, 3\) and be on cpu, .* got \(4, 2\) on cpu",
    ),
    "empty bank": (lambda: NT(A, A, negatives=A[:0]), ValueError, "negatives must have at least 1 rows"),
    "bank of numbers": (lambda: NT(A, A, negatives=A[0]), ValueError, r"negatives must have shape \(N, D\)"),
    "bank and views": (lambda: NT(A, A, others=[A], negatives=A), ValueError, "negatives go with the two views"),
    "decoupled": (lambda: NT(A[:1], A[:1], decoupled=True), ValueError, "decoupled=True needs negatives"),
    "key columns": (lambda: NCE(A, A[:, :2]), ValueError, r"q and k must have the same columns \(D\), got shapes"),
    "few keys": (lambda: NCE(A, A[:3]), ValueError, "k must have a row for every row of q unless positives"),
    "symmetric": (lambda: NCE(A[:2], A, symmetric=True), ValueError, "symmetric=True pairs row i of q"),
    "symmetric positives": (lambda: NCE(A, A, positives=INT, symmetric=True), ValueError, "no positives"),
    "positives": (lambda: NCE(A, A, positives=INT[:2]), ValueError, r"positives must have shape \(4,\) and be on cpu"),
    "positives dtype": (lambda: NCE(A, A, positives=INT.int()), TypeError, r"positives must be an int64 .* got int32"),
    "positives range": (
        lambda: NCE(A, A, positives=INT + 4),
        ValueError,
        r"positives must be in \[0, 4\), got \[4, 4\]",
    ),
    "positives negative": (lambda: NCE(A, A, positives=INT - 1), ValueError, r"positives must be in \[0, 4\), got"),
    "neither": (lambda: SUP(A), ValueError, "Give labels or positives, one of them, got neither"),
    "both": (lambda: SUP(A, INT, INT[:, None]), ValueError, "Give labels or positives, one of them, got both"),
    "labels": (lambda: SUP(A, INT[:3]), ValueError, r"labels must have shape \(4,\) and be on cpu, got \(3,\) on cpu"),
    "labels dtype": (lambda: SUP(A, A[:, 0]), TypeError, r"labels must be an int64 torch.Tensor .* got float32"),
    "labels list": (lambda: SUP(A, [0, 0, 1, 1]), TypeError, r"labels must be an int64 torch.Tensor .* got list"),
    "lists": (
        lambda: SUP(A, positives=INT),
        ValueError,
        r"positives must have shape \(4, P\) and be on cpu, got \(4,\)",
    ),
    "empty lists": (lambda: SUP(A, positives=INT[:, None][:, :0]), ValueError, r"positives must have shape \(4, P\)"),
    "lists range": (lambda: SUP(A, positives=INT[:, None] - 2), ValueError, r"positives must be in \[-1, 4\), got"),
    "mu": (lambda: SPEC(A, A, 0.0), ValueError, "mu must be a finite number > 0 or .*, got 0.0"),
    "mu word": (lambda: SPEC(A, A, "1"), TypeError, "mu must be a finite number > 0 or .*, got str"),
    "eps": (lambda: NT(A, A, eps=0.0), ValueError, "eps must be None or a finite number >= 1e-30, got 0.0"),
    "eps bool": (lambda: SUP(A, INT, eps=True), ValueError, "eps must be None or a finite number .* got True"),
    "eps tensor": (lambda: SIG(A, A, eps=torch.ones(())), ValueError, "eps must be None or a finite number"),
    "eps of rows as they are": (lambda: NCE(A, A, normalize=False, eps=0.1), ValueError, "eps is for normalize=True"),
    "eps of views as they are": (lambda: NT(A, A, normalize=False, eps=0.1), ValueError, "eps is for normalize=True"),
    "flag": (lambda: NT(A, A, inside=1.0), TypeError, "inside must be True or False, got 1.0"),
    "flag tensor": (lambda: NCE(A, A, normalize=torch.ones(())), TypeError, "normalize must be True or False"),
    "flag word": (lambda: NT(A, A, decoupled="no"), TypeError, "decoupled must be True or False, got 'no'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gets_a_sentence(name):
    call, error, sentence = REFUSED[name]
    with pytest.raises(error, match=sentence) as raised:
        call()
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_settings_past_the_coefficients_go_by_keyword():
    with pytest.raises(TypeError, match="positional arguments"):
        NT(A, A, 0.5, True)
