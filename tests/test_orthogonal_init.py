"""Where orthogonal and unitary matrices start."""

import math

import pytest
import torch
from orthogonal import DOUBLES, deviation
from torch import nn

from sslkern.nn import init


@pytest.mark.parametrize("dtype", DOUBLES, ids=str)
@pytest.mark.parametrize("name", init.BY_NAME)
def test_inits_are_orthogonal(name, dtype):
    """To 1e-12, in stacks, of odd and even n; the same seed gives the same numbers, and random slices differ."""
    function = init.BY_NAME[name]
    for shape in ((1, 1), (7, 7), (8, 8), (3, 6, 6), (2, 3, 5, 5), (0, 4, 4)):
        u = torch.full(shape, torch.nan, dtype=dtype)
        assert function(u, torch.Generator().manual_seed(3)) is u
        assert deviation(u) < 1e-12
        assert torch.equal(u, function(torch.empty_like(u), torch.Generator().manual_seed(3)))
        slices = u.flatten(0, -3) if u.dim() > 2 else u[None]
        for i in range(1, len(slices)):
            assert torch.equal(slices[i], slices[0]) == (name == "identity")
    weight = nn.Parameter(torch.empty(5, 5, dtype=dtype))
    assert function(weight).requires_grad and deviation(weight) < 1e-12
    single = torch.complex64 if dtype.is_complex else torch.float32
    assert deviation(function(torch.empty(256, 256, dtype=single)).to(dtype)) < 1.2e-7


@pytest.mark.parametrize("dtype", DOUBLES, ids=str)
def test_tall_inits(dtype):
    """Orthonormal columns; the identity's are the first unit vectors."""
    for shape in ((7, 3), (2, 5, 1), (4, 6, 5)):
        assert deviation(init.haar_(torch.empty(shape, dtype=dtype))) < 1e-12
        u = init.identity_(torch.empty(shape, dtype=dtype))
        assert torch.equal(u, torch.eye(*shape[-2:], dtype=dtype).expand(shape))


def test_haar_is_uniform():
    """Traces of Haar matrices: E tr = 0, E |tr|^2 = 1; phases are uniform. A QR without the phase fix fails."""

    def departures(u):
        """Distance of the mean and mean square of the trace, and of the mean of an entry's sign, from the law's."""
        trace = u.diagonal(dim1=-2, dim2=-1).sum(-1)
        sign = u[:, 0, 0].sgn()
        return torch.stack([trace.mean().abs(), (trace.abs().square().mean() - 1).abs(), sign.mean().abs()])

    for dtype in DOUBLES:
        u = init.haar_(torch.empty(20000, 3, 3, dtype=dtype))
        assert (departures(u) < torch.tensor([0.035, 0.06, 0.035])).all(), departures(u)
        plain = torch.linalg.qr(torch.randn(20000, 3, 3, dtype=dtype))[0]
        assert (departures(plain) > 0.1).any()
    angles = torch.linalg.eigvals(u).angle().flatten()  # of unitary ones: uniform, each by itself
    for k in (1, 2):
        assert torch.polar(torch.ones_like(angles), k * angles).mean().abs() < 0.02


def test_henaff_and_cayley_have_their_eigenvalues():
    """Rotations by angles in [-pi, pi) and in [0, pi / 2), the latter by the published formula; 1 for odd n."""
    for function, low, high in ((init.henaff_, -math.pi, math.pi), (init.cayley_, 0.0, math.pi / 2)):
        u = function(torch.empty(401, 401, dtype=torch.float64))
        angles = torch.atan2(u.diagonal(-1)[:-1:2], u.diagonal()[:-1:2])
        assert u[-1, -1] == 1 and low <= angles.min() < low + 0.1 and high - 0.1 < angles.max() < high
        assert u.count_nonzero() == 801
        blocks = u[:6, :6].unfold(0, 2, 2).unfold(1, 2, 2).diagonal().permute(2, 0, 1)
        turns = torch.stack([angles[:3].cos(), -angles[:3].sin(), angles[:3].sin(), angles[:3].cos()], 1)
        torch.testing.assert_close(blocks.flatten(1), turns, rtol=0, atol=1e-15)
        skew, eye = torch.zeros_like(u), torch.eye(401, dtype=torch.float64)
        skew.diagonal(1)[:-1:2], skew.diagonal(-1)[:-1:2] = (angles / 2).tan(), -(angles / 2).tan()
        if function is init.cayley_:
            torch.testing.assert_close(u, torch.linalg.solve(eye + skew, eye - skew), rtol=0, atol=1e-12)
    phases = init.henaff_(torch.empty(500, 500, dtype=torch.complex128)).diagonal()
    torch.testing.assert_close(phases.abs(), torch.ones(500, dtype=torch.float64))
    assert phases.angle().min() < -3 and phases.angle().max() > 3


def test_init_errors():
    """One sentence each."""
    for function in init.BY_NAME.values():
        with pytest.raises(TypeError, match=r"u must be a torch\.Tensor, got list\.$"):
            function([1.0])
        with pytest.raises(TypeError, match=r"got bfloat16\.$"):
            function(torch.ones(2, 2, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match=r"at least two dimensions, got shape \(3,\)\.$"):
            function(torch.ones(3))
        with pytest.raises(ValueError, match=r"as many rows as columns, got shape \(2, 3\)|must be square"):
            function(torch.ones(2, 3))
        for expanded in (torch.empty(5, 1).expand(5, 5), torch.empty(4, 4).expand(3, 4, 4)):
            with pytest.raises(ValueError, match=r"u must have its own memory for each element, got an expanded"):
                function(expanded)
        torch.manual_seed(0)
        wanted = function(torch.empty(2, 4, 4))
        torch.manual_seed(0)
        assert torch.equal(function(torch.empty(4, 8, 2).permute(2, 0, 1)[:, :, ::2]), wanted)
    for function in (init.henaff_, init.cayley_):
        with pytest.raises(ValueError, match=r"u must be square, got shape \(3, 2\)"):
            function(torch.ones(3, 2))
