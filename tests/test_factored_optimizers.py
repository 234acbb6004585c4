"""Optimizers that move weights by factors take the steps of formed gradients, through all that a trainer does."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sslkern.core.factored_gradient import FactoredGradient
from sslkern.nn import FactoredLinear, factored_
from sslkern.optim import LARS, SGD, AdamW, clip_grad_norm_, materialize_grads_

DOUBLE = torch.float64
SIZES = 40, 48
OPTIMIZERS = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3}),
    "nesterov": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    "maximize": (SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.5, "maximize": True, "foreach": True}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.01}),
    "amsgrad": (AdamW, torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True, "weight_decay": 0.3}),
    "adamw fused": (AdamW, torch.optim.AdamW, {"lr": 0.01, "fused": True, "betas": (0.8, 0.9)}),
    "adamw capturable": (AdamW, torch.optim.AdamW, {"lr": torch.tensor(0.01), "betas": (0.8, 0.9)}),
    "lars": (LARS, LARS, {"lr": 0.3, "weight_decay": 0.1}),
    "lars filtered": (
        LARS,
        LARS,
        {"lr": torch.tensor(0.02), "weight_decay": 0.1, "weight_decay_filter": True, "lars_adaptation_filter": True},
    ),
}


def network(dtype=DOUBLE, seed=0):
    """A projector without biases before its batch norms, whose gradients would be rounding noise."""
    torch.manual_seed(seed)
    p, q = SIZES
    layers = (nn.Linear(p, q, bias=False), nn.BatchNorm1d(q), nn.ReLU(inplace=True), nn.Linear(q, p))
    return nn.Sequential(*layers).to(dtype)


def loss_of(model, x):
    return (model(x).square().sum(0) + 1).log().sum()


def batch(k, dtype=DOUBLE, rows=8):
    return torch.randn(rows, SIZES[0], generator=torch.Generator().manual_seed(k), dtype=dtype)


def pair(name, dtype=DOUBLE):
    """(model, optimizer) with torch's layers, and with factored ones."""
    ours, theirs, settings = OPTIMIZERS[name]
    plain, factored = network(dtype), factored_(network(dtype), least=0)
    return (plain, theirs(plain.parameters(), **settings)), (factored, ours(factored.parameters(), **settings))


def distance(a, b):
    return max(((p - q).norm() / q.norm()).item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def train(model, optimizer, steps, dtype=DOUBLE, first=0, step=None):
    for k in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, batch(k, dtype)).backward()
        (step or optimizer.step)()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps(name, cpu_backend):
    """In float64 to 1e-12, without forming a gradient, and with the entries of the same state."""
    (plain, theirs), (factored, ours) = pair(name)
    train(plain, theirs, 50)
    train(factored, ours, 50)
    assert all(factored[k].weight.grad.factored for k in (0, 3))
    assert distance(factored, plain) < 1e-12
    of_theirs, of_ours = theirs.state_dict()["state"], ours.state_dict()["state"]
    assert of_ours.keys() == of_theirs.keys()
    for k, state in of_ours.items():
        assert state.keys() == of_theirs[k].keys()
        for key, value in state.items():
            torch.testing.assert_close(value, of_theirs[k][key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ("momentum", "adamw", "lars"))
def test_float32_is_as_near_to_the_truth(name, cpu_backend):
    """After five steps, within twice the error of the formed gradient."""
    (truth, exact), _ = pair(name)
    (plain, theirs), (factored, ours) = pair(name, torch.float32)
    for model in (plain, factored, truth):  # one start: the rounded one
        model.load_state_dict(network(torch.float32).state_dict())
    train(truth, exact, 5)
    single = torch.float32
    for model, optimizer in ((plain, theirs), (factored, ours)):
        for k in range(5):
            optimizer.zero_grad()
            loss_of(model, batch(k).to(single)).backward()
            optimizer.step()
    errors = [distance(model.double(), truth) for model in (factored, plain)]
    assert errors[0] < 2 * errors[1] + 1e-7, errors


@pytest.mark.parametrize("name", ("momentum", "adamw", "adamw fused", "lars"))
def test_what_trainers_do(name, cpu_backend):
    """Accumulation, clipping, a scaler, a scheduler, hooks, a shared and a frozen weight, checkpointing: in one run."""
    results = []
    for model, optimizer in pair(name):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, growth_interval=2)
        model[3].weight.register_hook(lambda g: g * 0.5)
        seen = []
        model[0].weight.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(type(p.grad)))
        calls = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        frozen = nn.Linear(SIZES[0], SIZES[0]).to(DOUBLE).requires_grad_(False)
        frozen.load_state_dict({"weight": torch.eye(SIZES[0]), "bias": torch.zeros(SIZES[0])})
        frozen = factored_(frozen, least=0) if isinstance(model[0], FactoredLinear) else frozen
        for k in range(6):
            optimizer.zero_grad(set_to_none=k % 2 == 0)
            for part in range(2):  # each weight is used twice in the second part
                x = batch(2 * k + part, rows=3)
                loss = loss_of(model, frozen(x))
                if part:
                    loss = loss + loss_of(model, checkpoint(frozen, x.requires_grad_(), use_reentrant=False) * 2)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if isinstance(model[0], FactoredLinear):
                assert all(model[layer].weight.grad.factored for layer in (0, 3))
            norm = (clip_grad_norm_ if k % 2 else nn.utils.clip_grad_norm_)(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        assert len(calls) == 6 and len(seen) == 12 and frozen.weight.grad is None
        results.append((model, norm))
    (plain, norm), (factored, of_factors) = results
    torch.testing.assert_close(of_factors, norm, rtol=1e-12, atol=0)
    assert distance(factored, plain) < 1e-12


@pytest.mark.parametrize("name", ("momentum", "adamw", "lars"))
def test_resumed_bit_for_bit(name, cpu_backend):
    """From a file, in the middle of a run; from the state of torch's optimizer and back to it too."""
    model, optimizer = pair(name)[1]
    train(model, optimizer, 3)
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    train(model, optimizer, 3, first=3)
    again, resumed = pair(name)[1]
    state, of_optimizer = torch.load(saved)
    again.load_state_dict(state)
    resumed.load_state_dict(copy.deepcopy(of_optimizer))
    train(again, resumed, 3, first=3)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    plain, theirs = pair(name)[0]
    plain.load_state_dict(state)
    theirs.load_state_dict(of_optimizer)
    train(plain, theirs, 3, first=3)
    assert distance(plain, model) < 1e-12


def test_a_scaler_skips_a_step_with_infinities(cpu_backend):
    model, optimizer = pair("momentum")[1]
    scaler, start = torch.amp.GradScaler("cpu"), copy.deepcopy(model.state_dict())
    scaler.scale(loss_of(model, batch(0)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[0].weight, start["0.weight"]) and scaler.get_scale() == 2.0**15


def every_optimizer():
    for name in sorted(vars(torch.optim)):
        kind = getattr(torch.optim, name)
        if isinstance(kind, type) and name not in ("Optimizer", "SparseAdam", "LBFGS"):
            for setting in ({}, {"foreach": True}, {"fused": True}, {"momentum": 0.9, "dampening": 0.5}):
                yield name, kind, setting


def test_every_optimizer_of_torch(cpu_backend):
    """With their own ways of reading a gradient, they take the same steps. LBFGS reads it as one vector."""
    tried = 0
    for name, kind, setting in every_optimizer():
        models = network(), factored_(network(), least=0)
        try:
            optimizers = [kind([m for m in model.parameters() if m.dim() == 2], lr=0.01, **setting) for model in models]
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, 3)
        except (TypeError, RuntimeError) as error:
            assert setting, (name, error)
            continue
        assert distance(models[1], models[0]) < 1e-12, name
        tried += 1
    assert tried >= 25, tried
    models = network(), factored_(network(), least=0)
    for model in models:
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, batch(0))
            loss.backward()
            return loss

        optimizer.step(closure)
    assert distance(models[1], models[0]) < 1e-10


def test_closures_and_options():
    model, optimizer = pair("momentum")[1]
    assert optimizer.step(lambda: loss_of(model, batch(0)).backward() or 7) == 7
    other = SGD([{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3].parameters()}], lr=0.1)
    start = copy.deepcopy(model.state_dict())
    train(model, other, 1)
    assert torch.equal(model[0].weight, start["0.weight"]) and not torch.equal(model[3].weight, start["3.weight"])
    for kind, setting, error in (
        (SGD, {"lr": -1.0}, "Invalid learning rate"),
        (AdamW, {"betas": (2.0, 0.9)}, "Invalid beta"),
        (LARS, {"lr": -1.0}, "lr must be a number >= 0"),
        (LARS, {"lr": 1.0, "eta": 0.0}, "eta must be a finite number > 0"),
        (LARS, {"lr": 1.0, "momentum": 1.0}, r"momentum must be a number in \[0, 1\)"),
        (LARS, {"lr": torch.ones(2)}, "lr must be a number or a tensor of one element"),
    ):
        with pytest.raises(ValueError, match=error):
            kind(model.parameters(), **setting)
    with pytest.raises(TypeError, match="weight_decay_filter must be None, a bool or a function"):
        LARS(model.parameters(), lr=1.0, weight_decay_filter=3)


def test_a_weight_changed_by_hand_has_a_new_norm(cpu_backend):
    """LARS keeps the norm of each weight from step to step, as long as nobody else writes to it."""
    (plain, theirs), (factored, ours) = pair("lars")
    for k in range(3):
        for model, optimizer in ((plain, theirs), (factored, ours)):
            train(model, optimizer, 1, first=k)
            with torch.no_grad():
                model[0].weight.mul_(3)
    assert distance(factored, plain) < 1e-12


@pytest.mark.parametrize("name", ("momentum", "adamw", "lars"))
def test_nothing_moves_if_one_input_was_changed(name):
    model, optimizer = pair(name)[1]
    start, x = copy.deepcopy(model.state_dict()), batch(0)
    hidden = model[:3](x)
    model[3](hidden).square().sum().backward()
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match=r"^The input of a factored layer, or the gradient of its output"):
        optimizer.step()
    assert all(torch.equal(p, start[key]) for key, p in model.named_parameters()) and not optimizer.state
    assert isinstance(model[0].weight.grad, FactoredGradient)


def test_gradients_by_hand():
    model = factored_(network(), least=0)
    loss_of(model, batch(0)).backward()
    with pytest.raises(ValueError, match=r"^norm_type must be 2 for a factored gradient, got inf"):
        clip_grad_norm_(model.parameters(), 1.0, float("inf"))
    expected = model[0].weight.grad.clone()
    norm = clip_grad_norm_(model[0].weight, 1e9)
    torch.testing.assert_close(norm, expected.norm())
    assert isinstance(model[0].weight.grad, FactoredGradient)
    materialize_grads_(model.parameters())
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())
    torch.testing.assert_close(model[0].weight.grad, expected)


def test_one_step_forms_no_matrix():
    """Beside the momentum of the first step, backward and step take a small part of the weight's memory."""
    from memory import allocated

    layer = FactoredLinear(1024, 1024, bias=False)
    optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def run():
        optimizer.zero_grad()
        layer(torch.ones(8, 1024)).square().sum().backward()
        optimizer.step()

    run()
    peak, _ = allocated(run)
    assert peak < layer.weight.nbytes / 8


def test_numbers_are_made_once():
    """And those that are tensors are written into a copy."""
    numbers, p = SGD([torch.zeros(1)], lr=0.1)._numbers, torch.zeros(2, 2, dtype=torch.float64)
    fixed = numbers(p, (0.5, 2.0))
    assert numbers(p, (0.5, 2.0)) is fixed and fixed.dtype == torch.float64 and fixed.tolist() == [0.5, 2]
    assert numbers(p, (0.0, torch.tensor([3.0]))).tolist() == [0, 3] == numbers(p.float(), (0, 3)).tolist()
    assert numbers(p, (0.0, 2.0)).tolist() == [0, 2]
