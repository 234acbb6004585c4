"""The steps that the bench compares do the same."""

from functools import partial

import pytest
import torch

from bench import cases, run, steps
from bench.run import _call
from sslkern.core.factored_gradient import FactoredGradient


@pytest.mark.parametrize("recipe", ("small", "small, all biases", "small, LARS"))
def test_all_implementations_have_the_same_gradients_and_leave_the_features(recipe, monkeypatch):
    monkeypatch.setattr(steps, "factored_", partial(steps.factored_, least=0))
    case = steps.step_case(recipe, "vicreg", 16, (160, 192, 160), "cpu")
    weights = case.inputs()
    found = {}
    for name in case.implementations:
        for _ in range(2):  # the features have no gradients, whoever ran before
            for p in weights:
                p.grad = None
            case.before()
            _call(case, name, weights)()
        found[name] = [p.grad.clone() for p in weights]
        assert getattr(weights[0].grad, "factored", False) == (name == "sslkern")
        for grad, expected in zip(found[name], found["published"], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    for floor in case.floors.values():
        floor()


@pytest.mark.parametrize(
    "case",
    (
        lambda: steps.layer_case(3, 32),
        lambda: steps.linear_case("x W'", 9, 40, 24),
        lambda: steps.linear_case("dy W", 9, 40, 24),
        lambda: cases.bf16_case("vicreg", 9, 24),
        lambda: cases.bf16_case("barlow", 24, 9),
    ),
)
def test_implementations_agree(case):
    """With the truth in float64, as far as their inputs have digits."""
    made = case()
    inputs = made.inputs()
    truth, tolerance = run._truth(made, inputs), {torch.float32: 1e-5, torch.bfloat16: 0.1}[inputs[0].dtype]
    for name in made.implementations:
        for x in inputs:
            x.grad = None
        value = run._call(made, name, inputs)()
        assert max(run._errors(value, inputs, truth)) < tolerance, name
    if made.family == "layer":
        assert list(made.implementations)[-1] == "least=0" and made.note == "left alone"
        assert isinstance(inputs[1].grad, FactoredGradient)


def test_the_rival_adds_the_gradient_to_the_momentum():
    """Over two views and two steps, as SGD of torch does."""
    torch.manual_seed(0)
    plain = steps.projector_of((6, 8, 5)).double()
    rival = steps.rival_of(steps.copy.deepcopy(plain))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=steps.MOMENTUM)
    for _ in range(2):
        views = torch.randn(2, 7, 6, dtype=torch.float64)
        optimizer.zero_grad()
        for model in (plain, rival):
            sum(model(x).sin().sum() for x in views).backward()
        optimizer.step()
        for layer in rival:
            if isinstance(layer, steps.IntoMomentumLinear):
                layer.step(0.1)
        rival[3].bias.data.copy_(plain[3].bias)
        for k in (1,):
            rival[k].load_state_dict(plain[k].state_dict())
        for k in (0, 3):
            torch.testing.assert_close(rival[k].weight, plain[k].weight)
