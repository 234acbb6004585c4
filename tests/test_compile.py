"""torch.compile and torch.library see ordinary ops."""

import cases
import pytest
import torch
from samples import samples

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


# VICReg's plain form is that of `test_inductor`; of the other back-ends each op
WHOLE = [("native", name) for name in COMPILED if name != "vicreg"]
WHOLE += [(backend, name) for backend in ("reference", "triton") for name in ("vcreg", "barlow")]


@pytest.mark.parametrize("backend, name", WHOLE, indirect=["backend"])
def test_compiled_losses_have_the_bits_of_eager(name, backend, device):
    """fullgraph=True: no graph break in any loss on any back-end."""
    function, shape = COMPILED[name]
    cases.check_compiled(function, [torch.randn(*shape, device=device) for _ in range(2)], "aot_eager")


def test_inductor(backend, device):
    """VICReg whole, forward and backward, through inductor."""
    cases.check_compiled(losses.vicreg_loss, [torch.randn(12, 20, device=device) for _ in range(2)], "inductor")


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
    others = "rank_k_update_", "skinny_products", "low_rank_residual", "contrastive_fwd", "matrix_product"
    single = kernel.startswith(("pairwise_", "factored_linear_")) or kernel in others
    refused = single and dtype == torch.bfloat16
    assert tried or refused, f"{kernel} has no sample arguments"
