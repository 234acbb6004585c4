"""torch.compile and torch.library see ordinary ops."""

import itertools

import cases
import pytest
import torch

from sslkern import backend as backends
from sslkern import losses, metrics

COMPILED = {
    "vicreg": (lambda a, b: losses.vicreg_loss(a, b), (12, 20)),
    "vicreg, unbiased": (lambda a, b: losses.VICRegLoss(estimator="unbiased")(a, b), (20, 12)),
    "vicreg, positions": (lambda a, b: losses.vicreg_loss(a, b, return_terms=True)[0], (9, 3, 5)),
    "vcreg": (lambda a, b: losses.vcreg_loss(a) + losses.vcreg_loss(b, estimator="unbiased"), (12, 20)),
    "barlow": (lambda a, b: losses.barlow_twins_loss(a, b), (12, 20)),
    "barlow, primal": (lambda a, b: losses.BarlowTwinsLoss()(a, b), (20, 12)),
    "participation ratio": (lambda a, b: metrics.participation_ratio(a) + metrics.participation_ratio(b), (12, 20)),
}


def check(function, views, compiler):
    """Compiled whole, values and gradients equal eager's, in training and without grad."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    eager = cases.value_and_grad(lambda *x: (function(*x),), views)
    ours = cases.value_and_grad(lambda *x: (compiled(*x),), views)
    assert all(map(torch.equal, ours[0] + ours[1], eager[0] + eager[1]))
    with torch.no_grad():
        assert torch.equal(compiled(*views), eager[0][0])


# VICReg's plain form is that of `test_inductor`; of the other back-ends each op
WHOLE = [("native", name) for name in COMPILED if name != "vicreg"]
WHOLE += [(backend, name) for backend in ("reference", "triton") for name in ("vcreg", "barlow")]


@pytest.mark.parametrize("backend, name", WHOLE, indirect=["backend"])
def test_compiled_losses_have_the_bits_of_eager(name, backend, device):
    """fullgraph=True: no graph break in any loss on any back-end."""
    function, shape = COMPILED[name]
    check(function, [torch.randn(*shape, device=device) for _ in range(2)], "aot_eager")


def test_inductor(backend, device):
    """VICReg whole, forward and backward, through inductor."""
    check(losses.vicreg_loss, [torch.randn(12, 20, device=device) for _ in range(2)], "inductor")


DYNAMIC = {  # and from how many rows on: at 4 the form is dual, at 64 primal
    "vicreg, unbiased": (COMPILED["vicreg, unbiased"][0], 64),
    "vicreg of a tensor": (lambda a, b: losses.vicreg_loss(a, b, 3 + a.mean()), 4),
    "vcreg": (COMPILED["vcreg"][0], 4),
    "barlow": (COMPILED["barlow"][0], 4),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_graph_for_all_sizes(name, native):
    """20 batch sizes, one compilation: in what docs/support.md does not have, the dual form, below N = .75 D or .8 D,
    the unbiased estimator, and a coefficient that is a tensor."""
    function, first = DYNAMIC[name]
    graphs = []

    def counting(module, _):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counting)
    for n in range(first, first + 20):
        views = [torch.randn(n, 40) for _ in range(2)]
        eager, ours = (cases.value_and_grad(lambda *x, f=f: (f(*x),), views) for f in (function, compiled))
        assert all(map(torch.equal, ours[0] + ours[1], eager[0] + eager[1]))
    assert len(graphs) == 1


SHALLOW = ("test_schema", "test_faketensor")  # by each sample; what traces it, by one stack of each dtype
DEEP = (*SHALLOW, "test_autograd_registration", "test_aot_dispatch_dynamic")


def samples(kernel, dtype, device):
    """Arguments of every kernel, by its name: both forms and estimators, a matrix, then a stack, in the middle, and at
    the end the stack of most dimensions, by channels last. A new kernel: a case."""
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


@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=str)
@pytest.mark.parametrize("kernel", backends.declared())
def test_opcheck(kernel, dtype, backend, device):
    """Schema, fake kernel, dtypes, strides and aliasing of every declared kernel; one without samples fails.

    On one back-end the last sample is traced with symbolic sizes, too, and the middle one in bfloat16: flags do not
    show there, what is traced, schema and fake kernel, is the same for all, and `test_support.py` traces matrices.
    """
    try:
        backends.choice(kernel, device.type)
    except RuntimeError as error:
        pytest.skip(str(error))
    operator = getattr(getattr(torch.ops, f"sslkern_{backend}"), kernel).default
    tried = list(samples(kernel, dtype, device))
    deep = len(tried) - 1 if dtype == torch.float32 else len(tried) // 2
    if cases.interpreted(backend) and dtype == torch.bfloat16:
        tried = tried[:1]  # the others go by float32's way: all but the conversion is the same
    for place, arguments in enumerate(tried):
        tests = DEEP if place == deep and backend == "native" else SHALLOW
        torch.library.opcheck(operator, arguments, test_utils=tests)
    single = kernel.startswith("pairwise_") or kernel in ("rank_k_update_", "skinny_products")
    refused = single and dtype == torch.bfloat16
    assert tried or refused, f"{kernel} has no sample arguments"
