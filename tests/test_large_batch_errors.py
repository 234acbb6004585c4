"""Large batches by chunks: what is refused, in one sentence."""

import pytest
import torch
from large_batches import Net, images
from torch import nn

from sslkern.train.large_batch import LargeBatch, large_batch


def bad(kind):
    x, net = images(4, 2, 6, 6), Net()
    return {
        "module": lambda: large_batch(len, x, chunk_size=2),
        "no view": lambda: large_batch(net, chunk_size=2),
        "zero": lambda: large_batch(net, x, chunk_size=0),
        "float": lambda: large_batch(net, x, chunk_size=2.0),
        "bool": lambda: LargeBatch(net, True),
        "lengths": lambda: large_batch(net, x, (x, x[:3]), chunk_size=2),
        "scalar": lambda: large_batch(net, (x, x.sum()), chunk_size=2),
        "no tensor": lambda: large_batch(net, ("x", [x]), chunk_size=2),
        "output": lambda: large_batch(Lambda(lambda x: (x, None)), x, chunk_size=2),
        "nothing": lambda: large_batch(Lambda(lambda x: ()), x, chunk_size=2),
        "loss": lambda: large_batch(Lambda(lambda x: (x, x.sum())), x, chunk_size=2),
        "lengths out": lambda: large_batch(Lambda(lambda x: x.flatten()[None].expand(len(x), -1)), x[:3], chunk_size=2),
    }[kind]


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_transforms_are_refused():
    """In one sentence that names no internals; and the module's errors name its own arguments."""
    net, x = nn.Linear(5, 4), torch.randn(6, 5)
    calls = [lambda x: large_batch(net, x, chunk_size=3).sum(), lambda x: LargeBatch(net, 3)(x).sum()]
    for call in calls:
        for transformed in (
            torch.func.grad(call),
            torch.func.vmap(lambda x, f=call: f(x[None])),
            torch.func.jacfwd(call),
        ):
            with pytest.raises(RuntimeError, match=r"^large_batch runs its backbone twice, [^\n]*\.$"):
                transformed(x)
    with pytest.raises(TypeError, match=r"^args must be a tensor \(N, \.\.\.\) or a tuple"):
        LargeBatch(net, 3)(1)


@pytest.mark.parametrize(
    "kind, error, sentence",
    [
        ("module", TypeError, r"backbone must be a torch\.nn\.Module, got builtin"),
        ("no view", ValueError, r"views must be at least one tensor"),
        ("zero", ValueError, r"chunk_size must be at least 1, got 0\."),
        ("float", TypeError, r"chunk_size must be an int, got float\."),
        ("bool", TypeError, r"chunk_size must be an int, got bool\."),
        ("lengths", ValueError, r"views\[1\] must have tensors with the same number of rows .* \(3, 2, 6, 6\)\]\."),
        ("scalar", ValueError, r"views\[0\] must have tensors with the same number of rows .* \(\)\]\."),
        ("no tensor", TypeError, r"views\[0\] must be a tensor \(N, \.\.\.\) or a tuple"),
        ("output", TypeError, r"backbone must return a tensor or a pytree of tensors, got NoneType in it\."),
        ("nothing", TypeError, r"backbone must return a tensor or a pytree of tensors, got none\."),
        (
            "loss",
            ValueError,
            r"backbone must return tensors with one row per sample .* got shape \(\) for a chunk of 2\.",
        ),
        ("lengths out", ValueError, r"backbone must return the same structure, shapes and dtypes for every chunk"),
    ],
)
def test_errors(kind, error, sentence):
    with pytest.raises(error, match=f"^{sentence}"):
        bad(kind)()
