"""Extreme singular values by Lanczos: right to their residuals, and honest where they have not converged."""

import re
import sys

import numpy as np
import pytest
import torch
from local_maps import build, normal
from sentences import complain
from torch import nn

from sslkern.analysis import ExtremeSingularValues, condition_number, extreme_singular_values, local_affine

F64, F32 = torch.float64, torch.float32


def of_values(n, p, s, seed=0):
    """A matrix (n, p) with these min(n, p) singular values."""
    u, v = (torch.linalg.qr(normal(rows, len(s), seed=seed + rows)).Q for rows in (n, p + 1))
    return (u * torch.as_tensor(s, dtype=F64)) @ torch.linalg.qr(v[:p]).Q.mT


MATRICES = {
    "1 x 1": normal(1, 1),
    "1 x 7": normal(1, 7),
    "7 x 1": normal(7, 1),
    "zero": torch.zeros(4, 3, dtype=F64),
    "zero column": normal(9, 5) * torch.tensor([1, 1, 0, 1, 1], dtype=F64),
    "identity": torch.eye(6, dtype=F64),
    "normal": normal(64, 64),
    "tall": normal(150, 30),
    "wide": normal(30, 150),
    "rank 3": normal(50, 3) @ normal(3, 40),
    "residual": torch.eye(200, dtype=F64) + 0.3 / 200**0.5 * normal(200, 200),
    "five of each end": of_values(60, 50, [3.0] * 5 + [2.0] * 40 + [0.1] * 5),
    "two values": of_values(40, 40, [2.0] * 3 + [1.0] * 37),
    "one small value": of_values(100, 100, [*np.linspace(2, 1, 99), 1e-6]),
    "cluster": of_values(80, 80, [1 + 1e-9 * k for k in range(80)][::-1]),
    "condition 1e10": of_values(40, 40, np.logspace(0, -10, 40)),
    "huge": 1e150 * normal(20, 20),
    "tiny": 1e-150 * normal(20, 20),
    "repeated columns": normal(30, 6).repeat(1, 2),
}


@pytest.mark.parametrize("dtype", (F64, F32), ids=("float64", "float32"))
@pytest.mark.parametrize("k", (1, 3))
@pytest.mark.parametrize("name", MATRICES)
def test_they_are_right_to_their_residuals(name, k, dtype):
    """Against the SVD of the same matrix in float64: values, order, and multiplicities up to k."""
    a = MATRICES[name].to(dtype)
    if k > min(a.shape) or (name in ("huge", "tiny") and dtype == F32):
        k = 1
        a = a if dtype == F64 or name not in ("huge", "tiny") else a.new_ones(2, 2)
    true = torch.linalg.svdvals(a.double())
    found = extreme_singular_values(a, k)
    assert found.converged and found.method == "lanczos" and found.shape == tuple(a.shape)
    assert found.largest.dtype == dtype and found.largest.shape == found.smallest.shape == (k,)
    off = [(found.largest.double() - true[:k]).abs(), (found.smallest.double() - true[-k:].flip(0)).abs()]
    assert (off[0] <= found.largest_residuals).all() and (off[1] <= found.smallest_residuals).all()
    rounding = 4 * torch.finfo(dtype).eps * max(a.shape) ** 0.5 * true[0]
    for values, residuals in ((found.largest, found.largest_residuals), (found.smallest, found.smallest_residuals)):
        assert (residuals <= torch.maximum(1e-6 * values.double(), 2.01 * rounding)).all()
    dense = extreme_singular_values(a, k, method="dense")
    torch.testing.assert_close(dense.largest.double(), true[:k], rtol=0, atol=rounding.item())
    torch.testing.assert_close(dense.smallest.double(), true[-k:].flip(0), rtol=0, atol=rounding.item())
    assert dense.converged and dense.n_products == min(a.shape)


def test_a_block_finds_what_one_vector_does_not():
    """Values that occur k times are found k times by k vectors; a Krylov space of one vector holds each once."""
    a = of_values(40, 30, [3.0, 3.0, 3.0] + [2.0] * 24 + [1.0, 1.0, 1.0])
    for k, largest in ((1, [3]), (2, [3, 3]), (3, [3, 3, 3]), (4, [3, 3, 3, 2])):
        found = extreme_singular_values(a, k)
        np.testing.assert_allclose(found.largest, largest, rtol=1e-12)
        np.testing.assert_allclose(found.smallest, [4 - s for s in largest], rtol=1e-12)


def test_what_does_not_converge_says_so():
    """A normal matrix of condition 1e3: honest bounds from inside, no number, and a sentence that offers the SVD."""
    a = normal(250, 250, seed=2)
    true = torch.linalg.svdvals(a)
    found = extreme_singular_values(a, max_products=200)
    assert found.largest_converged and not found.smallest_converged and not found.converged
    assert found.n_products <= 200
    assert true[-1] < found.smallest[0] <= true[-1] + found.smallest_residuals[0]
    assert found.condition < true[0] / true[-1]
    assert re.search(r"smallest 1 +<= ", found.table()) and "not converged" in found.table()
    assert re.search(rf"condition +>= {found.condition:.4g}", found.table())
    with pytest.raises(RuntimeError) as caught:
        condition_number(a, max_products=200)
    said = str(caught.value)
    assert f"at least {found.condition:.4g}" in said and 'method="dense"' in said and "\n" not in said
    expected = float(true[0] / true[-1])
    assert condition_number(a, method="dense") == pytest.approx(expected, rel=1e-10)
    assert condition_number(a) == pytest.approx(expected, rel=1e-8)  # 2 n = 500 products are all there are


def test_condition_numbers():
    """As numpy.linalg.cond, and infinity for a zero singular value."""
    for name in ("normal", "tall", "wide", "one small value", "1 x 7", "huge", "tiny"):
        for method in ("lanczos", "dense"):
            found = condition_number(MATRICES[name], method=method)
            assert found == pytest.approx(np.linalg.cond(MATRICES[name].numpy()), rel=1e-6), (name, method)
    for a in (MATRICES["zero"], torch.diag(torch.tensor([1.0, 0.0])), [[0.0]]):
        assert condition_number(a) == condition_number(a, method="dense") == float("inf")
    assert condition_number([[2, 0], [0, 1]]) == pytest.approx(2)


def test_products_are_few_and_counted():
    """For a condition near 2, the number of products grows far less than the size; each is counted."""
    linalg = pytest.importorskip("scipy.sparse.linalg")
    counts = []
    for n in (200, 800):
        a, seen = (torch.eye(n, dtype=F64) + 0.3 / n**0.5 * normal(n, n)).numpy(), []
        counting = linalg.LinearOperator(
            a.shape,
            matvec=lambda v, a=a, seen=seen: seen.append(1) or a @ v,
            rmatvec=lambda v, a=a, seen=seen: seen.append(1) or a.T @ v,
            dtype=a.dtype,
        )
        found = extreme_singular_values(counting)
        assert found.converged and found.n_products == len(seen)
        counts.append(found.n_products)
    assert counts[1] < 2 * counts[0] and counts[1] < 300


def test_everything_that_acts_as_a_matrix():
    """Arrays, lists, layers, strided tensors, SciPy's operators and sparse matrices, local maps: the same values."""
    sparse = pytest.importorskip("scipy.sparse")
    a = normal(12, 8)
    true = torch.linalg.svdvals(a)
    layer = nn.Linear(8, 12).double()
    layer.weight.data.copy_(a)
    one = local_affine(nn.Sequential(layer, nn.Identity()), normal(1, 8))[0]
    strided = torch.stack([a, a], -1)[..., 0].requires_grad_()
    csr = sparse.csr_matrix(a.numpy())
    others = (a.numpy(), a.numpy()[::1, ::-1], a.tolist(), layer, strided, csr, sparse.csr_array(a.numpy()), one)
    for other in (*others, sparse.linalg.aslinearoperator(csr), one.as_linear_operator(), one.as_operator().T):
        for method in ("lanczos", "dense"):
            found = extreme_singular_values(other, 2, method=method)
            np.testing.assert_allclose(found.largest, true[:2], rtol=1e-10)
            np.testing.assert_allclose(found.smallest, true[-2:].flip(0), rtol=1e-10)
            assert found.largest.dtype == F64 and not found.largest.requires_grad
    assert extreme_singular_values(a.numpy().astype(np.float32)).largest.dtype == F32
    assert extreme_singular_values(np.eye(3, dtype=bool)).largest.dtype == F64


def test_a_network_of_convolutions():
    net, shape = build("conv")
    maps = local_affine(net, normal(3, *shape))
    for i in range(3):
        found = extreme_singular_values(maps[i], 2)
        true = torch.linalg.svdvals(maps.matrix()[i])
        np.testing.assert_allclose(found.largest, true[:2], rtol=1e-9)
        np.testing.assert_allclose(found.smallest, true[-2:].flip(0), rtol=1e-9)


def test_the_same_seed_gives_the_same_bits():
    a = MATRICES["residual"]
    first, second = (extreme_singular_values(a, random_state=3) for _ in range(2))
    assert torch.equal(first.smallest, second.smallest) and torch.equal(first.largest, second.largest)
    state = torch.get_rng_state()
    other = extreme_singular_values(a, random_state=np.random.default_rng(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(other.smallest, first.smallest, rtol=1e-10, atol=0)


def test_autocast_does_not_reach_it():
    a = MATRICES["normal"].float()
    for method in ("lanczos", "dense"):
        true = extreme_singular_values(a, method=method)
        with torch.autocast("cpu", torch.bfloat16):
            found = extreme_singular_values(a, method=method)
        assert torch.equal(found.largest, true.largest) and torch.equal(found.smallest, true.smallest)


def test_a_looser_tolerance_takes_fewer_products():
    counts = [extreme_singular_values(MATRICES["residual"], tol=tol).n_products for tol in (1e-9, 1e-6, 1e-3)]
    assert counts[0] > counts[1] > counts[2]


def test_table():
    found = extreme_singular_values([[3.0, 0.0], [0.0, 1.0]], 2)
    assert isinstance(found, ExtremeSingularValues)
    lines = found.table().splitlines()
    assert lines[1].split()[:3] == ["largest", "1", "3"] and lines[4].split()[:3] == ["smallest", "2", "3"]
    assert lines[5].split() == ["condition", "3"]


A = normal(3, 4)
MAPS = local_affine(nn.Linear(2, 2), torch.ones(2, 2))
NAN = torch.full((3, 3), float("nan"))
BAD = {
    "module": (TypeError, "take local_affine(net, x)[0]", lambda: extreme_singular_values(nn.Conv2d(1, 1, 3))),
    "stack of maps": (ValueError, "take maps[i]", lambda: condition_number(MAPS)),
    "text": (TypeError, "a must be a matrix (tensor or array)", lambda: extreme_singular_values("matrix")),
    "ragged": (TypeError, "got a ragged list", lambda: extreme_singular_values([[1.0, 2.0], [1.0]])),
    "complex": (TypeError, "a must be float32 or float64, got complex128", lambda: condition_number(A + 1j * A)),
    "integers": (TypeError, "a must be float32 or float64, got int64", lambda: condition_number(A.long())),
    "half": (TypeError, "a must be float32 or float64, got float16", lambda: condition_number(A.half())),
    "sparse": (TypeError, "a must be a dense (strided) tensor", lambda: condition_number(A.to_sparse())),
    "vector": (ValueError, "a must have shape (n, p)", lambda: condition_number(A[0])),
    "stack": (ValueError, "a must have shape (n, p)", lambda: condition_number(A[None])),
    "empty": (ValueError, "a must have shape (n, p)", lambda: condition_number(A[:, :0])),
    "NaN": (ValueError, "a must be finite", lambda: condition_number(NAN)),
    "inf": (ValueError, "a must be finite", lambda: condition_number([[float("inf")]])),
    "k": (ValueError, "k must be an integer >= 1", lambda: extreme_singular_values(A, 0)),
    "large k": (ValueError, "k must be at most min(n, p) = 3", lambda: extreme_singular_values(A, 4)),
    "method": (ValueError, "method must be one of 'lanczos', 'dense'", lambda: condition_number(A, method="svd")),
    "tol 0": (ValueError, "tol must be a finite number > 0", lambda: condition_number(A, tol=0)),
    "tol 1": (ValueError, "tol must be below 1", lambda: condition_number(A, tol=1.0)),
    "products": (ValueError, "max_products must be an integer >= 1", lambda: condition_number(A, max_products=0)),
    "state": (TypeError, "random_state must be None, an int", lambda: condition_number(A, random_state="0")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    complain(*BAD[name])


def test_products_with_nan_raise():
    """An operator whose matrix nobody can look at: its products tell."""
    linalg = pytest.importorskip("scipy.sparse.linalg")
    bad = linalg.LinearOperator((3, 3), matvec=lambda v: v * np.nan, rmatvec=lambda v: v, dtype=np.float64)
    for method in ("lanczos", "dense"):
        with pytest.raises(ValueError, match="a must be finite, but its products contain NaN or infinity"):
            extreme_singular_values(bad, method=method)
    with pytest.raises(TypeError, match="a must be real, got complex128"):
        extreme_singular_values(linalg.aslinearoperator(np.eye(2) * 1j))


def test_the_rounding_of_products_is_seen():
    """Products in bfloat16 move the values; the residuals say by how much they may be off."""
    linalg = pytest.importorskip("scipy.sparse.linalg")
    a = torch.eye(60, dtype=F64) + 0.3 / 60**0.5 * normal(60, 60)
    true = torch.linalg.svdvals(a)

    def rounded(matrix):
        return lambda v: (matrix @ torch.from_numpy(v).ravel()).bfloat16().double().numpy()

    found = extreme_singular_values(linalg.LinearOperator((60, 60), rounded(a), rounded(a.mT), dtype=np.float64))
    for value, residual, s in (
        (found.largest, found.largest_residuals, true[0]),
        (found.smallest, found.smallest_residuals, true[-1]),
    ):
        assert 1e-6 < abs(value - s) <= residual < 0.05


def test_a_wrong_transpose_is_found():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    a = normal(20, 20).numpy()
    wrong = linalg.LinearOperator((20, 20), lambda v: a @ v, lambda v: a @ v, dtype=np.float64)
    with pytest.raises(ValueError, match="its rmatvec is not that of its matvec"):
        condition_number(wrong)


def test_without_scipy(monkeypatch):
    for name in ("scipy", "scipy.sparse", "scipy.sparse.linalg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert condition_number(np.diag([4.0, 2.0])) == pytest.approx(2)
