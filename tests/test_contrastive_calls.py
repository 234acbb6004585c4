"""Contrastive losses in one call: gradients that are computed in the forward, and banks in any layout."""

import pytest
import torch
from contrastive import TIGHT, bank_matrix, info_nce_matrix, nt_xent_matrix
from torch.nn import functional as F

import sslkern
from sslkern import backend, losses

on_cpu = pytest.mark.usefixtures("cpu_backend")


def grads_of(function, *leaves):
    """The value of a function and its gradients by fresh copies of the leaves, in the layout of each leaf."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_same(ours, wanted, **tolerances):
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, **tolerances)


@on_cpu
@pytest.mark.parametrize("normalize", (True, False))
def test_a_bank_may_change_before_the_backward(normalize):
    """As the queue of MoCo and the memory bank of lightly do, which take in the batch in place."""
    torch.manual_seed(0)
    a, b, queue = torch.randn(6, 5), torch.randn(6, 5), torch.randn(5, 20)
    wanted = grads_of(lambda x, y: losses.nt_xent_loss(x, y, negatives=queue.T, normalize=normalize), a, b)
    kept, (x, y) = queue.clone(), (z.clone().requires_grad_() for z in (a, b))
    loss = losses.nt_xent_loss(x, y, negatives=kept.T, normalize=normalize)
    kept[:, :6] = b.T
    loss.backward(retain_graph=True)
    assert_same([loss.detach(), x.grad, y.grad], wanted, rtol=0, atol=0)
    loss.backward()
    assert_same([x.grad, y.grad], [2 * grad for grad in wanted[1:]], rtol=0, atol=0)


@on_cpu
def test_nothing_of_a_bank_is_kept():
    a, queue = torch.randn(6, 5, requires_grad=True), torch.randn(5, 4000)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        losses.nt_xent_loss(a, a.detach() + 1, negatives=queue.T)
    assert sum(saved) < 200


@on_cpu
def test_a_bank_with_a_gradient_gets_it():
    a, b, bank = torch.randn(6, 5), torch.randn(6, 5), torch.randn(9, 5)
    leaves = [z.double() for z in (a, b, bank)]
    ours = grads_of(lambda x, y, z: losses.nt_xent_loss(x, y, negatives=z), *leaves)
    assert_same(ours, grads_of(lambda x, y, z: bank_matrix(x, y, z, 0.5), *leaves), **TIGHT)


@on_cpu
@pytest.mark.parametrize("keys", (1, 7, 128, 129, 1500), ids=lambda k: f"{k} keys")
@pytest.mark.parametrize("rows", (1, 3, 17, 300), ids=lambda n: f"{n} rows")
def test_banks_of_any_size_and_layout(rows, keys):
    """Several blocks of queries and of keys, and parts of the bank; by rows, by columns, and by strides of both."""
    torch.manual_seed(rows + keys)
    a, b = torch.randn(2, rows, 21, dtype=torch.float64)
    by_rows = 3 * torch.randn(keys, 21, dtype=torch.float64)
    strided = torch.zeros(2 * keys, 63, dtype=torch.float64)[::2, 1::3]
    strided.copy_(by_rows)
    for normalize in (True, False):
        for bank in (by_rows, by_rows.T.contiguous().T, strided, by_rows[:1].expand(keys, 21)):
            settings = {"negatives": bank, "normalize": normalize}
            wanted = grads_of(
                lambda x, y, t, z=bank, n=normalize: bank_matrix(x, y, z, t, normalize=n),
                a,
                b,
                torch.tensor(0.7).double(),
            )
            ours = grads_of(
                lambda x, y, t, s=settings: losses.nt_xent_loss(x, y, t, **s), a, b, torch.tensor(0.7).double()
            )
            assert_same(ours, wanted, **TIGHT)


@on_cpu
def test_growing_similarities_do_not_overflow():
    """The keys come in order of their similarity, up to 400: the base of the exponentials rises from block to block."""
    a = torch.randn(5, 8)
    bank = torch.linspace(-20, 20, 1200)[:, None] * F.normalize(a[:1], dim=1)
    wanted = grads_of(lambda x: bank_matrix(x, a.double(), bank.double(), 0.1, normalize=False), a.double())
    for keys in (bank, bank.flip(0)):
        ours = grads_of(lambda x, k=keys: losses.nt_xent_loss(x, a, 0.1, negatives=k, normalize=False), a)
        assert_same([z.double() for z in ours], wanted, rtol=2e-5, atol=2e-5)


LOSSES = {
    "views": (lambda a, b: losses.nt_xent_loss(a, b, 0.2), lambda a, b: nt_xent_matrix(a, b, temperature=0.2)),
    "cold views": (lambda a, b: losses.nt_xent_loss(a, b, 0.02), lambda a, b: nt_xent_matrix(a, b, temperature=0.02)),
    "keys": (lambda a, b: losses.info_nce_loss(a, b, 0.2), lambda a, b: info_nce_matrix(a, b, 5.0)),
    "cold keys": (lambda a, b: losses.info_nce_loss(a, b, 0.02), lambda a, b: info_nce_matrix(a, b, 50.0)),
    "both sides": (
        lambda a, b: losses.info_nce_loss(a, b, 0.2, symmetric=True),
        lambda a, b: info_nce_matrix(a, b, 5.0, symmetric=True),
    ),
}


@on_cpu
@pytest.mark.parametrize("size", ((2, 3), (70, 2), (150, 90), (520, 4)), ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_kept_exponentials_and_repeated_ones(name, size):
    """Exponentials are kept for the gradients where the rows are wide enough, and computed again where they are not."""
    ours, matrix = LOSSES[name]
    a, b = torch.randn(2, *size, dtype=torch.float64)
    assert_same(grads_of(ours, a, b), grads_of(matrix, a, b), **TIGHT)
    one = grads_of(lambda x: ours(a, x), b)
    assert_same(one, grads_of(lambda x: matrix(a, x), b), **TIGHT)


def test_bits_do_not_depend_on_threads_and_stacks(native):
    """Of every form: one thread and two, and a slice of a stack and the slice alone."""
    x, y = torch.randn(2, 3, 130, 20)
    bank, scale = torch.randn(3, 2000, 20), torch.full((3,), 8.0)
    kernel, before = torch.ops.sslkern_native.contrastive_fwd.default, torch.get_num_threads()
    for views, both_sides, memory in (
        (True, False, None),
        (False, True, None),
        (False, False, None),
        (False, False, bank),
    ):
        rest = views, both_sides, False, 1e-12, 1e-12, 1e-12, True, True, True
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(kernel(x, y, memory, scale, *rest))
            alone = kernel(x[1], y[1], None if memory is None else memory[1], scale[1], *rest)
            results.append([part[None].expand_as(whole) for part, whole in zip(alone, results[-1], strict=True)])
        torch.set_num_threads(before)
        for parts in zip(*results, strict=True):
            assert all(torch.equal(part[1], parts[0][1]) for part in parts)


@on_cpu
def test_a_second_derivative_raises():
    a, b = torch.randn(2, 6, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(losses.info_nce_loss(a, b), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        grad.sum().backward()


def test_one_call_runs_one_kernel(native):
    """And the bank is read where it lies: no copy of it is made."""
    queue = torch.randn(16, 60000)
    a, b = torch.randn(2, 8, 16)
    with backend.use("native"), torch.profiler.profile(profile_memory=True) as profile:
        sslkern.nt_xent_loss(a.requires_grad_(), b, negatives=queue.T).backward()
    events = [event for event in profile.events() if event.name.startswith("sslkern_")]
    assert [event.name for event in events] == ["sslkern_native::contrastive_fwd"]
    taken = [
        event.cpu_memory_usage if hasattr(event, "cpu_memory_usage") else event.self_cpu_memory_usage
        for event in profile.events()
    ]
    assert max(taken) < queue.numel() * 4 / 8
