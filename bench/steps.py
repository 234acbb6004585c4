"""Whole training steps of a projector on features: forward, loss, backward, optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import sslkern
from sslkern.nn import factored_
from sslkern.ops.factored_linear import LEAST, product, product_of_gradient
from sslkern.optim import LARS, SGD

from . import baselines
from .case import Case, Loss
from .pairwise import nt_xent_loop, nt_xent_published
from .variants import by_reference, onednn

OFFICIAL = (2048, 8192, 8192, 8192)
RECIPES = (
    ("VICReg, official, per device", "vicreg", 64, OFFICIAL),
    ("VICReg, official, all biases", "vicreg", 64, OFFICIAL),
    ("VICReg, official, LARS", "vicreg", 64, OFFICIAL),
    ("VICReg, solo-learn, CIFAR", "vicreg", 256, (512, 2048, 2048, 2048)),
    ("Barlow Twins, global batch of 256", "barlow", 256, (2048, 4096, 4096, 4096)),
    ("SimCLR, batch of 2048", "nt_xent", 2048, (2048, 2048, 128)),
)
PRODUCTS = ("x W'", "dy W")
LINEARS = tuple(
    (product, n, p, q)
    for product, least in zip(PRODUCTS, (512, 2048), strict=True)
    for p, q in ((512, 2048), (2048, 2048), (2048, 8192), (8192, 8192))
    for n in (16, 64, 128)
    if p >= least and (product == PRODUCTS[0] or n <= min(p, q) // 32)  # those that the layer takes
)
SINGLE_LAYERS = tuple((n, p) for p in (256, 1024, 2048, 4096, 8192) for n in (16, 64, 128, 256, 512) if n <= p // 16)
MOMENTUM = 0.9


class IntoMomentum(torch.autograd.Function):
    """A linear layer whose backward adds the gradient to the momentum by one `addmm`: what a smart user would write. It
    saves the memory of the gradient and one of its passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, momentum: Tensor, fresh: list[bool]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.momentum, ctx.fresh = momentum, fresh  # not saved: each view's backward writes to the momentum
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, w = ctx.saved_tensors
        torch.addmm(ctx.momentum, dy.T, x, beta=MOMENTUM if ctx.fresh[0] else 1.0, out=ctx.momentum)
        ctx.fresh[0] = False  # the second view of the step
        return dy @ w if ctx.needs_input_grad[0] else None, None, None, None


class IntoMomentumLinear(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.momentum, self.fresh = torch.zeros_like(layer.weight), [True]

    def forward(self, x: Tensor) -> Tensor:
        y = IntoMomentum.apply(x, self.weight, self.momentum, self.fresh)
        return y if self.bias is None else y + self.bias

    def step(self, lr: float) -> None:
        self.weight.data.add_(self.momentum, alpha=-lr)
        self.fresh[0] = True


def projector_of(widths: tuple[int, ...], biases: bool = False) -> nn.Sequential:
    """Linear layers, batch norms and ReLUs. The last linear layer has a bias, and with `biases` all have one."""
    layers: list[nn.Module] = []
    for k, (before, after) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(before, after, bias=biases or k + 2 == len(widths)))
        if k + 2 < len(widths):
            layers += [nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers)


def shared(projector: nn.Sequential) -> nn.Sequential:
    """Another projector with the same parameters."""
    return copy.deepcopy(projector, {id(p): p for p in projector.parameters()})


def step_case(recipe: str, family: str, n: int, widths: tuple[int, ...], device: str) -> Case:
    """A training step of a recipe's projector on features, by SGD with momentum, or by LARS if the recipe says so.

    "sslkern" is the loss, factored layers and the optimizer of this package; "sslkern, plain projector" is the loss
    alone. The rival is a plain projector whose backward adds to the momentum.
    """
    torch.manual_seed(0)
    biases = "biases" in recipe
    plain = projector_of(widths, biases).to(device)
    factored = factored_(shared(plain))
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(n, widths[0], generator=generator)
    features = [(base + 0.5 * torch.randn(base.shape, generator=generator)).to(device) for _ in range(2)]
    weights = list(plain.parameters())
    published, smart, ours = {
        "vicreg": (baselines.vicreg_published, baselines.vicreg_dual, sslkern.vicreg_loss),
        "barlow": (baselines.barlow_published, baselines.barlow_dual, sslkern.barlow_twins_loss),
        "nt_xent": (nt_xent_published, nt_xent_loop, sslkern.nt_xent_loss),
    }[family]

    def run(loss: Loss, projector: nn.Module) -> Loss:
        return lambda *_: loss(projector(features[0]), projector(features[1]))

    def truth(*doubles: Tensor) -> Tensor:
        double = projector_of(widths, biases).double().to(device)
        names = [name for name, _ in double.named_parameters()]
        a, b = (
            torch.func.functional_call(double, dict(zip(names, doubles, strict=True)), (x.double(),)) for x in features
        )
        return by_reference(ours)(a, b)

    implementations = {
        "published": run(published, plain),
        "three-line": run(smart, plain),
        "three-line, fused": run(smart, plain),
        "sslkern, plain projector": run(ours, plain),
        "sslkern": run(ours, factored),
    }
    # a rate of 0 does all the work and leaves the weights, so every call and every implementation sees the same ones
    if "LARS" in recipe:
        del implementations["three-line, fused"]
        optimizer, lars = (LARS(weights, lr=0.0, weight_decay=1e-6) for _ in range(2))
        afters = {"published": optimizer.step, "sslkern": lars.step}
        before = partial(_know_norms, lars)
        floors: dict[str, Callable[[], None]] = {}
    else:
        optimizers = {
            "published": torch.optim.SGD(weights, lr=0.0, momentum=MOMENTUM),
            "three-line, fused": torch.optim.SGD(weights, lr=0.0, momentum=MOMENTUM, fused=True),
            "sslkern": SGD(weights, lr=0.0, momentum=MOMENTUM),
        }
        afters = {name: optimizer.step for name, optimizer in optimizers.items()}
        before = Case.before
        floors = {"into the momentum": _rival(run(smart, rival := rival_of(plain)), rival)}
    for name in ("three-line", "sslkern, plain projector"):
        afters[name] = afters["published"]
    floors["bare GEMMs, torch.mm"] = _gemms(lambda x, w: x @ w.T, n, widths, device)
    if device == "cpu":
        floors["bare GEMMs, oneDNN"] = _gemms(onednn, n, widths, device)
    floors["16 bytes per weight"] = _copies(widths, device)
    return Case(
        "step", (n, *widths), lambda: weights, implementations, truth, before=before, afters=afters,
        floors=floors, note=recipe, huge=("three-line", "three-line, fused", "sslkern"),
    )  # fmt: skip


@torch.no_grad()
def _know_norms(optimizer: LARS) -> None:
    """In training, no other optimizer moves the weights, so this one knows their norms from its last step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.dim() == 2:
                optimizer._square(p)


def linear_case(which: str, n: int, p: int, q: int) -> Case:
    """x W' or dy W for a batch of few rows on a CPU: by torch.mm, by oneDNN, and as factored layers take it."""
    forward = which == PRODUCTS[0]
    x, w = torch.randn(n, p if forward else q), torch.randn(q, p) / p**0.5
    ours = product if forward else product_of_gradient
    implementations: dict[str, Loss] = {
        "published": lambda x, w: (x @ (w.T if forward else w)).square().mean(),
        "three-line": lambda x, w: onednn(x, w if forward else w.T).square().mean(),
        "sslkern": lambda x, w: ours(x, w).square().mean(),
    }
    truth = implementations["published"]
    return Case("linear", (n, p, q), lambda: [x, w], implementations, truth, backward=False, note=which)


def layer_case(n: int, width: int) -> Case:
    """A step of one square layer, by SGD with momentum: forward, both gradients, and the optimizer."""
    torch.manual_seed(0)
    plain = nn.Linear(width, width, bias=False)
    ours, factored = (factored_(copy.deepcopy(plain, {id(plain.weight): plain.weight}), least=k) for k in (LEAST, 0))
    x = torch.randn(n, width, requires_grad=True)

    def run(layer: nn.Module) -> Loss:
        return lambda *_: layer(x).square().mean()

    implementations = {"published": run(plain), "three-line": run(plain), "sslkern": run(ours)}
    settings: dict[str, Any] = {"lr": 0.0, "momentum": MOMENTUM}
    afters = {
        "published": torch.optim.SGD([plain.weight], **settings).step,
        "three-line": torch.optim.SGD([plain.weight], **settings, fused=True).step,
        "sslkern": SGD([plain.weight], **settings, fused=True).step,
    }
    note = "factored"
    if type(ours) is nn.Linear:
        note, implementations["least=0"], afters["least=0"] = "left alone", run(factored), afters["sslkern"]
    truth: Loss = lambda x, w: (x @ w.T).square().mean()  # noqa: E731
    return Case("layer", (n, width), lambda: [x, plain.weight], implementations, truth, afters=afters, note=note)


def rival_of(projector: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(IntoMomentumLinear(m) if isinstance(m, nn.Linear) else m for m in shared(projector)))


def _rival(loss: Loss, projector: nn.Sequential) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        for layer in projector:
            if isinstance(layer, IntoMomentumLinear):
                layer.step(0.0)

    return step


def _gemms(
    multiply: Callable[[Tensor, Tensor], Tensor], n: int, widths: tuple[int, ...], device: str
) -> Callable[[], None]:
    """The products of a step for both views: y = x W', dx = dy W except in the first layer, and dW = dy' x."""
    layers = [
        [torch.randn(*shape, device=device) for shape in ((2 * n, p), (2 * n, q), (q, p), (q, p))]
        for p, q in pairwise(widths)
    ]

    def run() -> None:
        for k, (x, dy, w, dw) in enumerate(layers):
            multiply(x, w)
            if k:
                multiply(dy, w.T)
            torch.mm(dy.T, x, out=dw)

    return run


def _copies(widths: tuple[int, ...], device: str) -> Callable[[], None]:
    """The traffic of weights and momenta: both are read and written once."""
    pairs = [
        [torch.zeros(q, p, device=device) for _ in range(2)] for p, q in pairwise(widths) for _ in range(2)
    ]  # weights, then momenta

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return run
