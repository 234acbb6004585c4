"""Cases of losses and measures over all pairs, and the smart plain-torch loops they are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkern
from sslkern.metrics import hsic, pairwise_hsic

from .case import Case, Loss

BLOCK = 512  # rows that a loop takes at once: best of 256, 512, 1024 and 2048 at (8192, 128) on two cores
PAIRS = (
    ("NT-Xent", (4096, 128)),
    ("NT-Xent", (8192, 128)),
    ("NT-Xent", (8192, 768)),
    ("NT-Xent", (32768, 128)),
    ("NT-Xent", (128, 64)),
    ("NT-Xent", (512, 128)),
    ("NT-Xent", (512, 256)),
    ("NNCLR", (64, 64)),
    ("NNCLR", (256, 128)),
    ("NNCLR", (256, 256)),
    ("MoCo, 4096 keys", (256, 128)),
    ("MoCo, 65536 keys", (256, 128)),
    ("MoCo, 65536 keys", (256, 256)),
    ("CLIP", (4096, 768)),
    ("HSIC", (8192, 32)),
    ("HSIC of all features", (4096, 64)),
)
HUGE = 16384  # rows from which the published formula takes gigabytes


def nt_xent_published(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """Cross-entropy over the whole matrix of similarities."""
    z = F.normalize(torch.cat([a, b]), dim=-1)
    n = a.shape[0]
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def nt_xent_loop(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """The same by blocks of rows, from their diagonal on: half of the products, once forward and once backward."""
    z = F.normalize(torch.cat([a, b]), dim=-1)
    x, y = z.chunk(2)
    return (_TriangularLogSumExp.apply(z, 1 / temperature) - (x * y).sum(-1).repeat(2) / temperature).mean()


class _TriangularLogSumExp(torch.autograd.Function):
    @staticmethod
    def exponentials(z: Tensor, scale: float):
        for i in range(0, z.shape[0], BLOCK):
            rows = z[i : i + BLOCK]
            e = (rows @ z[i:].T).sub_(1).mul_(scale).exp_()
            e.fill_diagonal_(0)
            yield i, i + rows.shape[0], rows, e

    @staticmethod
    def forward(ctx, z, scale):
        total = z.new_zeros(z.shape[0])
        for i, j, _, e in _TriangularLogSumExp.exponentials(z, scale):
            total[i:j] += e.sum(1)
            total[j:] += e[:, j - i :].sum(0)
        ctx.save_for_backward(z, total)
        ctx.scale = scale
        return total.log() + scale

    @staticmethod
    def backward(ctx, grad):
        z, total = ctx.saved_tensors
        share, out = grad * ctx.scale / total, torch.zeros_like(z)
        for i, j, rows, e in _TriangularLogSumExp.exponentials(z, ctx.scale):
            e.mul_(share[i:j, None] + share[None, i:])
            out[i:j] += e @ z[i:]
            out[j:] += e[:, j - i :].T @ rows
        return out, None


def clip_published(a: Tensor, b: Tensor, scale: float = 10.0) -> Tensor:
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    target = torch.arange(a.shape[0], device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def clip_loop(a: Tensor, b: Tensor, scale: float = 10.0) -> Tensor:
    """By blocks of rows, both directions of each from the same exponentials, in a backward of its own too."""
    x, y = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    rows, columns = _BothLogSumExp.apply(x, y, scale)
    return ((rows + columns) / 2 - scale * (x * y).sum(-1)).mean()


class _BothLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale):
        rows, columns = x.new_empty(x.shape[0]), y.new_zeros(y.shape[0])
        for i in range(0, x.shape[0], BLOCK):
            e = (x[i : i + BLOCK] @ y.T).sub_(1).mul_(scale).exp_()
            rows[i : i + BLOCK] = e.sum(1)
            columns += e.sum(0)
        ctx.save_for_backward(x, y, rows, columns)
        ctx.scale = scale
        return rows.log() + scale, columns.log() + scale

    @staticmethod
    def backward(ctx, grad_rows, grad_columns):
        x, y, rows, columns = ctx.saved_tensors
        a, b = grad_rows * ctx.scale / rows, grad_columns * ctx.scale / columns
        grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)
        for i in range(0, x.shape[0], BLOCK):
            some = slice(i, i + BLOCK)
            e = (x[some] @ y.T).sub_(1).mul_(ctx.scale).exp_()
            e.mul_(a[some, None] + b)
            grad_x[some] = e @ y
            grad_y += e.T @ x[some]
        return grad_x, grad_y, None


def nnclr_published(neighbours: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of the predictions of one view against the neighbours of the other, which have no gradient."""
    logits = F.normalize(neighbours, dim=-1) @ F.normalize(p, dim=-1).T / temperature
    return F.cross_entropy(logits, torch.arange(p.shape[0], device=p.device))


def nnclr_smart(neighbours: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """Without the products with one-hot targets: the temperature on the smaller side, and the positives as row sums."""
    x, y = F.normalize(neighbours, dim=-1) / temperature, F.normalize(p, dim=-1)
    return ((x @ y.T).logsumexp(1) - (x * y).sum(1)).mean()


def moco_published(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """Of rows of unit length and a queue (D, K), as MoCo stores it."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(q.shape[0], dtype=torch.int64, device=q.device))


def moco_smart(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """Without the concatenated copy of the logits."""
    q = q / temperature
    positive = (q * k).sum(1)
    return (torch.logaddexp((q @ queue).logsumexp(1), positive) - positive).mean()


def hsic_published(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """Tr(K H L H) / (N - 1)^2 with both kernels' matrices."""
    kernels = [(-scale * torch.cdist(z, z).square()).exp() for z in (x, y)]
    centred = kernels[0] - kernels[0].mean(0) - kernels[0].mean(1, keepdim=True) + kernels[0].mean()
    return (centred * kernels[1]).sum() / (x.shape[0] - 1) ** 2


def hsic_loop(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """By blocks of rows, from their diagonal on, with sums of the kernels and the weights that follow from them."""
    return _TriangularHSIC.apply(scale, x, y).flatten()[1] / (x.shape[0] - 1) ** 2


def all_hsic_loop(z: Tensor, scale: float) -> Tensor:
    """Of all pairs of columns: a block of rows of every column's kernel, and the products of these."""
    return _TriangularHSIC.apply(scale, *z.T[..., None]).sum() / (z.shape[0] - 1) ** 2


class _TriangularHSIC(torch.autograd.Function):
    """(N - 1)^2 HSIC_gh of G variables: sum K o L - 2/N rK.rL + sum K sum L/N^2."""

    @staticmethod
    def kernels(scale: float, step: int, variables):
        n = variables[0].shape[0]
        for i in range(0, n, step):
            j, blocks = min(n, i + step), []
            for v in variables:
                if v.shape[1] == 1:
                    square = (v[i:j] - v[None, i:, 0]).square_()
                else:
                    norm = v.square().sum(1)
                    square = (norm[i:j, None] + norm[None, i:]).addmm_(v[i:j], v[i:].T, alpha=-2).clamp_min_(0)
                blocks.append(square.mul_(-scale).exp_())
            yield i, j, torch.stack(blocks)

    @staticmethod
    def forward(ctx, scale, *variables):
        n, g = variables[0].shape[0], len(variables)
        step = max(16, BLOCK // g)
        gram = torch.zeros(g, g, dtype=torch.float64, device=variables[0].device)
        sums = torch.zeros(g, n, dtype=torch.float64, device=variables[0].device)
        for i, j, k in _TriangularHSIC.kernels(scale, step, variables):
            inner, outer = k[..., : j - i].flatten(1), k[..., j - i :].flatten(1)
            gram += inner @ inner.T + 2 * outer @ outer.T
            sums[:, i:j] += k.sum(2)
            sums[:, j:] += k[..., j - i :].sum(1)
        ctx.save_for_backward(sums, *variables)
        ctx.settings = scale, step
        total = sums.sum(1)
        return (gram - 2 / n * sums @ sums.T + torch.outer(total, total) / n**2).to(variables[0].dtype)

    @staticmethod
    def backward(ctx, grad):
        sums, *variables = ctx.saved_tensors
        scale, step = ctx.settings
        n, both = variables[0].shape[0], grad + grad.T
        own = (-2 / n * both.double() @ sums + (both.double() @ sums.sum(1))[:, None] / n**2).to(grad.dtype)
        grads = [torch.zeros_like(v) for v in variables]
        for i, j, k in _TriangularHSIC.kernels(scale, step, variables):
            w = (2 * both @ k.flatten(1)).view_as(k).add_(own[:, i:j, None]).add_(own[:, None, i:])
            w.mul_(k).mul_(-2 * scale)
            for v, weight, out in zip(variables, w, grads, strict=True):
                out[i:j] += weight.sum(1)[:, None] * v[i:j] - weight @ v[i:]
                out[j:] += weight[:, j - i :].sum(0)[:, None] * v[j:] - weight[:, j - i :].T @ v[i:j]
        return None, *grads


def pairs_case(what: str, shape: tuple[int, int], device: str) -> Case:
    """A loss or a measure of (rows, columns); of NT-Xent the rows are those of both views together."""
    rows, d = shape
    generator = torch.Generator().manual_seed(rows + d)
    n = rows // 2 if what == "NT-Xent" else rows
    shared = torch.randn(n, d, generator=generator)
    views = [(shared + torch.randn(n, d, generator=generator)).to(device).requires_grad_() for _ in range(2)]
    scale = 1 / (4 * d)  # of distances whose median is about 4 d
    implementations: dict[str, Loss] = {}
    if what == "NT-Xent":
        eager, loop, ours = nt_xent_published, nt_xent_loop, sslkern.nt_xent_loss
    elif what == "CLIP":
        eager, loop = clip_published, clip_loop

        def ours(a: Tensor, b: Tensor) -> Tensor:
            return sslkern.info_nce_loss(a, b, scale=10.0, symmetric=True)
    elif what == "NNCLR":
        neighbours, views = views[0].detach(), views[1:]

        def eager(p: Tensor) -> Tensor:
            return nnclr_published(neighbours, p)

        def loop(p: Tensor) -> Tensor:
            return nnclr_smart(neighbours, p)

        def ours(p: Tensor) -> Tensor:
            return sslkern.info_nce_loss(neighbours, p)
    elif what.startswith("MoCo"):
        keys = F.normalize(views[1].detach(), dim=-1)
        queue = F.normalize(torch.randn(d, int(what.split()[1]), generator=generator), dim=0).to(device)
        views = [F.normalize(views[0].detach(), dim=-1).requires_grad_()]

        def eager(q: Tensor) -> Tensor:
            return moco_published(q, keys, queue)

        def loop(q: Tensor) -> Tensor:
            return moco_smart(q, keys, queue)

        def ours(q: Tensor) -> Tensor:
            return sslkern.nt_xent_loss(q, keys, 0.1, negatives=queue.T, normalize=False)
    elif what == "HSIC":

        def eager(x: Tensor, y: Tensor) -> Tensor:
            return hsic_published(x, y, scale)

        def loop(x: Tensor, y: Tensor) -> Tensor:
            return hsic_loop(x, y, scale)

        def ours(x: Tensor, y: Tensor) -> Tensor:
            return hsic(x, y, bandwidth=(2 * scale) ** -0.5)
    else:
        views, eager = views[:1], None

        def loop(z: Tensor) -> Tensor:
            return all_hsic_loop(z, 0.25)

        def ours(z: Tensor) -> Tensor:
            return pairwise_hsic(z, bandwidth=2**0.5).sum()

    if eager is not None and rows < HUGE:
        implementations = {"published": eager, "published, compiled": torch.compile(eager, dynamic=False)}
    implementations |= {"three-line": loop, "sslkern": ours}
    side = torch.randn(2048, 2048, device=device)

    def truth(*inputs: Tensor) -> Tensor:
        with sslkern.backend.use("reference"):
            return ours(*inputs)

    return Case(
        "pairs",
        shape,
        lambda: views,
        implementations,
        truth,
        floors={"product": lambda: side @ side},
        note=what,
        huge=(),
    )
