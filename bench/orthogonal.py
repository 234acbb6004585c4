"""Cases of orthogonal weights: steps along a gradient, and training steps of a layer."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import sslkern
from sslkern import ops
from sslkern.nn import OrthogonalLinear
from sslkern.optim import ProjUNN, low_rank_factors

from . import baselines
from .case import Case, Loss, copy_of

ROTATIONS = (
    *(((n, n), 16, retraction) for n in (1024, 2048, 4096) for retraction in ("tangent", "direct")),
    *(((n, n), 1, "tangent") for n in (256, 1024, 2048)),
    ((2048, 2048), 4, "tangent"),
    ((256, 128, 128), 4, "tangent"),
)
LAYERS = ((256, 1024, 1), (256, 1024, 16), (256, 2048, 1), (256, 2048, 16), (64, 4096, 1))


def rank_k_case(shape: tuple[int, ...], k: int, retraction: ops.rank_k_update.Retraction, device: str) -> Case:
    """A step along a dense gradient of rank k, its sketch included; so every sketch finds the same, and the same U."""
    generator = torch.Generator().manual_seed(shape[-1] + k)
    *batch, n, _ = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    u = torch.linalg.qr(normal(*shape)).Q.contiguous()
    left, right, probe, lr = normal(*batch, n, k) / n, normal(*batch, n, k) / n**0.5, normal(n), 0.1
    own, g = u.clone(), left @ right.mH * n**0.5

    def step(u: Tensor, g: Tensor) -> Tensor:
        target = own if own.dtype == u.dtype else u.clone()
        a, b = low_rank_factors(g, k)
        ops.rank_k_update_(target, -lr * a, b, retraction)
        return (target[..., 0, :] * probe).abs().sum()

    def plain(u: Tensor, g: Tensor) -> Tensor:
        with sslkern.backend.use("reference"):
            return step(u, g)

    def published(u: Tensor, g: Tensor) -> Tensor:
        return (baselines.projunn_published(u, g, k, lr, retraction)[..., 0, :] * probe).abs().sum()

    def cayley() -> None:
        skew = g - g.mT
        torch.linalg.solve(one - skew, one + skew)

    implementations = {"published": published, "three-line": plain, "sslkern": step}
    (a, b), one = low_rank_factors(g, k), torch.eye(n, device=device)
    floors: dict[str, Callable[[], object]] = {
        "copy": copy_of(u),
        "update alone": lambda: ops.rank_k_update_(own, -1e-4 * a, b, retraction),  # as near in cache as what is copied
    }
    if batch:
        floors["Cayley solve"] = cayley
    else:
        floors["product"] = lambda: u @ u
    if n == 1024:
        for name in ("matrix_exp", "cayley"):
            layer = nn.Linear(n, n, bias=False, device=device)
            nn.utils.parametrizations.orthogonal(layer, orthogonal_map=name, use_trivialization=True)
            floors[f"torch's {name}"] = _through(layer, g)
        floors.update(_peers(u, g))
    return Case(
        "rank_k",
        (*shape, k),
        lambda: [u, g],
        implementations,
        plain,
        before=lambda: own.copy_(u),
        floors=floors,
        note=retraction,
        backward=False,
        huge=(),
    )


def rotation_case(m: int, n: int, k: int, device: str) -> Case:
    """A training step of an orthogonal layer, y = x W', on m rows: forward, loss, backward, and the step of W."""
    generator = torch.Generator().manual_seed(n + k)
    x, target = (torch.randn(m, n, generator=generator).to(device) for _ in range(2))
    start = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q.contiguous().to(device)

    def loss_of(y: Tensor) -> Tensor:
        return (y - target.to(y.dtype)).square().mean()

    def by(layer: nn.Module, step: Callable[[], object]) -> Loss:
        def run(x: Tensor = x) -> Tensor:
            layer.zero_grad()
            with torch.enable_grad():
                loss = loss_of(layer(x.detach().requires_grad_()))  # as inside a network
                loss.backward()
            step()
            return loss.detach()

        return run

    plain, rate = nn.Linear(n, n, bias=False, device=device), 0.1

    def published() -> None:
        u = plain.weight.detach()
        u.copy_(baselines.projunn_published(u, plain.weight.grad, k, rate, "tangent"))

    def three_lines() -> None:
        with sslkern.backend.use("reference"):
            a, b = low_rank_factors(plain.weight.grad, k)
            ops.rank_k_update_(plain.weight.detach(), -rate * a, b)

    layers = [OrthogonalLinear(n, n, bias=False, device=device, factored=factored) for factored in (True, False)]
    steps = [by(layer, ProjUNN(layer.parameters(), rate, rank=k).step) for layer in layers]
    mapped = nn.Linear(n, n, bias=False, device=device)
    nn.utils.parametrizations.orthogonal(mapped, orthogonal_map="cayley", use_trivialization=True)

    def before() -> None:
        for weight in (plain.weight, *(layer.weight_u for layer in layers)):
            weight.detach().copy_(start)

    return Case(
        "rotation",
        (m, n, k),
        lambda: [x],
        {"published": by(plain, published), "three-line": by(plain, three_lines), "sslkern": steps[0]},
        lambda x: loss_of(x @ start.double().mT),
        before=before,
        floors={
            "with a gradient": steps[1],
            **({"torch's cayley": by(mapped, torch.optim.SGD(mapped.parameters(), rate).step)} if n <= 2048 else {}),
            "no step": by(plain, lambda: None),
        },
        backward=False,
        huge=(),
    )


def _through(layer: nn.Module, g: Tensor) -> Callable[[], object]:
    """Forward and backward of a weight that is a map of a free matrix."""

    def run() -> None:
        with torch.enable_grad():
            layer.weight.backward(g)

    return run


def _peers(u: Tensor, g: Tensor) -> dict[str, Callable[[], object]]:
    """Steps of what is installed for orthogonal matrices: geotorch's Cayley map, geoopt's QR retraction."""
    found: dict[str, Callable[[], object]] = {}
    if find_spec("geotorch"):
        import geotorch

        layer = nn.Linear(*u.shape, bias=False, device=u.device)
        geotorch.orthogonal(layer, "weight", triv="cayley")
        found["geotorch's cayley"] = _through(layer, g)
    if find_spec("geoopt"):
        import geoopt

        p = geoopt.ManifoldParameter(u.clone(), manifold=geoopt.EuclideanStiefel())
        p.grad = g.clone()
        found["geoopt's QR"] = geoopt.optim.RiemannianSGD([p], lr=1e-4).step
    return found
