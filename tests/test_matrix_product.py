"""Products by the fastest library of the processor, and where operators in plain torch take them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.func import vmap

from sslkern import backend
from sslkern.losses import swav_loss
from sslkern.ops import matrix_product
from sslkern.ops.gram import Gram

DOUBLE = torch.float64


@pytest.fixture
def taken(monkeypatch):
    """The kernels that are picked, on a processor for which another library than torch's is faster."""
    names, pick = [], matrix_product.pick
    monkeypatch.setattr(matrix_product, "pick", lambda name, x: names.append(name) or pick(name, x))
    monkeypatch.setattr(matrix_product, "vendor", lambda device: "some")
    monkeypatch.setattr(matrix_product, "_LEAST", 1 << 22)
    return names


def test_the_kernel():
    """Of matrices and of whole transposed views, in both dtypes."""
    for dtype in (torch.float32, DOUBLE):
        x, w = torch.randn(70, 300, dtype=dtype), torch.randn(200, 300, dtype=dtype)
        for a in (x, x.mT.contiguous().mT):
            for b in (w, w.mT.contiguous().mT):
                ours = torch.ops.sslkern_native.matrix_product(a, b)
                torch.testing.assert_close(ours, (x.double() @ w.double().mT).to(dtype), rtol=1e-5, atol=1e-4)
        for shapes in (((0, 3), (3, 3)), ((2, 4), (3, 3)), ((2, 3, 3), (3, 3)), ((2, 0), (0, 0))):
            with pytest.raises(RuntimeError):
                torch.ops.sslkern_native.matrix_product(*(torch.randn(s, dtype=dtype) for s in shapes))


def near(found, x, y):
    """As exact as torch's own product, up to a factor of 4, against float64."""
    truth, plain = x.double() @ y.double(), x @ y
    assert found.shape == truth.shape and found.dtype == plain.dtype
    return (found - truth).abs().max() <= 4 * (plain - truth).abs().max() + 1e-6 * truth.abs().max()


def test_products_of_any_strides(taken):
    """Matrices, rows of a stack by one matrix, and two stacks; parts, transposes, and memory that starts anywhere."""
    x, y = torch.randn(300, 260), torch.randn(260, 290)
    turned, part = x.mT.contiguous().mT, torch.randn(300, 400)[:, 100:360]
    crooked = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    for a in (x, turned, part, crooked):
        for b in (y, y.mT.contiguous().mT, torch.randn(500, 600)[3:263, 5:295], torch.randn(1, 290).expand(260, 290)):
            assert near(matrix_product.product(a, b), a, b)
    assert torch.equal(matrix_product.product(crooked, y), matrix_product.product(x, y))
    tall = torch.randn(2, 600001, 15)  # the second slice starts where no new tensor does
    assert torch.equal(*(matrix_product.product(z.mT, z) for z in (tall[1], tall[1].clone())))
    stack, other = torch.randn(2, 3, 131, 257), torch.randn(2, 3, 257, 129)
    for a, b in ((stack, y[:257]), (stack, other), (stack.mT, stack), (other.mT.flatten(0, 1), y[:257])):
        assert near(matrix_product.product(a, b), a, b)
    assert set(taken) == {"matrix_product"} and len(taken) == 16 + 2 + 2 + 1 + 6 + 6 + 1


def test_products_that_torch_runs(taken):
    """Small ones, those of other dtypes, of stacks that must be broadcast, with a gradient, in vmap, in a compiled
    graph, and where another back-end is forced."""
    x, y = torch.randn(300, 300), torch.randn(300, 300)
    product = matrix_product.product
    assert torch.equal(product(x[:40, :40], y[:40, :40]), x[:40, :40] @ y[:40, :40])
    assert torch.equal(product(x.double(), y.double()), x.double() @ y.double())
    assert product(x.bfloat16(), y.bfloat16()).dtype == torch.bfloat16
    assert product(x.expand(2, 300, 300), y.expand(2, 2, 300, 300)).shape == (2, 2, 300, 300)
    leaf = x.clone().requires_grad_()
    assert product(leaf, y).requires_grad
    torch.testing.assert_close(vmap(product)(x.expand(2, 300, 300), y.expand(2, 300, 300))[1], x @ y)
    torch.testing.assert_close(torch.compile(product, backend="eager")(x, y), x @ y)
    with backend.use("reference"):
        assert torch.equal(product(x, y), x @ y)
    assert not taken


def test_one_compiled_graph_serves_all_sizes(taken):
    """Below and above the size from which the other library is taken; in a dynamic export too."""

    def gram(x):
        return matrix_product.product(x.mT, x)

    counter = CompileCounter()
    compiled = torch.compile(gram, backend=counter, dynamic=True)
    for rows in (40, 3000, 90):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), x.mT @ x)
    assert counter.frame_count == 1 and not taken


def test_subclasses_of_tensors_are_torchs(taken):
    class Sub(torch.Tensor):
        pass

    x = torch.randn(300, 300)
    assert isinstance(matrix_product.product(x.as_subclass(Sub), x), Sub) and not taken


def test_derivatives_of_an_operator_that_takes_them(taken):
    """A second derivative, and a batch of gradients."""
    x = (torch.randn(2, 200, 300) / 10).requires_grad_()
    for z in (x, x.detach().double().requires_grad_()):
        gram = Gram.apply(z, True)
        (first,) = torch.autograd.grad(gram.square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z, retain_graph=True)
        (batched,) = torch.autograd.grad(gram, z, torch.ones(2, *gram.shape), is_grads_batched=True)
        if z is x:
            found = first, second, batched
    for ours, truth in zip(found, (first, second, batched), strict=True):
        torch.testing.assert_close(ours, truth.float(), rtol=1e-4, atol=1e-3)
    assert taken


def test_a_head_takes_them(taken, monkeypatch):
    """For all three kinds of products, x w', g w and g'x, with the values and gradients of torch's own."""
    kinds, by_other_library = set(), matrix_product.by_other_library

    def noted(x, w):
        kinds.add((w.shape[0] == 96, x.shape[0] == 96))
        return by_other_library(x, w)

    monkeypatch.setattr(matrix_product, "by_other_library", noted)
    views = [torch.nn.functional.normalize(torch.randn(256, 96), dim=1).requires_grad_() for _ in range(2)]
    w = torch.nn.functional.normalize(torch.randn(20000, 96), dim=1).requires_grad_()
    found = []
    for back_end in ("native", "reference"):
        with backend.use(back_end):
            value = swav_loss(views, w)
            found.append((value, *torch.autograd.grad(value, (*views, w))))
    assert kinds == {(False, False), (True, False), (False, True)} and found[0][-1].is_contiguous()
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
