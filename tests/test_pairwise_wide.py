"""Gram matrices of wide rows in Triton: accuracy, every tile, some rows and slices at a time, bits, and bounds."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from conftest import INTERPRETED, available
from pairwise import brute

from sslkern import backend
from sslkern.ops import pairwise_reduce

SHAPES = {257: (2, 70, 257), 300: (3, 20, 300), 1100: (2, 9, 1100)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def triton():
    with backend.use(available("triton")):
        yield


def settings(monkeypatch, name: str, value: object) -> None:
    """Set a name in all modules of wide rows that use it."""
    from sslkern.triton_kernels import pairwise_gram_wide, pairwise_gram_wide_backward, pairwise_wide

    for module in (pairwise_wide, pairwise_gram_wide, pairwise_gram_wide_backward):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)


def rows_of(*shape: int) -> torch.Tensor:
    """Rows of length about 1, not centred, so that kernels of all groups are neither 0 nor 1."""
    return (torch.randn(shape) + 0.5) / shape[-1] ** 0.5


def results(function, x: torch.Tensor) -> list[torch.Tensor]:
    """The Gram, the row sums and the gradient of x under weights that depend on the shape alone."""
    x = x.detach().requires_grad_()
    outputs = function(x)
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(v.shape[x.dim() - 3 :], generator=rng, dtype=torch.float64).to(v) for v in outputs]
    value = sum((v * w).sum() for v, w in zip(outputs, weights, strict=True))
    return [*(v.detach() for v in outputs), *torch.autograd.grad(value, x)]


def gram(x: torch.Tensor, kernel: str = "rbf") -> list[torch.Tensor]:
    """On this device."""
    scale = torch.linspace(0.5, 1.0, x.shape[-3], device=DEVICE)
    return results(lambda x: pairwise_reduce(x, kernel=kernel, scale=scale, reduction="gram"), x.to(DEVICE))


def outside(x: torch.Tensor, kernel: str) -> list[str]:
    """Which results lie outside the rule."""
    scale = torch.linspace(0.5, 1.0, x.shape[-3])
    truth, plain = (
        results(lambda x: brute(x, None, kernel, "gram", scale.to(x), None, None, None), x.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    found = [cases.outside_rule(a.float(), t, p, t, 0) for a, t, p in zip(gram(x, kernel), truth, plain, strict=True)]
    return [f"{what}: {why}" for what, why in zip(("Gram", "sums", "gradient"), found, strict=True) if why is not None]


@pytest.mark.parametrize(
    ("kernel", "d"), [*((k, d) for k in ("rbf", "dot") for d in SHAPES), ("sqeuclidean", 300), ("cosine", 300)]
)
def test_accuracy(kernel, d):
    """Values and gradients, for two and three groups, at widths that end within a step and a block of columns."""
    assert not outside(rows_of(*SHAPES[d]), kernel)


@pytest.mark.parametrize("tiles", ("many rows", "without wgmma", "some rows at a time"))
def test_every_tile(tiles, monkeypatch):
    """Larger tiles, those of other processors than Hopper's, and a workspace of 128 of 140 rows."""
    if tiles == "without wgmma":
        settings(monkeypatch, "has_wgmma", lambda _: False)
    else:
        settings(monkeypatch, "MANY" if tiles == "many rows" else "NUMBERS", 1)
    assert not outside(rows_of(2, 140, 260), "rbf")


def test_one_kernel_for_all_widths(monkeypatch):
    """No constant that a kernel is compiled for tells the number of columns."""
    from sslkern.triton_kernels import pairwise_gram_wide, pairwise_gram_wide_backward, pairwise_wide

    constants: dict[int, list] = {}

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                constants[d].append((self.kernel.__name__, kwargs))
                self.kernel[grid](*args, **kwargs)

            return launch

    for module in (pairwise_wide, pairwise_gram_wide, pairwise_gram_wide_backward):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    for d in (257, 700):
        constants[d] = []
        gram(rows_of(2, 5, d))
    assert len(constants[257]) == 9 and constants[257] == constants[700]


@pytest.mark.parametrize("numbers", (None, 1))
def test_bits(numbers, monkeypatch):
    """The same again, and for a slice of a stack; with the slices at once, and one after the other."""
    if numbers is not None:
        settings(monkeypatch, "NUMBERS", numbers)
    x = rows_of(2, 2, 20, 270)
    first = gram(x)
    assert all(map(torch.equal, first, gram(x.clone())))
    assert all(torch.equal(a[1], b) for a, b in zip(first, gram(x[1].clone()), strict=True))


def test_nothing_undefined_is_read(monkeypatch):
    """NaN around the rows, and in all workspaces, never shows."""
    from sslkern.triton_kernels import launch

    room = torch.full((40_000,), torch.nan, device=DEVICE)
    x = room[1000 : 1000 + 2 * 70 * 259].view(2, 70, 259)
    x.copy_(rows_of(2, 70, 259))
    expected, empty = gram(x.clone()), launch.workspace
    monkeypatch.setattr(launch, "workspace", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    found = gram(x)
    assert all(v.isfinite().all() for v in found) and all(map(torch.equal, found, expected))


def test_every_address_is_in_its_tensor(monkeypatch):
    """No load or store next to a workspace, where its neighbour's numbers would hide it."""
    if not INTERPRETED:
        pytest.skip("compute-sanitizer checks it on a GPU")
    from triton.runtime.interpreter import InterpreterBuilder

    from sslkern.triton_kernels import launch

    empty, room, rooms, strays = launch.workspace, 1 << 14, [], set()

    def workspace(z, *shape, dtype=torch.float32):
        out = empty(z, math.prod(shape) + 2 * room, dtype=dtype)
        rooms.extend((part, part.data_ptr(), part.data_ptr() + part.nbytes) for part in (out[:room], out[-room:]))
        return out[room:-room].view(shape)

    def watched(access, k):
        def call(self, ptrs, *more):
            address = ptrs.data[more[k].data]
            strays.update(start for _, start, end in rooms if ((address >= start) & (address < end)).any())
            return access(self, ptrs, *more)

        return call

    monkeypatch.setattr(launch, "workspace", workspace)
    for k, name in enumerate(("create_masked_load", "create_masked_store")):
        monkeypatch.setattr(InterpreterBuilder, name, watched(getattr(InterpreterBuilder, name), k))
    gram(rows_of(2, 64, 257))
    assert rooms and not strays


def test_tensor_cores_that_truncate(monkeypatch):
    """A product of many columns must not be one accumulation: a tensor core truncates every sum that it adds to."""
    if not INTERPRETED:
        pytest.skip("the interpreter's products are replaced")
    import numpy as np
    from triton.runtime import interpreter

    from sslkern.triton_kernels import pairwise_wide

    def truncated(self, a, b, d, *_):
        acc = d.data
        for k in range(0, a.data.shape[1], 16):
            exact = acc.astype(np.float64) + a.data[:, k : k + 16].astype(np.float64) @ b.data[k : k + 16]
            acc = exact.astype(np.float32)
            acc = np.where(np.abs(acc) > np.abs(exact), np.nextafter(acc, np.float32(0)), acc)
        return interpreter.TensorHandle(acc, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", truncated)
    x = rows_of(2, 20, 1024)
    assert not outside(x, "dot")
    tile = pairwise_wide.tile_of(20, True)
    settings(monkeypatch, "tile_of", lambda *_: tile | {"BK": 1024})
    assert outside(x, "dot")[0].startswith("Gram")


def test_bounds():
    """A workspace grows with the rows, not with their square, and no launch has more programs than a grid."""
    from sslkern.triton_kernels import pairwise_gram_wide, pairwise_wide

    numbers = pairwise_wide.NUMBERS
    for groups in (1, 2, 3, 10, 300, 5_000, 16_383):
        for n in (1, 64, 70, 500, 2_047, 2_048, 5_000, 100_000, 1_000_000):
            slices, rows = pairwise_wide.shares(groups, n)
            side = pairwise_wide.side(n)
            padded = -(-n // side) * side
            assert 0 < rows <= padded and (rows % 128 == 0 or rows == padded), (groups, n)
            assert slices * groups * rows * padded <= max(numbers, 128 * groups * padded), (groups, n)
            assert slices * groups**2 * rows // pairwise_gram_wide.ROWS < 2**31, (groups, n)
