"""CUDA graphs: what a graph replays has the bits of a call, and the sources have nothing that forbids a capture.

That no operator waits for the device is seen without a GPU, in `test_fake_cuda.py`.
"""

import ast
import re

import pytest
import torch
from conftest import ROOT
from support import widened
from support_layers import SUBJECTS

from bench.gpu.machine import Device
from sslkern import losses

LOSSES = {name: s for name, s in SUBJECTS.items() if s.family.startswith("Losses") and not s.wraps}
SIZES = ((6, 5), (300, 130))  # rows, columns
# What the CUDA sources use of the runtime. Whatever is added here must be allowed while a stream is captured
RUNTIME = {
    "cudaDevAttrMaxSharedMemoryPerBlockOptin",
    "cudaDeviceGetAttribute",
    "cudaError_t",
    "cudaFuncAttributeMaxDynamicSharedMemorySize",
    "cudaFuncSetAttribute",
    "cudaGetErrorString",
    "cudaLaunchConfig_t",
    "cudaLaunchKernelEx",
    "cudaStream_t",
    "cudaSuccess",
}
FORBIDDEN = r"\bcu[A-Z]\w+|\bcub\b|\bthrust\b|<<<"  # the driver, libraries, the default stream
METHODS = {"item", "tolist", "cpu", "cuda", "numpy", "pin_memory", "nonzero", "unique", "synchronize", "is_nonzero"}
FROM_HOST = {"tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"}


def leaves_of(subject, rows, columns, seed, device):
    """Of the numbers of a seed, in float32."""
    leaves = [widened(leaf, columns) for leaf in subject.leaves]
    made = [leaf.make(rows, 100 * seed + k) for k, leaf in enumerate(leaves)]
    return [x.to(device, torch.float32 if x.is_floating_point() else x.dtype) for x in made]


def value_and_grads(subject, leaves):
    of_subject = zip(leaves, subject.leaves, strict=True)
    leaves = [x.detach().requires_grad_(leaf.differentiable) for x, leaf in of_subject]
    loss = subject.ours(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])]


def differing(subject, capture, rows, columns, device="cuda"):
    """Which parts of the result differ between a replay, on other inputs than those of the capture, and a call."""
    static, others = (leaves_of(subject, rows, columns, seed, device) for seed in range(2))
    expected = value_and_grads(subject, others)
    replay, result = capture(lambda: value_and_grads(subject, static))
    for x, other in zip(static, others, strict=True):
        x.copy_(other)
    replay()
    names = ["value", *(f"gradient {k}" for k in range(len(result) - 1))]
    return [name for name, x, right in zip(names, result, expected, strict=True) if not torch.equal(x, right)]


@pytest.mark.gpu
@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_replay_has_the_bits_of_a_call(name, rows, columns):
    """Forward and backward."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if LOSSES[name].public == "mmcr_loss":
        pytest.skip("its eigenvalues come from a solver that waits for the device")
    assert not differing(LOSSES[name], Device("cuda").captured, rows, columns)


def example():
    """The code of docs/gpu.md."""
    return re.search(r"```python\n(.*?make_graphed_callables.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.S)[1]


@pytest.mark.gpu
def test_the_example_on_a_gpu():
    """The graphed loss has the bits of the loss, and so have its gradients."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    names = {}
    exec(example(), names)
    views = names["views"]
    given = [x.grad.clone() for x in views]
    expected = losses.vicreg_loss(*views)
    assert torch.equal(names["loss"], expected)
    assert all(map(torch.equal, given, torch.autograd.grad(expected, views)))


def test_the_example(monkeypatch):
    """With a stand-in for a graph: a call."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda loss, views: loss)
    names = {}
    exec(example().replace('device="cuda", ', ""), names)
    assert names["views"][0].grad.shape == (256, 2048)


def test_every_loss_is_captured():
    assert {s.public for s in LOSSES.values()} == {name for name in losses.__all__ if name.endswith("_loss")}


@pytest.mark.parametrize("name", LOSSES)
def test_a_replay_of_other_bits_is_found(name):
    """With stand-ins for a graph: one that runs the call again, and one that keeps what it captured."""

    def again(run):
        result = run()
        return lambda: [old.copy_(new) for old, new in zip(result, run(), strict=True)], result

    def never(run):
        return lambda: None, run()

    assert differing(LOSSES[name], again, *SIZES[0], "cpu") == []
    found = differing(LOSSES[name], never, *SIZES[0], "cpu")
    assert len(found) == 1 + sum(leaf.differentiable for leaf in LOSSES[name].leaves)


def of_cuda(source):
    """What must not be in a CUDA source, outside of its comments."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.S)
    code = re.sub(r"^\s*#include.*$", "", code, flags=re.M)
    found = set(re.findall(FORBIDDEN, code))
    return found | set(re.findall(r"\bcuda[A-Z]\w*", code)) - RUNTIME


def of_launchers(source):
    """The calls in a module of Triton, outside of its kernels, that read from the device or copy from the host."""
    tree = ast.parse(source)
    kernels = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    inside = {id(node) for kernel in kernels for node in ast.walk(kernel)}
    for node in ast.walk(tree):
        if id(node) in inside or not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        moves = name == "to" and any(isinstance(x, ast.Constant) and isinstance(x.value, str) for x in node.args)
        moves |= name == "to" and any(keyword.arg == "device" for keyword in node.keywords)
        if name in METHODS or moves or (owner == "torch" and name in FROM_HOST):
            yield f"{node.lineno}: {ast.unparse(node)}"


def test_sources_can_be_captured():
    cuda = [path for kind in ("*.cu", "*.cuh", "*.h") for path in (ROOT / "csrc" / "cuda").glob(kind)]
    triton = list((ROOT / "triton_kernels").glob("*.py"))
    found = {path.name: of_cuda(path.read_text()) for path in cuda}
    found |= {path.name: list(of_launchers(path.read_text())) for path in triton}
    assert len(cuda) > 8 and len(triton) > 15
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "line",
    (
        "cudaMalloc(&p, n);",
        "cudaFree(p);",
        "cudaHostAlloc(&p, n, 0);",
        "cudaMemcpy(a, b, n, cudaMemcpyDeviceToHost);",
        "cudaDeviceSynchronize();",
        "cudaStreamSynchronize(stream);",
        "cuCtxSynchronize();",
        "thrust::sort(a, b);",
        "kernel<<<grid, block>>>(x);",
    ),
)
def test_it_sees_each_fault_of_a_cuda_source(line):
    assert of_cuda(f"#include <cuda_runtime.h>\nvoid f() {{\n  {line}  // as in\n}}\n")
    assert not of_cuda(f"cudaError_t f(cudaStream_t stream);  // {line}\n/* {line} */\n")


@pytest.mark.parametrize(
    "line",
    (
        "n = z.sum().item()",
        "n = z.tolist()",
        "z = z.cpu()",
        "c = torch.tensor([1.0], device=z.device)",
        "c = torch.as_tensor(c, device=z.device)",
        'z = z.to("cpu")',
        "z = z.to(device=other)",
        "torch.cuda.synchronize()",
    ),
)
def test_it_sees_each_fault_of_a_launcher(line):
    assert list(of_launchers(f"def launcher(z, c, other):\n    {line}\n    kernel[(1,)](z)\n"))
    assert not list(of_launchers(f"@triton.jit\ndef kernel(z, c, other):\n    {line}\n"))
    assert not list(of_launchers("def launcher(z):\n    return kernel[(1,)](z.to(torch.float32))\n"))
