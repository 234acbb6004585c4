"""Sample arguments of every kernel, as a compiler may call it. A new kernel: a case."""

import itertools

import cases
import torch


def samples(kernel, dtype, device):
    """Arguments of every kernel, by its name: both forms and estimators, a matrix, then a stack, in the middle, and at
    the end the stack of most dimensions, by channels last."""
    reference = torch.ops.sslkern_reference
    for shape in ((6, 5), (3, 5, 4), (2, 3, 70), (2, 3, 2, 3)) if kernel.startswith("batch_") else ():
        x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        if len(shape) == 4:
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        weight, bias = torch.randn(2, shape[1], device=device)
        centre, variance = reference.batch_moments_fwd(x)
        sums = reference.batch_norm_sums(dy, x, weight, bias, centre, variance, 1e-5, True)
        yield {
            "batch_moments_fwd": (x,),
            "batch_norm_fwd": (x, weight, bias, bias.clone(), weight.exp(), 0.1, 1e-5, True),
            "batch_norm_apply": (x, weight, bias, centre, variance, 1e-5, True),
            "batch_norm_sums": (dy, x, weight, bias, centre, variance, 1e-5, True),
            "batch_norm_bwd": (dy, x, weight, bias, centre, variance, 1e-5, True),
            "batch_norm_input_grad": (dy, x, weight, bias, centre, variance, sums / 12, 1e-5, False),
        }[kernel]
    for shape, kind in (((6, 6), dtype), ((2, 5, 3), torch.complex64)) if kernel == "rank_k_update_" else ():
        if dtype == torch.float32:
            u, a = (torch.randn(*shape[:-1], p, device=device, dtype=kind) for p in (shape[-1], 2))
            b = torch.randn(*shape[:-2], shape[-1], 2, device=device, dtype=kind)
            yield from ((torch.linalg.qr(u)[0].contiguous(), a, b, retraction) for retraction in (1, 2))
    for shape in ((6, 4), (2, 5, 7)) if kernel == "skinny_products" else ():
        for kind in (dtype, torch.complex64) if dtype == torch.float32 else ():
            left, right = (torch.randn(*shape[:-2], n, 2, device=device, dtype=kind) for n in shape[-2:])
            yield torch.randn(shape, device=device, dtype=kind), right, left[..., :1].contiguous()
    if kernel.startswith(("factored_linear_", "matrix_product")) and dtype == torch.float32:
        rows = (3, 6) if kernel.endswith("bwd") else (3, 5)
        yield tuple(torch.randn(shape, device=device) for shape in (rows, (6, 5)))
    yield from factored_samples(kernel, dtype, device) if kernel in ("factored_momentum_", "factored_adam_") else ()
    yield from turned_samples(kernel, dtype, device) if kernel.startswith("characteristic_") else ()
    yield from low_rank_samples(device) if kernel == "low_rank_residual" and dtype == torch.float32 else ()
    yield from contrastive_samples(device) if kernel == "contrastive_fwd" and dtype == torch.float32 else ()
    yield from pairwise_samples(kernel, device) if kernel.startswith("pairwise_") and dtype == torch.float32 else ()
    turn = itertools.cycle(((True, True), (True, False), (False, True)))  # which gradients are asked for
    for shape in ((5, 9), (2, 9, 5), (2, 4, 6, 7)):
        dual = shape[-2] < shape[-1]
        a, b = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        if len(shape) == 4:
            a, b = (x.contiguous(memory_format=torch.channels_last) for x in (a, b))
        if kernel.startswith("cross_correlation"):
            diagonal, offdiag, *saved = reference.cross_correlation_fwd(a, b, 1e-5, dual)
            backward = (diagonal, offdiag, a, b, saved[0], saved[1], diagonal, saved[2], dual)
            yield (a, b, 1e-5, dual) if kernel.endswith("_fwd") else (*backward, *next(turn))
        for unbiased in (False, True):
            if kernel.startswith("covariance"):
                variance, offdiag, centre, gram, row_sq = reference.covariance_fwd(a, unbiased, dual)
                backward = (variance, offdiag, a, centre, variance, gram, row_sq, unbiased, dual)
                yield {"covariance_fwd": (a, unbiased, dual)}.get(kernel, backward)
            if kernel.startswith("vicreg"):
                settings = (*cases.VICREG, unbiased, dual)
                loss, _, *saved = reference.vicreg_fwd(a, b, *settings)
                backward = (loss, a, b, *saved, *settings)
                yield (a, b, *settings) if kernel.endswith("_fwd") else (*backward, *next(turn))


def factored_samples(kernel, dtype, device):
    """Of a weight in fp32 and factors in this dtype, with and without the state that may be missing."""
    for n, whole in ((3, True), (4, False)):
        w, m, v, highest = (torch.rand(6, 5, device=device) for _ in range(4))
        dy, x = (torch.randn(n, columns, device=device).to(dtype) for columns in (6, 5))
        coefficients = torch.full((6 if kernel == "factored_momentum_" else 8,), 0.5, device=device)
        moments = (m if whole else None,) if kernel == "factored_momentum_" else (m, v, highest if whole else None)
        yield w, *moments, dy, x, coefficients


def turned_samples(kernel, dtype, device):
    """Of a matrix and of stacks, with projections that are kept and that are not, and shared and own directions."""
    reference = torch.ops.sslkern_reference
    for lead, keep, shared in (((), False, True), ((2,), True, True), ((2, 2), True, False)):
        z = torch.randn(*lead, 6, 5, device=device).to(dtype).mT.contiguous().mT
        directions = torch.randn(*(() if shared else lead), 5, 3, device=device)
        directions = directions.expand(*lead, 5, 3) if shared else directions
        sums, projections = reference.characteristic_sums_fwd(z, directions, 0.5, 0.3, 4, keep)
        forward = (z, directions, 0.5, 0.3, 4, keep)
        yield forward if kernel.endswith("_fwd") else (sums, z, directions, projections, 0.5, 0.3)


def low_rank_samples(device):
    """Of a matrix and of a stack, masked and not, of whole gradients and of one."""
    for lead, masked, needs in (((), True, (True, True)), ((2,), False, (True, False)), ((2,), True, (False, True))):
        m, u, v = (torch.randn(*lead, *shape, device=device) for shape in ((6, 5), (6, 2), (5, 2)))
        for loss in ("l2", "poisson"):
            yield u, v, m.bfloat16(), m > 0 if masked else None, loss, 0.1, *needs


def contrastive_samples(device):
    """Views, keys, both sides and a bank; of a matrix and of a stack; rows as they are and of unit length."""
    needs = itertools.cycle(((True, True, True), (True, False, False), (False, True, False), (False, False, False)))
    for lead, eps in (((), 1e-12), ((2,), 0.0)):
        x, y, more = (torch.randn(*lead, n, 4, device=device) for n in (6, 6, 9))
        scale = torch.full(lead, 3.0, device=device)
        for bank, views, both_sides in ((None, True, False), (None, False, True), (more, False, False)):
            yield x, y, bank, scale, views, both_sides, False, eps, eps, eps, *next(needs)
        yield x, torch.cat([y, more], -2), None, scale, False, False, True, eps, eps, 0.0, *next(needs)


def pairwise_samples(kernel, device):
    """Of one side and of two, masked and not; of whole sums and of those of given columns."""
    reference = torch.ops.sslkern_reference
    for lead, own, mask in (((), True, 1), ((2,), False, 2), ((2,), True, 5)):
        x, y = (torch.randn(*lead, n, 4, device=device) for n in (6, 6 if own else 7))
        x_labels, y_labels = (torch.arange(z[..., 0].numel(), device=device).view(z.shape[:-1]) % 3 for z in (x, y))
        labels = (None, None) if mask == 1 else (x_labels, None if own else y_labels)
        scale, rhs = torch.ones(lead, device=device), torch.randn(*lead, y.shape[-2], 3, device=device)
        y = None if own else y
        sums = reference.pairwise_logsumexp_fwd(x, y, scale, *labels, mask, "dot", not own)
        grams = (torch.stack([x, 2 * x], -3), torch.stack([scale, scale], -1), "rbf")
        yield {
            "pairwise_logsumexp_fwd": (x, y, scale, *labels, mask, "dot", not own),
            "pairwise_logsumexp_bwd": (*sums, x, y, scale, *labels, *sums, mask, "dot", not own, True, not own),
            "pairwise_argmax": (x, y, scale, *labels, mask, "sqeuclidean"),
            "pairwise_matmul_fwd": (x, y, scale, rhs, *labels, mask, "rbf"),
            "pairwise_matmul_bwd": (x[..., :3], x, y, scale, rhs, *labels, mask, "softplus", True, not own, True),
            "pairwise_gram_fwd": grams,
            "pairwise_gram_bwd": (*reference.pairwise_gram_fwd(*grams), *grams),
        }[kernel]
