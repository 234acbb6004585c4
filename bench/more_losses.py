"""Cases of the losses of columns and of spectra beyond VICReg and Barlow Twins, with what they are measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkern import losses

from .baselines import offdiag_sum
from .case import Case, Loss
from .variants import by_reference

SHAPES = ((256, 2048), (256, 8192), (1024, 512), (64, 64))
EPS = 0.1  # of the whitening, which a Cholesky factor of 64 rows and columns needs


def _rows(n: int, d: int, views: int, device: str) -> list[Tensor]:
    """Correlated views, not white, not centred."""
    generator = torch.Generator().manual_seed(n * 7919 + d)
    scale, shared = torch.linspace(1.5, 0.2, d), torch.randn(n, d, generator=generator)
    made = [shared + 0.5 * torch.randn(n, d, generator=generator) for _ in range(views)]
    return [(0.3 + z * scale).to(device).requires_grad_() for z in made]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return 2 - 2 * (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean()


def _eye(z: Tensor, n: int) -> Tensor:
    return torch.eye(n, dtype=z.dtype, device=z.device)


def _shrunk(z: Tensor) -> Tensor:
    return (1 - EPS) * (z.T @ z / (len(z) - 1)) + EPS * _eye(z, z.shape[1])


def whitening_published(a: Tensor, b: Tensor) -> Tensor:
    """With the inverse Cholesky factor, as the official script has it."""

    def whitened(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        factor = torch.linalg.cholesky(_shrunk(z))
        return z @ torch.linalg.solve_triangular(factor, _eye(z, z.shape[1]), upper=False).T

    return _distance(whitened(a), whitened(b))


def whitening_solved(a: Tensor, b: Tensor) -> Tensor:
    """By a triangular solve with the rows."""

    def whitened(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(_shrunk(z)).T, z, upper=True, left=False)

    return _distance(whitened(a), whitened(b))


def _roots(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram / (len(gram) - 1))
    return (vectors * values.clamp_min(EPS).rsqrt()) @ vectors.T


def zca_published(a: Tensor, b: Tensor) -> Tensor:
    def whitened(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        values, vectors = torch.linalg.eigh(z.T @ z / (len(z) - 1))
        return z @ ((vectors * values.clamp_min(EPS).rsqrt()) @ vectors.T)

    return _distance(whitened(a), whitened(b))


def zca_dual(a: Tensor, b: Tensor) -> Tensor:
    """By the N x N side."""

    def whitened(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        return _roots(z @ z.T) @ z

    return _distance(whitened(a), whitened(b))


def _vibcreg(a: Tensor, b: Tensor, offdiag: Callable[[Tensor], Tensor]) -> Tensor:
    loss = 25 * F.mse_loss(a, b)
    for z in (a, b):
        columns = F.normalize(z - z.mean(0), dim=0)
        loss = loss + 25 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() + 200 * offdiag(columns) / z.shape[1] ** 2
    return loss


def vibcreg_published(a: Tensor, b: Tensor) -> Tensor:
    return _vibcreg(a, b, lambda x: offdiag_sum(x.T @ x))


def vibcreg_smart(a: Tensor, b: Tensor) -> Tensor:
    return _vibcreg(a, b, lambda x: _smaller(x).square().sum() - x.shape[1])


def _smaller(x: Tensor) -> Tensor:
    return x @ x.T if x.shape[0] < x.shape[1] else x.T @ x


def tico_published(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    x, y = F.normalize(a, dim=1), F.normalize(b, dim=1)
    c = 0.9 * before + 0.1 * ((x.T @ x).detach() / len(x))
    return 1 - (x * y).sum(1).mean() + 8 * ((x @ c) * x).sum(1).mean()


def tico_smart(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """C in one product, and the mean of x'Cx with its gradient from x and detached xC."""
    x, y = F.normalize(a, dim=1), F.normalize(b, dim=1)
    fixed = x.detach()
    c = torch.addmm(before, fixed.T, fixed, beta=0.9, alpha=0.1 / len(x))
    product = fixed @ c
    return 1 - (x * y).sum(1).mean() + 8 * (2 * x * product - fixed * product).sum(1).mean()


def _frossl(a: Tensor, b: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    z = [F.normalize(x, dim=0) for x in (a, b)]
    mean, loss = (z[0] + z[1]) / 2, a.new_zeros(())
    for x in z:
        loss = loss + 2 * norm(x).log() + 2 * x.shape[1] * F.mse_loss(x, mean)
    return loss


def frossl_published(a: Tensor, b: Tensor) -> Tensor:
    return _frossl(a, b, lambda x: torch.linalg.norm(x.T @ x / x.shape[1]))


def frossl_smart(a: Tensor, b: Tensor) -> Tensor:
    return _frossl(a, b, lambda x: torch.linalg.norm(_smaller(x)) / x.shape[1])


def _emp(a: Tensor, b: Tensor, gram: Callable[[Tensor], Tensor]) -> Tensor:
    n, d = a.shape
    mean, loss = (a + b) / 2, a.new_zeros(())
    for z in (a, b):
        matrix = gram(z)
        loss = loss - torch.logdet(_eye(z, len(matrix)) + d / (n * 0.2) * matrix) / 4
        loss = loss - 100 * F.cosine_similarity(z, mean, dim=-1).mean()
    return loss


def coding_rate_published(a: Tensor, b: Tensor) -> Tensor:
    return _emp(a, b, lambda z: z.T @ z)


def coding_rate_smart(a: Tensor, b: Tensor) -> Tensor:
    return _emp(a, b, _smaller)


def mmcr_published(a: Tensor, b: Tensor) -> Tensor:
    z = torch.stack([a, b], 1)
    return -torch.linalg.svdvals(z.mean(1)).sum() + 0.005 * torch.linalg.svdvals(z).sum() / len(z)


def mmcr_smart(a: Tensor, b: Tensor) -> Tensor:
    """By eigenvalues of the smaller side in float64."""
    z = torch.stack([a, b], 1).double()
    centre, extent = _smaller(z.mean(1)), z @ z.mT
    norms = [torch.linalg.eigvalsh(gram).clamp_min(1e-12).sqrt().sum() for gram in (centre, extent)]
    return (-norms[0] + 0.005 * norms[1] / len(z)).to(a.dtype)


def _white(a: Tensor, b: Tensor) -> Tensor:
    return losses.whitening_mse_loss(a, b, eps=EPS)


def _zca(a: Tensor, b: Tensor) -> Tensor:
    return losses.whitening_mse_loss(a, b, method="zca", eps=EPS)


FAMILIES: dict[str, tuple[Loss, Loss | None, Loss]] = {
    "whitening": (whitening_published, whitening_solved, _white),
    "zca": (zca_published, zca_dual, _zca),
    "vibcreg": (vibcreg_published, vibcreg_smart, losses.vibcreg_loss),
    "tico": (tico_published, tico_smart, losses.tico_loss),
    "frossl": (frossl_published, frossl_smart, losses.frossl_loss),
    "coding_rate": (coding_rate_published, coding_rate_smart, losses.coding_rate_loss),
    "mmcr": (mmcr_published, mmcr_smart, losses.mmcr_loss),
}
CASES = [
    (family, shape)
    for family in FAMILIES
    for shape in SHAPES
    # a covariance of 8192 columns takes a decomposition of minutes
    if not (family in ("whitening", "zca") and shape[1] > 2048)
]


def more_case(family: str, shape: tuple[int, int], device: str) -> Case:
    published, smart, ours = FAMILIES[family]
    n, d = shape
    if family == "zca" and n >= d:
        smart = None  # the published formula has the smaller side
    if family == "tico":
        generator = torch.Generator().manual_seed(d)
        rows = torch.randn(2 * d, d, generator=generator)
        before = (rows.T @ rows / (2 * d) ** 1.5).to(device)

        def with_state(loss: Loss) -> Loss:
            return lambda a, b: loss(a, b, before.to(a.dtype))

        published, smart, ours = with_state(published), with_state(tico_smart), with_state(ours)
    implementations = {"published": published}
    if smart is not None:
        implementations["three-line"] = smart
    implementations["sslkern"] = ours
    return Case("view_losses", shape, lambda: _rows(n, d, 2, device), implementations, by_reference(ours), note=family)
