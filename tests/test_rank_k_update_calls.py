"""Rank-k updates as a call: in place wherever U lies, compiled, without memory, with NaN, and what it refuses."""

import pytest
import rank_k
import torch
from rank_k import RETRACTIONS, dense, orthonormal, step_of
from torch.profiler import ProfilerActivity, profile

from sslkern.ops import rank_k_update_

backend = rank_k.backend
simulator = rank_k.simulator


def test_in_place_wherever_u_lies(backend):
    """Transposed, strided, expanded steps and a slice of a stack: the same tensor, the rest of its memory untouched."""
    a, b = step_of(0.2, 20, 20, k=3, dtype=torch.float64)
    u = orthonormal(20, 20)
    expected = rank_k_update_(u.clone(), a, b)
    for view in (u.t().contiguous().t(), torch.zeros(40, 60, dtype=u.dtype)[::2, ::3].copy_(u)):
        assert rank_k_update_(view, a, b) is view
        assert torch.equal(view, expected)
    stack = torch.stack([u, u, u])
    rank_k_update_(stack[1], a, b)
    assert torch.equal(stack[1], expected) and torch.equal(stack[0], u) and torch.equal(stack[2], u)
    column = a[:, :1].expand(20, 3)
    torch.testing.assert_close(rank_k_update_(u.clone(), column, b), dense(u, column, b, "tangent"))


def test_conjugate_views(backend):
    """A U whose conjugate has not been taken yet is updated in place, too."""
    u = orthonormal(9, 9, dtype=torch.complex128)
    a, b = step_of(0.1, 9, 9, k=2, dtype=torch.complex128)
    stored = u.conj().resolve_conj()
    view = stored.conj()
    assert view.is_conj() and rank_k_update_(view, a, b) is view
    torch.testing.assert_close(stored.conj().resolve_conj(), rank_k_update_(u, a, b), rtol=0, atol=1e-14)


def test_compiled_without_a_graph_break(backend):
    """fullgraph=True: in place and with the numbers of eager, wherever u lies and conjugated or not."""
    if backend == "simulator":
        pytest.skip("a compiler's fake tensors have no numbers to simulate with")
    for dtype in (torch.float64, torch.complex128):
        u = orthonormal(9, 9, dtype=dtype)
        a, b = step_of(0.1, 9, 9, k=2, dtype=dtype)
        for view in (torch.Tensor.clone, lambda z: z.t().clone().t(), lambda z: z.clone().conj().resolve_conj().conj()):
            torch._dynamo.reset()
            compiled = torch.compile(rank_k_update_, fullgraph=True, backend="aot_eager")
            found = view(u)
            compiled(found, a, b)
            torch.testing.assert_close(found.resolve_conj(), rank_k_update_(u.clone(), a, b), rtol=0, atol=1e-14)


def test_no_dense_temporary(native):
    """k = 8 at N = 1000 asks torch for no memory: U is read and written where it lies."""
    u = orthonormal(1000, 1000, dtype=torch.float32)
    a, b = step_of(0.1, 1000, 1000, k=8, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        rank_k_update_(u, a, b)
    assert sum(max(0, e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]") < 1e5


def test_nan_comes_out(backend):
    """And nothing hangs; a step that is zero or has no columns leaves U bit for bit, or as it was."""
    for bad in (float("nan"), float("inf")):
        for retraction in RETRACTIONS:
            u = orthonormal(12, 12)
            a, b = step_of(0.1, 12, 12, k=2, dtype=u.dtype)
            a[3, 1] = bad
            assert rank_k_update_(u, a, b, retraction).isnan().any()
    u = orthonormal(12, 12)
    assert torch.equal(rank_k_update_(u.clone(), u[:, :0], u[:, :0]), u)
    assert torch.equal(rank_k_update_(u.clone(), 0 * u[:, :2], u[:, :2]), u)
    assert rank_k_update_(torch.zeros(0, 4, 4), torch.zeros(0, 4, 1), torch.zeros(0, 4, 1)).shape == (0, 4, 4)


def test_bad_arguments():
    """One sentence each, before U has changed."""
    u, a = torch.eye(4), torch.zeros(4, 2)
    cases = [
        ((u, a, a, "qr"), ValueError, r"retraction must be one of 'tangent', 'direct', 'cayley', got 'qr'"),
        (([1], a, a), TypeError, r"u must be a torch.Tensor, got list"),
        ((u[0], a, a), ValueError, r"u must have at least two dimensions, got shape \(4,\)"),
        ((u.bfloat16(), a, a), TypeError, r"u must be float32, float64, complex64 or complex128, got bfloat16"),
        ((u[:3], a, a), ValueError, r"u must have at least as many rows as columns, got shape \(3, 4\)"),
        ((u[:, :3], a, a), ValueError, r"u must be square for 'tangent', got shape \(4, 3\)"),
        ((u, a[:3], a), ValueError, r"a must have shape \(4, k\) for u of \(4, 4\), got \(3, 2\)"),
        ((u, a, a[:, :1]), ValueError, r"b must have shape \(4, k\) for u of \(4, 4\), got \(4, 1\)"),
        ((u[None], a, a), ValueError, r"a must have shape \(1, 4, k\) for u of \(1, 4, 4\), got \(4, 2\)"),
        ((u, a.double(), a), TypeError, r"a must have the dtype of u, float32, got float64"),
        ((u, a, a.to("meta")), ValueError, r"b and u must be on the same device, got meta and cpu"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            rank_k_update_(*arguments)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated: call it under torch.no_grad\(\)"):
        rank_k_update_(u, a.requires_grad_(), a)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated: call it under torch.no_grad\(\)"):
        torch.vmap(rank_k_update_)(u[None], a[None], a[None])  # of which a vmapped tensor does not tell
    assert torch.equal(u, torch.eye(4))


def test_a_graph_notices():
    """A backward through a U that has moved since raises, as with torch's own in-place operations."""
    u = torch.eye(4, requires_grad=True)
    loss = (u @ u).sum()
    with torch.no_grad():
        rank_k_update_(u, torch.ones(4, 1), torch.ones(4, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
