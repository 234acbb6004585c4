"""Reductions over pairs by their definition, with the matrix, and one call compared with it."""

import math

import torch
from torch import Tensor

from sslkern.ops import pairwise_reduce
from sslkern.ops.pairwise_reduce import _KERNELS

MASKS = (None, "offdiag", "same", "same offdiag", "different")
SHAPES = {  # lead, N, M, D; M = 0 is x against itself
    "1 x 1": ((), 1, 0, 1),
    "1 x 3": ((), 1, 3, 2),
    "own 2 x 1": ((), 2, 0, 1),
    "own 5": ((), 5, 0, 3),
    "7 x 4": ((), 7, 4, 5),
    "4 x 7": ((), 4, 7, 5),
    "own 33": ((), 33, 0, 17),
    "stack": ((2, 3), 6, 5, 4),
    "own stack": ((3,), 9, 0, 2),
    "own 70": ((), 70, 0, 16),
    "40 x 81": ((), 40, 81, 24),
}
LARGE = {"own 300": ((), 300, 0, 70), "200 x 530": ((), 200, 530, 40), "own 700 x 3": ((), 700, 0, 3)}


def brute(x: Tensor, y: Tensor | None, kernel: str, reduction: str, scale, mask, labels, rhs):
    """The definition, with the matrix."""
    z = x if y is None else y
    c = torch.as_tensor(scale, dtype=x.dtype)
    c = c.expand(x.shape[:-2])[..., None, None]
    if kernel == "cosine":
        x, z = (v / v.norm(dim=-1, keepdim=True).clamp_min(1e-12) for v in (x, z))
    if kernel in ("sqeuclidean", "rbf"):
        t = c * (x[..., :, None, :] - z[..., None, :, :]).square().sum(-1)
    else:
        t = c * (x[..., :, None, :] * z[..., None, :, :]).sum(-1)
    keep = torch.ones(x.shape[-2], z.shape[-2], dtype=torch.bool).expand(t.shape)
    for word in (mask or "").split():
        if word == "offdiag":
            keep = keep & (torch.arange(x.shape[-2])[:, None] != torch.arange(z.shape[-2]))
        else:
            equal = labels[0][..., :, None] == labels[1][..., None, :]
            keep = keep & (equal if word == "same" else ~equal)
    if reduction in ("logsumexp", "max"):
        t = t.masked_fill(~keep, -math.inf)
        some = keep.any(-1)
        safe = torch.where(some[..., None], t, torch.zeros_like(t))
        out = safe.logsumexp(-1) if reduction == "logsumexp" else safe.amax(-1)
        return torch.where(some, out, torch.full_like(out, -math.inf))
    k = {"rbf": lambda: (-t).exp(), "softplus": lambda: torch.logaddexp(t, torch.zeros_like(t))}
    k = k.get(kernel, lambda: t)().masked_fill(~keep, 0)
    if reduction == "gram":
        return k.flatten(-2) @ k.flatten(-2).mT, k.sum(-1)
    return k.sum(-1) if reduction == "sum" else k @ rhs


def inputs(shape, dtype=torch.float64, seed=0):
    lead, n, m, d = shape
    rng = torch.Generator().manual_seed(seed + n + 10 * m)
    x = torch.randn(*lead, n, d, generator=rng, dtype=torch.float64)
    y = torch.randn(*lead, m, d, generator=rng, dtype=torch.float64) if m else None
    rows = m or n
    rhs = torch.randn(*lead, rows, 3, generator=rng, dtype=torch.float64)
    labels = [torch.randint(0, 4, (*lead, k), generator=rng) for k in (n, rows)]
    labels[1] = labels[1] if m else labels[0]
    return x.to(dtype), None if y is None else y.to(dtype), rhs.to(dtype), tuple(labels)


def call(x, y, rhs, labels, kernel, reduction, scale, mask):
    by_label = mask is not None and mask != "offdiag"
    given = None if not by_label else labels if y is not None else labels[0]
    out = pairwise_reduce(
        x,
        y,
        kernel=kernel,
        reduction=reduction,
        scale=scale,
        mask=mask,
        labels=given,
        rhs=rhs if reduction == "matmul" else None,
    )
    return out[0] if reduction == "max" else out


def gradients(function, tensors, weights=None):
    """The output as one vector, and gradients of its sum with random weights, where it is finite."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out = torch.cat([o.flatten() for o in out]) if isinstance(out, tuple) else out.flatten()
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    kept = torch.where(out.isfinite(), out, torch.zeros_like(out))
    grads = torch.autograd.grad((kept * weights.to(out)).sum(), leaves, allow_unused=True)
    return out.detach(), [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def settings():
    """Every kernel of every reduction; masks where there may be one."""
    for reduction, kernels in _KERNELS.items():
        for kernel in kernels:
            for mask in (None,) if reduction == "gram" else MASKS:
                yield reduction, kernel, mask


def ids(setting):
    return " ".join(map(str, setting))


def compare(name, shape, setting, scale, dtype, device, tolerance):
    """One call against brute force in fp64 on the same rounded numbers; what differs by more than 4 x the error of
    brute force in this dtype + tolerance, in words."""
    reduction, kernel, mask = setting
    x, y, rhs, labels = inputs(shape, dtype)
    if reduction == "gram":
        x = torch.stack([x, 2 * x.roll(1, -2), x.flip(-2)], -3)
        y = None
    full = torch.float64 if dtype == torch.float64 else torch.float32
    c = torch.full(x.shape[:-2], abs(scale) if kernel == "rbf" else scale, dtype=full)
    tensors = [x, *([] if y is None else [y]), c, *([rhs] if reduction == "matmul" else [])]

    def split(given):
        it = iter(given)
        return next(it), None if y is None else next(it), next(it), next(it, rhs)

    def ours(*given):
        a, b, s, r = split(given)
        on = tuple(label.to(device) for label in labels)
        return call(a, b, r, (on[0], on[0]) if b is None else on, kernel, reduction, s, mask)

    def formula(*given):
        a, b, s, r = split(given)
        return brute(a, b, kernel, reduction, s, mask, labels, r)

    expected = gradients(formula, [t.double() for t in tensors])
    plain = expected if dtype == torch.float64 else gradients(formula, [t.to(full) for t in tensors])
    got, found = gradients(ours, [t.to(device) for t in tensors]), []
    parts = [("value", *(g[0] for g in (got, expected, plain)))]
    parts += [(f"gradient {k}", *each) for k, each in enumerate(zip(got[1], expected[1], plain[1], strict=True))]
    for what, a, b, p in parts:
        where = f"{name} {ids(setting)} scale {scale}: {what}"
        a, b, p = a.cpu().double(), b.double(), p.double()
        finite = b.isfinite()
        if not torch.equal(a[~finite], b[~finite]) or not a[finite].isfinite().all():
            found.append(f"{where} is not finite where it should be")
        elif finite.any():
            error, other, size = ((v[finite]).abs().max().item() for v in (a - b, p - b, b))
            if error > 4 * other + tolerance * (size + 1):  # a cosine of one column has gradient 0
                found.append(f"{where} off by {error:.1e} of {size:.1e}, brute force by {other:.1e}")
    return found


TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
