"""What ProjUNN and the functions beside it refuse, and that nothing has moved then; matrices that are empty."""

import matrices
import pytest
import torch
from matrices import METHODS, haar, steps
from torch import nn

from sslkern import optim
from sslkern.optim import ProjUNN, linear_factors, low_rank_factors, orthogonality_error, reorthogonalize_

everywhere = matrices.everywhere


def test_nothing_moves_where_one_is_refused():
    p, q = nn.Parameter(haar(6, 6)), nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
    optimizer, start = ProjUNN([{"params": [p]}, {"params": [q]}], 0.1), p.detach().clone()
    p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
    with pytest.raises(ValueError, match=r"must have orthonormal columns"):
        optimizer.step()
    assert torch.equal(p, start)


def square(dtype=torch.float32):
    return nn.Parameter(haar(4, 4).to(dtype))


@pytest.mark.parametrize(
    "options, exception, text",
    (
        ({"weight_decay": 1e-4}, ValueError, r"takes no weight_decay: it would add rank n to a low-rank step"),
        ({"lr": -0.1}, ValueError, r"lr must be a number >= 0, got -0\.1"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be a number or a tensor of one element, got shape \(2,\)"),
        ({"rank": 0}, ValueError, r"rank must be an integer >= 1, got 0"),
        ({"rank": 1.5}, ValueError, r"rank must be an integer >= 1, got 1\.5"),
        ({"momentum": 1.0}, ValueError, r"momentum must be a number in \[0, 1\), got 1\.0"),
        ({"beta2": -0.1}, ValueError, r"beta2 must be a number in \[0, 1\), got -0\.1"),
        ({"eps": -1.0}, ValueError, r"eps must be a number >= 0, got -1\.0"),
        ({"nesterov": True}, ValueError, r"nesterov=True needs momentum > 0"),
        ({"second_moment": "adam"}, ValueError, r"second_moment must be None, 'scalar' or 'elementwise', got 'adam'"),
        ({"retraction": "qr"}, ValueError, r"retraction must be one of .*, got 'qr'"),
        ({"method": "lsi"}, ValueError, r"method must be one of 'sketch', 'columns', 'svd', got 'lsi'"),
        ({"reorthogonalize_every": 0}, ValueError, r"reorthogonalize_every must be an integer >= 1, got 0"),
        ({"seed": "a"}, TypeError, r"seed must be an integer, got str"),
    ),
    ids=str,
)
def test_bad_options(options, exception, text):
    """One sentence, from the constructor and from a group, which is not added."""
    with pytest.raises(exception, match=text):
        ProjUNN([square()], **{"lr": 0.1, **options})
    optimizer = ProjUNN([square()], 0.1)
    with pytest.raises(exception, match=text):
        optimizer.add_param_group({"params": [square()], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "p, exception, text",
    (
        (torch.zeros(4), ValueError, r"must have shape \(\.\.\., n, p\), got \(4,\)"),
        (torch.eye(5)[:3], ValueError, r"as many rows as columns, got shape \(3, 5\): hold its transpose"),
        (torch.eye(5)[:, :3], ValueError, r"must be square for 'tangent', got shape \(5, 3\): use 'direct' or"),
        (torch.eye(4).to(torch.float8_e5m2), TypeError, r"complex128, bfloat16 or float16, got float8_e5m2"),
        (torch.eye(4).to_sparse(), TypeError, r"must be a dense \(strided\) tensor, got layout torch\.sparse_coo"),
    ),
    ids=("vector", "wide", "tall", "float8", "sparse"),
)
def test_bad_parameters(p, exception, text):
    with pytest.raises(exception, match=text):
        ProjUNN([p.requires_grad_()], 0.1)


def test_what_a_step_refuses():
    """Sparse gradients before anything has moved, and columns that are not orthonormal."""
    a, b = square(), square()
    a.grad, b.grad, before = torch.randn(4, 4), torch.eye(4).to_sparse(), a.detach().clone()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients, got layout torch\.sparse_coo"):
        ProjUNN([a, b], 0.1).step()
    assert torch.equal(a, before)
    for wrong in (torch.randn(2, 6, 6) / 6, 1.1 * haar(6, 6), torch.full((3, 3), float("nan"))):
        p = nn.Parameter(wrong)
        p.grad = torch.zeros_like(p)
        with pytest.raises(
            ValueError, match=r"must have orthonormal columns, .*: start from the Q of torch\.linalg\.qr"
        ):
            ProjUNN([p], 0.1).step()


def test_bad_arguments_of_functions():
    g = torch.randn(4, 3)
    for call, exception, text in (
        (
            lambda: low_rank_factors([1.0], 1),
            TypeError,
            r"g must be a torch\.Tensor of shape \(\.\.\., n, p\), got list",
        ),
        (lambda: low_rank_factors(g.long(), 1), TypeError, r"g must be float32, .* or float16, got int64"),
        (lambda: low_rank_factors(g[0], 1), ValueError, r"g must have shape \(\.\.\., n, p\), got \(3,\)"),
        (lambda: low_rank_factors(g, 0), ValueError, r"rank must be an integer >= 1, got 0"),
        (lambda: low_rank_factors(g, 1, "qr"), ValueError, r"method must be one of"),
        (lambda: low_rank_factors(g, 1, "svd", g[:3, :1]), ValueError, r"warm_start must be None for method 'svd'"),
        (lambda: low_rank_factors(g, 1, u=g.mT), ValueError, r"u must have at least as many rows as columns"),
        (
            lambda: low_rank_factors(g, 1, u=g.double()),
            ValueError,
            r"u must have .* shape \(4, 3\) and dtype float32, got",
        ),
        (lambda: low_rank_factors(g, 1, samples=3), ValueError, r"samples must be None for method 'sketch'"),
        (lambda: low_rank_factors(g, 1, "columns", samples=0), ValueError, r"samples must be an integer >= 1, got 0"),
        (lambda: low_rank_factors(g, 2, warm_start=g), ValueError, r"warm_start must have shape \(3, 2\) and dtype"),
        (lambda: linear_factors(g, g[:2], 1), ValueError, r"dy and x must have shapes .*, got \(4, 3\) and \(2, 3\)"),
        (lambda: linear_factors(g, g.double(), 1), TypeError, r"same dtype, got float32 and float64"),
        (lambda: orthogonality_error(g.mT), ValueError, r"u must have at least as many rows as columns"),
        (lambda: reorthogonalize_(g.half()), TypeError, r"u must be float32, float64, .*, got float16"),
        (lambda: reorthogonalize_(g, 0), ValueError, r"q must be an integer >= 1, got 0"),
        (lambda: optim.project_tangent_(g, g, g), ValueError, r"u must be square for 'tangent'"),
    ):
        with pytest.raises(exception, match=text):
            call()


def test_empty_matrices():
    """No rows, no columns, no matrices: nothing happens."""
    for shape in ((0, 0), (5, 0), (0, 4, 4)):
        p = nn.Parameter(torch.zeros(shape))
        steps(ProjUNN([p], 0.1, 2, "direct", momentum=0.5, second_moment="scalar"), [p], [[torch.zeros(shape)]] * 2)
        assert reorthogonalize_(p.detach(), 1).shape == orthogonality_error(p).new_zeros(shape).shape
    for method in METHODS:
        left, right = low_rank_factors(torch.zeros(0, 4, 3), 2, method)
        assert left.shape == (0, 4, 2) and right.shape == (0, 3, 2)
