"""The same bits: for a slice and its stack, again and again, for any number of threads, and under autocast."""

import warnings

import cases
import pytest
import torch

from sslkern import backend as backends

OWN_REDUCTIONS = {  # kernel -> outputs that are sums of our own, in which no library has a part
    "covariance_fwd": ("variance", "centre", "row_sq"),
    "vicreg_fwd": ("centre", "variance", "row_sq"),
    "cross_correlation_fwd": ("centre", "inv_std"),
}
OUTPUTS = {
    "covariance_fwd": ("variance", "offdiag", "centre", "gram", "row_sq"),
    "vicreg_fwd": ("loss", "terms", "centre", "variance", "gram", "row_sq"),
    "cross_correlation_fwd": ("diagonal", "offdiag", "centre", "inv_std", "gram"),
}


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("op_name", cases.OPS)
def test_a_slice_of_a_stack_equals_the_slice_alone(op_name, dtype, backend, device):
    """Bit for bit, values and gradients; odd sizes, so that slices start anywhere in memory."""
    if backend == "reference":
        pytest.skip("batched torch.matmul and torch's reductions do not promise it")
    shapes = ((3, 13, 7), (2, 2, 7, 13), (2, 37, 131), (2, 2, 33, 65), (2, 65, 33), (3, 301, 19))
    turn = cases.DTYPES.index(dtype)
    if cases.interpreted(backend):
        shapes = shapes[:2]
    if backend == "triton" and turn:  # both forms in float32, one of them in the others, which differ by the loads
        shapes = shapes[turn - 1 :: 2]
    slices_equal_themselves(op_name, dtype, shapes, device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("op_name", cases.OPS)
def test_a_slice_equals_itself_where_a_library_multiplies(op_name, dtype, native):
    """The same above a side of 256, at odd sizes: a library's sums may follow the address of its operands."""
    slices_equal_themselves(op_name, dtype, ((3, 261, 349), (3, 349, 261)), "cpu")


def slices_equal_themselves(op_name, dtype, shapes, device):
    op = cases.OPS[op_name]
    for shape in shapes:
        stack = [torch.randn(shape, device=device).to(dtype) for _ in range(op.inputs)]
        outputs, grads = cases.value_and_grad(op.call, stack)
        flat = [x.flatten(0, -3) for x in stack]
        for index in range(flat[0].shape[0]):
            alone, alone_grads = cases.value_and_grad(op.call, [x[index] for x in flat])
            for whole, part in zip(outputs, alone, strict=True):
                assert torch.equal(whole.flatten(0, len(shape) - 3)[index], part), (shape, index)
            for whole, part in zip(grads, alone_grads, strict=True):
                assert torch.equal(whole.flatten(0, -3)[index], part), (shape, index)


@pytest.mark.parametrize("op_name", cases.OPS)
def test_layout_does_not_change_the_bits(op_name, backend, device):
    """A transposed or strided view gives the bits of its contiguous copy."""
    if backend == "reference":
        pytest.skip("torch's reductions do not promise it")
    op = cases.OPS[op_name]
    names = ("transposed", "transposed wide", "rows and columns", "column slice", "permuted (B, T, D)")
    if cases.interpreted(backend) and op_name != "cross_correlation":  # two estimators load by the same kernels
        names = names["unbiased" in op_name :: 2]
    for name in names:
        views = cases.inputs_of(cases.CASES[name], op.inputs, torch.float32, device)
        ours = cases.value_and_grad(op.call, views)
        dense = cases.value_and_grad(op.call, [x.contiguous() for x in views])
        assert all(map(torch.equal, ours[0] + ours[1], dense[0] + dense[1])), name


@pytest.mark.parametrize("op_name", cases.OPS)
def test_again_and_again(op_name, backend, device):
    """Repeated calls on equal input, at other addresses, give equal bits."""
    op = cases.OPS[op_name]
    for shape in ((3, 9, 11), (17, 33)) if cases.interpreted(backend) else ((3, 9, 11), (37, 130), (300, 40)):
        views = [torch.randn(shape, device=device) for _ in range(op.inputs)]
        first = cases.value_and_grad(op.call, views)
        for _ in range(2 if cases.interpreted(backend) else 5):
            again = cases.value_and_grad(op.call, [x.clone() for x in views])
            assert all(map(torch.equal, first[0] + first[1], again[0] + again[1])), shape


@pytest.mark.parametrize("kernel", OWN_REDUCTIONS)
@pytest.mark.parametrize("dtype", (*cases.DTYPES, torch.float64), ids=str)
def test_own_reductions_ignore_the_number_of_threads(kernel, dtype, native):
    """Variances, centres and row norms have the same bits on 1 and on 2 threads, in both forms."""
    own_reductions_ignore_threads(kernel, dtype)


@pytest.mark.parametrize("kernel", OWN_REDUCTIONS)
def test_own_reductions_ignore_the_library(kernel, native):
    """The same, with a library whose order of summation follows the number of threads, as some do on some machines."""
    sums, multiply = set(), torch.mm

    def by_threads(x, y, *, out):
        cuts = torch.get_num_threads()
        sums.add(cuts)
        parts = [multiply(p, q) for p, q in zip(x.chunk(cuts, 1), y.chunk(cuts, 0), strict=True)]
        return out.copy_(sum(parts[1:], parts[0]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a kernel is overridden
        library = torch.library.Library("aten", "IMPL")
        library.impl("mm.out", by_threads, "CPU")
    try:
        own_reductions_ignore_threads(kernel, torch.float64)  # fp64 above a side of 256 is always torch.mm's
    finally:
        library._destroy()
    assert sums == {1, 2}


def own_reductions_ignore_threads(kernel, dtype):
    threads = torch.get_num_threads()
    operator = getattr(torch.ops.sslkern_native, kernel)
    for shape in ((1000, 300), (300, 1000), (3, 70, 129)):
        a, b = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
        settings = {"covariance_fwd": (a, True), "vicreg_fwd": (a, b, *cases.VICREG, True)}
        arguments = (*settings.get(kernel, (a, b, 1e-5)), shape[-2] < shape[-1])
        results = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(dict(zip(OUTPUTS[kernel], operator(*arguments), strict=True)))
        finally:
            torch.set_num_threads(threads)
        for name in OWN_REDUCTIONS[kernel]:
            assert torch.equal(results[0][name], results[1][name]), (name, shape)
        if kernel == "vicreg_fwd":  # invariance and hinge
            assert torch.equal(results[0]["terms"][..., :2], results[1]["terms"][..., :2]), shape


@pytest.mark.parametrize("op_name", cases.OPS)
def test_autocast_does_not_reach_the_op(op_name, backend, device):
    """Under bf16 autocast fp32 inputs give the bits they give outside, values and gradients."""
    op = cases.OPS[op_name]
    for shape in ((12, 20), (20, 12), (2, 9, 11), (260, 300))[: 3 if cases.interpreted(backend) else 4]:
        views = [torch.randn(shape, device=device) for _ in range(op.inputs)]
        outside = cases.value_and_grad(op.call, views)
        with torch.autocast(device.type, torch.bfloat16):
            inside = cases.value_and_grad(op.call, views)
        assert all(map(torch.equal, inside[0] + inside[1], outside[0] + outside[1])), shape


def test_other_settings_of_torch_change_no_bits(backend, device):
    """Default dtype and default device are not ours to read."""
    views = [torch.randn(9, 14, device=device) for _ in range(2)]

    def everything():
        return [cases.value_and_grad(op.call, views[: op.inputs]) for op in cases.OPS.values()]

    before = everything()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            after = [
                cases.value_and_grad(lambda *x, op=op: op.call(*x), views[: op.inputs]) for op in cases.OPS.values()
            ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert backends.forced() == backend
    for x, y in zip(before, after, strict=True):
        assert all(map(torch.equal, x[0] + x[1], y[0] + y[1]))
