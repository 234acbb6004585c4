"""Products of a large matrix with few columns, from both sides, against torch's in fp64."""

import pytest
import torch
from conftest import running_on

import sslkern
from sslkern.ops import skinny_products

DTYPES = (torch.float64, torch.complex128, torch.float32, torch.complex64)
SHAPES = ((1, 1), (3, 5), (37, 300), (2, 3, 20, 33), (270, 130), (16, 16), (5, 2100), (4500, 9), (2200, 150))
EMPTY = ((0, 7), (5, 0), (0, 0), (3, 0, 4), (0, 3, 4))


@pytest.fixture(params=("reference", "native", "cuda"))
def backend(request):
    """What has the kernel."""
    with running_on(request.param):
        yield request.param


def wide(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def given(shape, m, k, dtype):
    *stack, n, p = shape
    return [torch.randn(*stack, *size, dtype=dtype) for size in ((n, p), (p, m), (n, k))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(shape, dtype, backend):
    """To 2e-15 and 4e-7 of |X| |right|, few columns and many, of one side alone and of both, stacks, odd sizes."""
    for m, k in ((0, 1), (1, 0), (2, 2), (3, 5), (4, 4), (16, 16), (20, 33), (64, 0)):
        x, right, left = given(shape, m, k, dtype)
        found = skinny_products(x, right if m else None, left if k else None)
        size = torch.linalg.matrix_norm(wide(x))
        for y, z, by in ((found[0], wide(x) @ wide(right), right), (found[1], wide(x).mH @ wide(left), left)):
            assert y.shape == z.shape and y.dtype == dtype and y.is_contiguous()
            limit = 2 * torch.finfo(dtype).eps * size * torch.linalg.vector_norm(wide(by), dim=(-2, -1))
            assert y.numel() == 0 or bool(((wide(y) - z).abs().amax((-2, -1)) <= limit).all()), (m, k)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, backend):
    """No rows, no columns, no matrices: zeros, of the right shapes; and of no factors, nothing."""
    for m, k in ((0, 0), (2, 0), (0, 3), (2, 3), (16, 17)):
        x, right, left = given(shape, m, k, torch.float32)
        found = skinny_products(x, right, left)
        assert all(torch.equal(y, z) for y, z in zip(found, (x @ right, x.mT @ left), strict=True))
    assert [y.numel() for y in skinny_products(torch.randn(5, 7))] == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_any_strides_and_conjugates(dtype, backend):
    x, right, left = given((40, 30), 3, 3, dtype)
    expected = skinny_products(x, right, left)
    strided = skinny_products(x.mT.contiguous().mT, right.mT.contiguous().mT, left.repeat(1, 2)[:, 3:])
    conjugate = skinny_products(x.conj().resolve_conj().conj(), right.conj().resolve_conj().conj(), left)
    for found in (strided, conjugate):
        assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))
    with sslkern.backend.use("reference"):
        asked = skinny_products(x.requires_grad_(), right, left)
    assert all(y.requires_grad for y in asked), "a gradient that is asked for is there"


def test_gradients_through_vmap():
    """A vmapped tensor does not say that it needs a gradient; of one argument or all, along any dimension."""
    for needs in range(1, 8):
        inputs = [z.requires_grad_(bool(needs >> i & 1)) for i, z in enumerate(given((3, 6, 5), 2, 4, torch.float64))]
        asked = [z for z in inputs if z.requires_grad]
        turned = [z.movedim(0, dim) for z, dim in zip(inputs, (1, 0, 2), strict=True)]
        results = torch.vmap(skinny_products, in_dims=(1, 0, 2))(*turned), skinny_products(*inputs)
        found, expected = (torch.autograd.grad(sum(y.sin().sum() for y in ys), asked) for ys in results)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_never_in_bfloat16(backend):
    x, right, left = given((40, 30), 3, 3, torch.float32)
    expected = skinny_products(x, right, left)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert all(torch.equal(y, z) for y, z in zip(skinny_products(x, right, left), expected, strict=True))


def test_same_bits_on_any_number_of_threads(native):
    """Of a matrix alone, too, whether it is one of a stack or not."""
    threads = torch.get_num_threads()
    for k in (2, 16):
        x, right, left = given((2, 300, 700), k, k, torch.float32)
        whole = skinny_products(x, right, left)
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                for index in (0, 1):
                    alone = skinny_products(x[index], right[index], left[index])
                    assert all(torch.equal(y, z[index]) for y, z in zip(alone, whole, strict=True))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "call, error, text",
    (
        (lambda x: skinny_products(x.half()), TypeError, r"^x must be float32, .* or complex128, got float16\.$"),
        (lambda x: skinny_products(x[0]), ValueError, r"^x must have at least two dimensions, got shape \(3,\)\.$"),
        (
            lambda x: skinny_products(x, x),
            ValueError,
            r"^right must have shape \(3, k\) for x of \(5, 3\), got \(5, 3\)\.$",
        ),
        (lambda x: skinny_products(x, None, x.mT), ValueError, r"^left must have shape \(5, k\) for x of "),
        (
            lambda x: skinny_products(x, None, x.double()),
            TypeError,
            r"^left must have the dtype of x, float32, got float64\.$",
        ),
        (lambda x: skinny_products(x, x.mT[:, :2].to("meta")), ValueError, r"^right and x must be on the same device"),
    ),
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.randn(5, 3))
