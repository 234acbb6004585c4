"""The memory bank of `sslkern.train.compat.lightly`, and NT-Xent against it."""

import pytest
import torch
from compat_lightly import NTXent, views
from ranks import close
from torch import nn

from bench.run import allocated
from sslkern.train.compat.lightly import DirectCLRLoss, MemoryBankModule, NTXentLoss


def numbers(rows, columns=2, start=1):
    """Rows of which each has its own number."""
    return torch.arange(start, start + rows)[:, None].expand(rows, columns).float()


def firsts(bank):
    return bank.bank[:, 0].tolist()


def test_rows_are_overwritten_in_order():
    """A batch that reaches the end is cut off there, and the next one starts at the first row."""
    bank = MemoryBankModule((5, 2), feature_dim_first=False)
    initial = bank.bank.clone()
    torch.testing.assert_close(initial.norm(dim=1), torch.ones(5))
    out, rows = bank(numbers(3), update=True)
    assert torch.equal(out, numbers(3)) and torch.equal(rows, initial)
    assert firsts(bank)[:3] == [1, 2, 3] and torch.equal(bank.bank[3:], initial[3:]) and int(bank.bank_ptr) == 3
    _, rows = bank(numbers(4, start=11), update=True)
    assert rows[:3, 0].tolist() == [1, 2, 3] and firsts(bank) == [1, 2, 3, 11, 12] and int(bank.bank_ptr) == 0
    bank(numbers(7, start=21), update=True)
    assert firsts(bank) == [21, 22, 23, 24, 25] and int(bank.bank_ptr) == 0
    bank(numbers(2, start=31), update=True)
    bank(numbers(3, start=41), update=True)
    assert firsts(bank) == [31, 32, 41, 42, 43] and int(bank.bank_ptr) == 0
    bank(numbers(0), update=True)
    assert firsts(bank) == [31, 32, 41, 42, 43] and int(bank.bank_ptr) == 0
    bank(numbers(1, start=51))
    assert firsts(bank) == [31, 32, 41, 42, 43]


def test_what_it_returns_is_a_copy():
    bank = MemoryBankModule(size=[4, 3])
    batch = numbers(2, 3).requires_grad_()
    out, rows = bank(batch, labels=None, update=True)
    assert out is batch and rows.shape == (3, 4) and not rows.requires_grad and not bank.bank.requires_grad
    assert not torch.equal(rows.T[:2], batch)
    assert bank.state_dict() == {} and {name for name, _ in bank.named_buffers()} == {"bank", "bank_ptr"}
    assert MemoryBankModule(0)(batch, update=True) == (batch, None)
    assert MemoryBankModule((0, 3))(batch)[1] is None


def test_sizes():
    for bad in (-1, (10, -1), (5, 3, 2), (5,), ()):
        with pytest.raises(ValueError, match="Illegal memory bank size"):
            MemoryBankModule(bad)
    with pytest.warns(UserWarning, match="size 10 has no feature dimension"):
        bank = MemoryBankModule(size=10, feature_dim_first=False)
    assert bank.bank.shape == (10,)
    _, rows = bank(numbers(3, 4), update=True)
    assert rows.shape == bank.bank.shape == (10, 4) and firsts(bank)[:3] == [1, 2, 3]
    with pytest.warns(UserWarning):
        loss = NTXentLoss(memory_bank_size=16)
    assert loss(*views((3, 5))).isfinite() and loss.memory_bank.bank.shape == (16, 5)
    with pytest.raises(ValueError, match=r"negatives must have shape \(K, 4\)"):
        loss(*views((3, 4)))


def test_rows_enter_only_with_a_gradient():
    """Of `out0`: not for evaluation, nor for views without a gradient."""
    loss = NTXentLoss(memory_bank_size=(8, 3))
    before = loss.memory_bank.bank.clone()
    a, b = views((4, 3))
    with torch.no_grad():
        first = loss(a, b)
    assert loss(a.detach(), b) == first and torch.equal(loss.memory_bank.bank, before)
    assert loss(a, b.detach()) == first
    torch.testing.assert_close(loss.memory_bank.bank[:4], nn.functional.normalize(b.float()))


def test_a_backward_after_updates():
    """Gradients are those of the rows that the bank had, after steps that overwrote them all."""
    torch.manual_seed(0)
    loss = NTXentLoss(0.2, (6, 3)).double()
    plain = NTXent(0.2, (6, 3))
    plain.bank = loss.memory_bank.bank.clone()
    steps = [views((4, 3), step) for step in range(4)]
    total, expected = (sum(each(*leaves) for leaves in steps) for each in (loss, plain))
    leaves = [x for pair in steps for x in pair]
    total.backward(retain_graph=True)
    total.backward()
    for leaf, truth in zip(leaves, torch.autograd.grad(expected, leaves), strict=True):
        close(leaf.grad, 2 * truth, 1e-12, "gradient")
    with pytest.raises(RuntimeError, match="once, not twice"):
        grad = torch.autograd.grad(loss(*steps[0]), steps[0][0], create_graph=True)[0]
        grad.sum().backward()


def test_rows_are_used_as_they_are():
    """A bank of other lengths, as a user may fill it."""
    loss = NTXentLoss(1.0, (7, 3)).double()
    loss.memory_bank.bank.mul_(torch.arange(7)[:, None])
    plain = NTXent(1.0, (7, 3))
    plain.bank = loss.memory_bank.bank.clone()
    leaves = views((5, 3))
    value, expected = loss(*leaves), plain(*leaves)
    close(value, expected, 1e-12, "value")
    for found, truth in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        close(found, truth, 1e-12, "gradient")


class Opposite(MemoryBankModule):
    def forward(self, output, labels=None, update=False):
        output, rows = super().forward(output, labels, update)
        return output, None if rows is None else -rows


def test_a_bank_of_the_users():
    """Its `forward` is called, as lightly does."""
    leaves = views((5, 3))
    for size in ((7, 3), 0):
        loss, plain = NTXentLoss(memory_bank_size=(9, 3)), NTXent(memory_bank_size=size)
        loss.memory_bank = Opposite(size).double()
        plain.bank = -loss.memory_bank.bank.clone() if size else None
        for found, truth in ((loss(*leaves), plain(*leaves)),):
            close(found, truth, 1e-12, "value")
            pairs = (torch.autograd.grad(each, leaves) for each in (found, truth))
            for f, t in zip(*pairs, strict=True):
                close(f, t, 1e-12, "gradient")
        assert int(loss.memory_bank.bank_ptr) == (5 if size else 0)


def test_gradients_of_some():
    loss = NTXentLoss(memory_bank_size=(7, 3)).double()
    a, b = views((5, 3))
    before = loss.memory_bank.bank.clone()
    both = torch.autograd.grad(loss(a, b), [a, b])
    for k in (0, 1):
        loss.memory_bank.bank.copy_(before)
        one = [x if i == k else x.detach() for i, x in enumerate((a, b))]
        close(torch.autograd.grad(loss(*one), one[k])[0], both[k], 0, k)


def test_no_copy_of_the_bank_waits_for_the_backward():
    loss = NTXentLoss(memory_bank_size=(20000, 64))
    _, left, value = allocated(lambda: loss(*(x.detach().float().requires_grad_() for x in views((8, 64)))))
    assert value.requires_grad and left < 0.05 * loss.memory_bank.bank.nbytes


def test_half_precision_and_another_device():
    torch.manual_seed(0)
    loss = NTXentLoss(memory_bank_size=(7, 3))
    a, b = (x.detach().half().requires_grad_() for x in views((5, 3)))
    value = loss(a, b)
    value.backward()
    assert value.dtype == torch.float32 and a.grad.dtype == torch.float16
    torch.testing.assert_close(loss.memory_bank.bank[:5], nn.functional.normalize(b.detach().float()))
    moved = DirectCLRLoss(memory_bank_size=(7, 3)).to("meta")
    assert moved.memory_bank.bank.is_meta
    assert moved(*(torch.ones(2, 3, device="meta", requires_grad=True) for _ in range(2))).is_meta
