"""What is private in torch has one place in the package."""

import ast
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn

from sslkern.core import internals

# Private to torch's objects: reached through any name, while what a subclass overrides is reached through self
STATE = ("_version", "_buffers", "_parameters", "_modules", "_backward_hooks", "_forward_hooks", "_get_fsdp_state")


def private(source):
    """(line, text) of each use in a module of a part of torch whose name begins with an underscore."""
    tree = ast.parse(source)
    of_torch = {"torch"}
    for node in ast.walk(tree):
        module = getattr(node, "module", None) or "" if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            path = f"{module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            if path.split(".")[0] == "torch" and not getattr(node, "level", 0):
                of_torch.add(alias.asname or alias.name.split(".")[0])
                if any(part.startswith("_") for part in path.split(".")):
                    yield node.lineno, path
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        root = node.value
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and (root.id in of_torch or (node.attr in STATE and root.id != "self")):
            yield node.lineno, ast.unparse(node)


def test_what_is_private_in_torch_is_in_one_file():
    """Only sslkern/core/internals.py reaches for what torch does not promise; a test of the search itself beside it."""
    seen = "import torch.distributed as dist\nfrom torch.utils import _pytree\nx._version; torch._C.f; dist.a._b; y._b"
    assert {text for _, text in private(seen)} == {"torch.utils._pytree", "x._version", "torch._C", "dist.a._b"}
    files = [*(ROOT / "sslkern").rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        if path != ROOT / "sslkern" / "core" / "internals.py"
        for line, text in private(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("form", ("one", "none", "several"))
def test_groups_of_sharded_parameters(form):
    """torch 2.11 keeps at most one group in a module's state, later ones a list: the same list from both."""
    state = SimpleNamespace(_is_root=False)
    if form == "several":
        state._fsdp_param_groups = ["a", "b"]
    else:
        state._fsdp_param_group = {"one": "a", "none": None}[form]
    sharded = internals.Sharded(SimpleNamespace(_get_fsdp_state=lambda: state))
    assert list(sharded.groups) == {"one": ["a"], "none": [], "several": ["a", "b"]}[form]
    assert sharded.inside_another


def test_private_parts_are_what_they_are_said_to_be():
    """Those that are functions of our own, on the smallest example."""
    x, layer = torch.zeros(2, requires_grad=True), nn.BatchNorm1d(2)
    with torch.no_grad():
        x.add_(1)
    assert internals.version(x) == 1 and internals.running_backward() == -1
    assert set(internals.buffers(layer)) == {"running_mean", "running_var", "num_batches_tracked"}
    assert set(internals.parameters(layer)) == {"weight", "bias"} and not internals.backward_hooks(x)
    x.register_hook(lambda grad: None)
    assert len(internals.backward_hooks(x)) == 1
    assert not internals.forward_mode() and not internals.transforms_active()
    with torch.autograd.forward_ad.dual_level():
        assert internals.forward_mode()
    seen = []
    torch.func.vmap(lambda row: seen.append(internals.transforms_active()) or row)(x)
    assert seen == [True]
    assert internals.has_kernel("aten::mm", "CPU") and not internals.has_kernel("aten::mm", "FPGA")


def test_batches_of_gradients_are_seen():
    seen, x = [], torch.zeros(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(internals.batched(grad)))
    y = x * 1
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_whether_a_backward_keeps_its_graph():
    seen = []
    x = torch.zeros(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(internals.graph_is_kept()))
    loss = x.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.autograd.grad(x.sum(), x, create_graph=True)
    assert seen == [True, False, True]
