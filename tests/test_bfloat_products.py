"""Covariances of bf16 matrices on a CPU, by products of bf16 with sums in fp32: the values, their centring afterwards,
and the bits. In a process of their own, where SSLKERN_CPU_GEMM=bf16 takes these steps on any processor."""

import pytest
from interpreters import python

HEAD = """
import sys
sys.path.insert(0, "tests")
import torch, cases, rules, sslkern
from sslkern import backend, ops

def matrix(n, d, ratio, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=rng) + ratio * (1 + torch.arange(d) % 3)).bfloat16()

def error(x, truth):
    return float((x.double() - truth).norm() / truth.norm())
"""
RULE = """
names = ("106x130", "257x129", "129x257", "300x150", "150x300", "600x700", "transposed blocks", "slice of blocks",
         "mean 1e4, stack")
found = []
with backend.use("native"):
    for op in cases.OPS:
        for name in names:
            found += rules.complaints(op, name, torch.bfloat16, "cpu")
print(*found, sep="\\n")
"""
CENTRED = """
for n, d in ((192, 500), (500, 192), (161, 2049), (1300, 129)):
    for ratio in (0, 0.5, 2, 30):
        z = matrix(n, d, ratio)
        for z in (z, z.T.contiguous().T):
            leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
            ours, truth = (ops.covariance(x) for x in (leaf, exact))
            for a, b in zip(ours, truth):
                assert error(a, b) < 2e-5, (n, d, ratio, error(a, b))
            (ours[0].sum() + ours[1]).backward()
            (truth[0].sum() + truth[1]).backward()
            rounding = error(exact.grad.bfloat16(), exact.grad)
            assert error(leaf.grad, exact.grad) < 2 * rounding, (n, d, ratio, error(leaf.grad, exact.grad), rounding)
"""
STANDARD = """
for n, d in ((192, 500), (500, 192), (1300, 129)):
    for ratio in (0, 0.5, 2, 30):
        views = [matrix(n, d, ratio), matrix(n, d, ratio) + matrix(n, d, ratio, 1)]
        for form in (lambda x: x, lambda x: x.T.contiguous().T):
            leaves = [form(z).clone().requires_grad_() for z in views]
            exact = [z.double().requires_grad_() for z in views]
            losses = [sslkern.barlow_twins_loss(*x) for x in (leaves, exact)]
            assert error(*losses) < 2e-5, (n, d, ratio, error(*losses))
            for loss in losses:
                loss.backward()
            for a, b in zip(leaves, exact):
                rounding = error(b.grad.bfloat16(), b.grad)
                assert error(a.grad, b.grad) < 2 * rounding, (n, d, ratio, error(a.grad, b.grad), rounding)
same = matrix(300, 200, 0.5)
assert error(sslkern.barlow_twins_loss(same, same), sslkern.barlow_twins_loss(same.double(), same.double())) < 2e-5
"""
LONG = """
z = (torch.randn(1 << 17, 128, generator=torch.Generator().manual_seed(0)) + 7).bfloat16()
gram = torch.ops.sslkern_native.covariance_fwd(z, False, False)[3]
exact = z.double() - z.double().mean(0)
assert error(gram, (exact.T @ exact / (len(z) - 1)).fill_diagonal_(0)) < 1e-3
"""
BITS = """
for op in cases.OPS.values():
    for shape in ((3, 261, 149), (2, 149, 261), (2, 600, 600)):
        stack = [torch.stack([matrix(*shape[1:], 0.5, seed + k) for k in range(shape[0])]) for seed in range(op.inputs)]
        torch.set_num_threads(2)
        outputs, grads = cases.value_and_grad(op.call, stack)
        torch.set_num_threads(1)
        for k in range(shape[0]):
            alone, alone_grads = cases.value_and_grad(op.call, [x[k] for x in stack])
            for whole, part in zip((*outputs, *grads), (*alone, *alone_grads), strict=True):
                assert torch.equal(whole[k], part), (shape, k)
"""
BAD = """
for number in (float("nan"), float("inf"), -float("inf")):
    for shape in ((200, 300), (300, 200)):
        z = matrix(*shape, 0.5)
        z[7, 5] = number
        z.requires_grad_()
        variance, total = ops.covariance(z)
        (variance.sum() + total).backward()
        assert total.isnan() and z.grad[:, 5].isnan().all(), (number, shape)
        assert variance.isnan().nonzero().flatten().tolist() == [5], (number, shape)
"""


CODES = {"rule": RULE, "centred": CENTRED, "standard": STANDARD, "long sums": LONG, "bits": BITS, "bad numbers": BAD}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_products_of_bfloat16(code, native):
    """Every case within the rule of its dtype; nearly the error of a gradient rounded once, for any mean; a slice of a
    stack equals the slice alone, on one thread too; a bad number stays visible."""
    told = "from sslkern import installed; assert 'bf16' in installed.products()\n"
    done = python("-c", HEAD + told + code, timeout=600, SSLKERN_CPU_GEMM="bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout.strip(), done.stdout[-3000:]
