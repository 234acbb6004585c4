"""Orthogonal and unitary layers: where they start, what they compute, and that they stay so while they learn."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslkern.nn import (
    OrthogonalConv2d,
    OrthogonalLinear,
    OrthogonalRNN,
    UnitaryRNN,
    init,
    modReLU,
    modrelu,
    orthogonal_parameters,
    other_parameters,
)
from sslkern.ops import rank_k_update_

DOUBLES = (torch.float64, torch.complex128)
SIZES = ((1, 1), (1, 2), (2, 2), (3, 5), (4, 6), (5, 4), (6, 3), (1, 7), (8, 1))


def deviation(u):
    """The largest entry of U^H U - I."""
    return float((u.mH @ u - torch.eye(u.shape[-1], dtype=u.dtype)).detach().abs().amax()) if u.numel() else 0.0


def dense(layer):
    """The matrix of a layer without bias, column by column: (C H W, C H W)."""
    shape = layer.channels, *layer.size
    eye = torch.eye(math.prod(shape), dtype=layer.dtype)
    with torch.no_grad():
        return layer(eye.view(-1, *shape)).flatten(1).mT


def off_one(matrix):
    """The largest distance of a singular value, in double precision, from 1."""
    double = torch.complex128 if matrix.is_complex() else torch.float64
    return float((torch.linalg.svdvals(matrix.to(double)) - 1).abs().max())


@torch.no_grad()
def wander(parameters, steps, rank=2, scale=0.1):
    """Random rank-k steps of every matrix, in place."""
    for _ in range(steps):
        for u in parameters:
            a, b = (torch.randn(*u.shape[:-2], n, rank, dtype=u.dtype) for n in u.shape[-2:])
            rank_k_update_(u, scale / u.shape[-1] * a, b, "tangent" if u.shape[-2] == u.shape[-1] else "cayley")


@torch.no_grad()
def descend(model, rate, other_rate, rank=2):
    """Plain gradient descent, along the leading singular vectors of the gradient for orthogonal parameters."""
    for u in orthogonal_parameters(model):
        left, values, right = torch.linalg.svd(u.grad, full_matrices=False)
        a = -rate * left[..., :rank] * values[..., None, :rank]
        rank_k_update_(u, a, right[..., :rank, :].mH, "cayley")
    for p in other_parameters(model):
        p -= other_rate * p.grad
    model.zero_grad()


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


@pytest.mark.parametrize("dtype", DOUBLES, ids=str)
@pytest.mark.parametrize("features", ((6, 6), (4, 7), (7, 4), (1, 5), (5, 1)), ids=str)
def test_linear_keeps_norms(features, dtype):
    """torch's formula; of x for out >= in, of the gradient for out <= in; also after steps of its tall parameter."""
    into, out = features
    layer = OrthogonalLinear(into, out, dtype=dtype)
    assert layer.weight_u.shape == (max(features), min(features)) and layer.weight.shape == (out, into)
    assert torch.equal(layer.weight, layer.weight_u if out >= into else layer.weight_u.mT)
    assert layer.bias.abs().max() <= into**-0.5 and layer.bias.any()
    for _ in range(2):
        x = torch.randn(3, 2, into, dtype=dtype, requires_grad=True)
        y = layer(x)
        expected = torch.einsum("oi,...i->...o", layer.weight, x) + layer.bias
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        if out >= into:
            torch.testing.assert_close((y - layer.bias).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
        if out <= into:
            torch.testing.assert_close(dx.norm(dim=-1), dy.norm(dim=-1), rtol=1e-12, atol=0)
        with torch.no_grad():
            a, b = (torch.randn(n, 2, dtype=dtype) for n in layer.weight_u.shape)
            rank_k_update_(layer.weight_u, 0.3 * a, b, "cayley")
        assert deviation(layer.weight_u) < 1e-12
    assert OrthogonalLinear(3, 4, bias=False).bias is None


@pytest.mark.parametrize("kind", (torch.float64, torch.complex128), ids=str)
def test_modrelu(kind):
    """The formula, its gradient and the second one; at z = 0 and next to it, for every b, all is finite."""
    z = torch.randn(4, 5, dtype=kind)
    bias = torch.linspace(-1.5, 0.7, 5, dtype=torch.float64)
    torch.testing.assert_close(modrelu(z, bias), (z.abs() + bias).relu() * z / z.abs())
    assert (modrelu(z, bias) == 0).any() and torch.equal(modReLU(5, dtype=torch.float64)(z).abs() > 0, z.abs() > 0)
    inputs = z.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(modrelu, inputs) and torch.autograd.gradgradcheck(modrelu, inputs)
    bias = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    for tiny, of_kind in ((0.0, kind), (1e-320, kind), (0.0, kind.to_complex()), (1e-42, torch.float32)):
        z = torch.full((2, 3), tiny, dtype=of_kind, requires_grad=True)
        y = modrelu(z, bias)
        dz, db = torch.autograd.grad(y.abs().sum() + y.real.sum() if y.is_complex() else y.sum(), (z, bias))
        assert y.isfinite().all() and dz.isfinite().all() and db.isfinite().all()
        assert (y[:, 0] == 0).all() and (dz[:, 0] == 0).all() and (dz[:, 1:] != 0).all()
        assert tiny or not y.any()


CASES = (
    (OrthogonalRNN, {"nonlinearity": "relu"}),
    (OrthogonalRNN, {"nonlinearity": "tanh", "num_layers": 2}),
    (OrthogonalRNN, {"nonlinearity": "modrelu", "init": "haar"}),
    (UnitaryRNN, {}),
    (UnitaryRNN, {"num_layers": 2, "init": "haar"}),
    (UnitaryRNN, {"bias": False}),
)


def loop(layer, x, h):
    """The formula, step by step: x (T, N, I), h (layers, N, H)."""
    states = list(h)
    output = []
    for step in x:
        below = step
        for k in range(layer.num_layers):
            v, w = getattr(layer, f"weight_ih_l{k}"), getattr(layer, f"weight_hh_l{k}")
            b = getattr(layer, f"bias_l{k}") if layer.bias else torch.zeros(layer.hidden_size, dtype=torch.float64)
            z = torch.stack([v @ one + w @ other for one, other in zip(below.to(v.dtype), states[k], strict=True)])
            if layer.nonlinearity == "modrelu":
                below = (z.abs() + b).relu() * z / z.abs()
            else:
                below = getattr(torch, layer.nonlinearity)(z + b)
            states[k] = below
        output.append(below)
    return torch.stack(output), torch.stack(states)


@pytest.mark.parametrize("kind, settings", CASES, ids=str)
def test_rnn_is_the_loop(kind, settings):
    """Outputs and last states, in every layout, and gradients, against finite differences."""
    dtype = torch.complex128 if kind is UnitaryRNN else torch.float64
    layer = kind(3, 4, dtype=dtype, **settings)
    for name, p in layer.named_parameters():
        if name.startswith("bias"):
            p.data.normal_().mul_(0.2)
    x, h0 = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(layer.num_layers, 2, 4, dtype=dtype)
    for start in (None, h0):
        expected, last = loop(layer, x, torch.zeros_like(h0) if start is None else start)
        output, h_n = layer(x, start)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(h_n, last, rtol=0, atol=1e-13)
        layer.batch_first = True
        swapped, h_n = layer(x.transpose(0, 1), start)
        torch.testing.assert_close(swapped.transpose(0, 1), expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(h_n, last, rtol=0, atol=1e-13)
        alone, h_n = layer(x[:, 1], None if start is None else start[:, 1])
        torch.testing.assert_close(alone, expected[:, 1], rtol=0, atol=1e-13)
        torch.testing.assert_close(h_n, last[:, 1], rtol=0, atol=1e-13)
        layer.batch_first = False
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in layer.named_parameters()), strict=True)

    def function(x, h, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, h))

    assert torch.autograd.gradcheck(function, (x[:3].requires_grad_(), h0.requires_grad_(), *values))


@pytest.mark.parametrize("name", ("henaff", "cayley", "haar", "identity"))
@pytest.mark.parametrize("kind", (OrthogonalRNN, UnitaryRNN))
def test_gradients_neither_vanish_nor_explode(kind, name):
    """Through 1000 linear steps the norm of dL/dh is kept to 1e-12, also of moved weights; torch's RNN loses it."""
    dtype, options = torch.float64, {"nonlinearity": "modrelu"}
    if kind is UnitaryRNN:
        dtype, options = torch.complex128, {}
    layer = kind(2, 24, init=name, dtype=dtype, **options)
    wander(orthogonal_parameters(layer), 3)
    h0 = torch.randn(1, 3, 24, dtype=dtype, requires_grad=True)
    x = torch.zeros(1000, 3, 2, dtype=torch.float64)
    dh = torch.randn(1, 3, 24, dtype=dtype)
    (start,) = torch.autograd.grad(layer(x, h0)[1], h0, dh)
    torch.testing.assert_close(start.norm(dim=-1), dh.norm(dim=-1), rtol=1e-12, atol=0)
    plain = nn.RNN(2, 24, dtype=torch.float64)
    h0 = torch.randn(1, 3, 24, dtype=torch.float64, requires_grad=True)
    (start,) = torch.autograd.grad(plain(x[:100], h0)[1].sum(), h0)
    assert start.norm() < 1e-3


@pytest.mark.parametrize("dtype", DOUBLES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_convolution_is_orthogonal_and_is_torchs(size, dtype):
    """As a dense matrix: singular values 1 to 1e-12; as torch's circular convolution with its kernel: to 1e-12."""
    height, width = size
    for name in ("haar", "delta", "henaff", "cayley", "identity"):
        layer = OrthogonalConv2d(3, size, init=name, dtype=dtype)
        numbers = sum(p.numel() << (p.is_complex() and layer.is_real) for p in orthogonal_parameters(layer))
        assert numbers == 9 * height * width and not layer.bias.any()
        for _ in range(2):
            nn.init.zeros_(layer.bias)
            matrix = dense(layer)
            assert matrix.dtype == dtype and off_one(matrix) < 1e-12
            nn.init.normal_(layer.bias)
            x = torch.randn(2, 3, *size, dtype=dtype)
            around = torch.cat([x, x[:, :, :-1]], 2)
            around = torch.cat([around, around[..., :-1]], 3)
            expected = F.conv2d(around, layer.weight, layer.bias)
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(layer(x[1]), expected[1], rtol=0, atol=1e-12)
            wander(orthogonal_parameters(layer), 2)


def test_convolution_starts():
    """Haar: another block at every frequency. Delta: a 1 x 1 convolution. Identity: y = x. Padding mode "circular"."""
    layer = OrthogonalConv2d(2, (4, 6), bias=False, dtype=torch.float64)
    blocks = torch.cat([layer.weight_unitary, layer.weight_orthogonal.to(torch.complex128)])
    assert torch.cdist(*[torch.view_as_real(blocks).flatten(1)] * 2).fill_diagonal_(1).min() > 1e-3
    x = torch.randn(5, 2, 4, 6, dtype=torch.float64)
    same = F.conv2d(F.pad(x, (0, 5, 0, 3), mode="circular"), layer.weight)
    torch.testing.assert_close(layer(x), same, rtol=0, atol=1e-12)
    delta = OrthogonalConv2d(2, (4, 6), init="delta", bias=False, dtype=torch.float64)
    torch.testing.assert_close(delta(x), F.conv2d(x, delta.weight[:, :, :1, :1]), rtol=0, atol=1e-12)
    identity = OrthogonalConv2d(2, (4, 6), init="identity", dtype=torch.float64)
    torch.testing.assert_close(identity(x), x, rtol=0, atol=1e-14)
    assert OrthogonalConv2d(2, 5).size == (5, 5)


@pytest.mark.parametrize("size", ((6, 8), (5, 6), (5, 7), (8, 3)), ids=str)
def test_a_moved_real_convolution_stays_orthogonal_by_conjugate_ties(size):
    """150 random steps in float32: singular values 1 +- 1e-5; a free unitary block in every half-spectrum bin fails."""
    channels = 3
    layer = OrthogonalConv2d(channels, size, bias=False, dtype=torch.float32)
    with torch.no_grad():
        naive = layer.spectrum.clone()
    wander(orthogonal_parameters(layer), 150)
    assert off_one(dense(layer)) < 1e-5
    for u in orthogonal_parameters(layer):
        assert deviation(u) < 1e-5

    def free(x):
        return torch.fft.irfft2(torch.einsum("hwoc,nchw->nohw", naive, torch.fft.rfft2(x)), s=size)

    eye = torch.eye(channels * math.prod(size)).view(-1, channels, *size)
    assert off_one(free(eye).flatten(1).mT) < 1e-5
    wander([naive], 150)
    assert deviation(naive) < 1e-5 and off_one(free(eye).flatten(1).mT) > 0.1


def test_convolution_gradients():
    """Of the image and of every block, by finite differences, real and complex, odd and even sides."""
    for dtype, size in ((torch.float64, (4, 2)), (torch.float64, (3, 3)), (torch.complex128, (2, 3))):
        layer = OrthogonalConv2d(2, size, dtype=dtype)
        names, values = zip(*((n, p.detach().requires_grad_()) for n, p in layer.named_parameters()), strict=True)

        def function(x, *parameters, layer=layer, names=names):
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

        x = torch.randn(2, 2, *size, dtype=dtype, requires_grad=True)
        assert torch.autograd.gradcheck(function, (x, *values))


def every():
    """A layer of each kind with an input for it, float32."""
    return (
        (OrthogonalLinear(5, 3), torch.randn(4, 5)),
        (OrthogonalLinear(3, 5, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64)),
        (OrthogonalConv2d(2, (4, 5)), torch.randn(3, 2, 4, 5)),
        (OrthogonalConv2d(2, (4, 5), dtype=torch.complex64), torch.randn(3, 2, 4, 5, dtype=torch.complex64)),
        (OrthogonalRNN(3, 6, 2), torch.randn(5, 2, 3)),
        (OrthogonalRNN(3, 6, nonlinearity="modrelu", bias=False), torch.randn(5, 2, 3)),
        (UnitaryRNN(3, 6, 2), torch.randn(5, 2, 3)),
    )


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_layers_learn_their_like():
    """A copy of a layer of each kind is learnt from outputs: the loss falls a hundredfold, weights stay orthonormal."""
    for make, shape, rate, other_rate in (
        (lambda: OrthogonalLinear(6, 4), (64, 6), 0.2, 0.2),
        (lambda: OrthogonalLinear(4, 4, dtype=torch.complex64), (64, 4), 0.2, 0.2),
        (lambda: OrthogonalConv2d(2, (4, 5)), (64, 2, 4, 5), 0.2, 0.01),
        (lambda: OrthogonalRNN(3, 5, nonlinearity="modrelu", init="cayley"), (4, 64, 3), 0.02, 0.02),
        (lambda: UnitaryRNN(3, 5, init="cayley"), (4, 64, 3), 0.02, 0.02),
    ):
        teacher = make()
        student = copy.deepcopy(teacher)
        wander(orthogonal_parameters(student), 1, scale=0.5)
        nn.init.normal_(next(p for p in other_parameters(student) if p.dim() == 1), std=0.1)
        x = torch.randn(shape, dtype=next(student.parameters()).dtype if len(shape) == 2 else None)
        curve = []
        for _ in range(150):
            loss = (first(student(x)) - first(teacher(x)).detach()).abs().square().sum() / 64
            loss.backward()
            curve.append(float(loss.detach()))
            descend(student, rate, other_rate)
        assert curve[-1] < curve[0] / 100
        assert all(deviation(u) < 1e-5 for u in orthogonal_parameters(student))


def test_parameters_are_told_apart():
    """Each once, in order, also shared, in a deep copy, and in a module of one's own; together they are all."""
    model = nn.Sequential(*(layer for layer, _ in every()), nn.Linear(2, 2), modReLU(3))
    model.append(model[0])
    names = {n for n, p in model.named_parameters() if any(p is q for q in orthogonal_parameters(model))}
    assert names == {
        "0.weight_u",
        "1.weight_u",
        "2.weight_unitary",
        "2.weight_orthogonal",
        "3.weight_unitary",
        "4.weight_hh_l0",
        "4.weight_hh_l1",
        "5.weight_hh_l0",
        "6.weight_hh_l0",
        "6.weight_hh_l1",
    }
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for one in (model, twin, torch.load(buffer, weights_only=False)):
        ours, others = list(orthogonal_parameters(one)), list(other_parameters(one))
        assert len(ours) == len(names) and len({*map(id, ours), *map(id, others)}) == len(list(one.parameters()))
        assert [id(p) for n, p in one.named_parameters() if n in names] == [*map(id, ours)]
        assert all(p.shape[-2] >= p.shape[-1] and deviation(p) < 1e-5 for p in ours)
    assert not {*map(id, model.parameters())} & {*map(id, twin.parameters())}

    class Own(nn.Module):
        orthogonal_names = ("q", "absent")

        def __init__(self):
            super().__init__()
            self.q, self.p = nn.Parameter(torch.eye(2)), nn.Parameter(torch.eye(2))

    own = Own()
    assert [*map(id, orthogonal_parameters(own))] == [id(own.q)] and [*map(id, other_parameters(own))] == [id(own.p)]
    for function in (orthogonal_parameters, other_parameters):
        with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got Tensor\.$"):
            function(torch.ones(2))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_state_precision_and_device():
    """state_dicts load, a deep copy has the bits; a precision is that of all, complex or real; from meta by a reset."""
    for layer, x in every():
        clone = copy.deepcopy(layer)
        clone.reset_parameters()
        changed = any(not torch.equal(p, q) for p, q in zip(layer.parameters(), clone.parameters(), strict=True))
        assert changed
        clone.load_state_dict(layer.state_dict())
        for twin in (clone, copy.deepcopy(layer)):
            assert torch.equal(first(twin(x)), first(layer(x)))
        parameters = list(clone.parameters())
        first(clone(x)).abs().sum().backward()
        clone.double().float().to(torch.complex128)
        for p, q, r in zip(layer.parameters(), clone.parameters(), parameters, strict=True):
            assert q is r and q.dtype == (torch.complex128 if p.is_complex() else torch.float64)
            assert q.grad is not None and q.grad.dtype == q.dtype and torch.equal(q.to(p.dtype), p)
        y = first(clone(x.to(torch.complex128 if x.is_complex() else torch.float64)))
        torch.testing.assert_close(y.to(first(layer(x)).dtype), first(layer(x)), rtol=1e-5, atol=1e-5)
        clone.to(memory_format=torch.channels_last)
        clone.requires_grad_(False)
    with torch.device("meta"):
        meta = [OrthogonalLinear(3, 4), OrthogonalConv2d(2, (4, 3)), UnitaryRNN(2, 3)]
    for layer in meta:
        assert all(p.is_meta for p in layer.parameters())
        layer.to_empty(device="cpu").reset_parameters()
        assert all(deviation(u) < 1e-5 for u in orthogonal_parameters(layer))
    for layer in (OrthogonalConv2d(2, 3), UnitaryRNN(2, 3)):
        with pytest.raises(TypeError, match=r"complex64 or complex128: they cannot become bfloat16\.$"):
            layer.bfloat16()
    assert repr(OrthogonalLinear(3, 4)) == "OrthogonalLinear(in_features=3, out_features=4, bias=True, init='haar')"
    assert repr(OrthogonalConv2d(3, 4)) == "OrthogonalConv2d(3, size=(4, 4), bias=True, init='haar')"
    assert repr(UnitaryRNN(3, 4)).startswith("UnitaryRNN(3, 4, num_layers=1, nonlinearity='modrelu', bias=True")


def test_sixteen_bits():
    """A real convolution takes bfloat16 as it is; recurrent and linear layers under autocast."""
    x = torch.randn(2, 3, 4, 5).bfloat16()
    layer = OrthogonalConv2d(3, (4, 5))
    y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.float()).bfloat16())
    for layer, x in ((OrthogonalLinear(3, 4), torch.randn(2, 3)), (OrthogonalRNN(3, 4), torch.randn(5, 2, 3))):
        with torch.autocast("cpu", torch.bfloat16):
            y = first(layer(x))
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        if isinstance(layer, OrthogonalRNN):
            with torch.autocast("cpu", torch.bfloat16):
                layer(x, layer(x)[1])
        torch.testing.assert_close(y.float(), first(layer(x)), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:.*complex operators:UserWarning")
@pytest.mark.parametrize("index", range(7))
def test_compiled(index):
    """fullgraph=True: values and gradients of eager."""
    layer, x = every()[index]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        y = first(function(x))
        results.append([y.detach(), *torch.autograd.grad(y.abs().square().sum(), layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", (4, (3, 5)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
def test_convolution_of_no_images(size, dtype):
    """Empty in, empty out, and a zero for every parameter, as torch.nn.Conv2d."""
    layer = OrthogonalConv2d(3, size, dtype=dtype)
    x = torch.empty(0, 3, *layer.size, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == dtype
    y.abs().sum().backward()
    assert x.grad.shape == x.shape and all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_bad_arguments():
    """One sentence, before any work."""
    conv, rnn, unitary = OrthogonalConv2d(3, (4, 5)), OrthogonalRNN(3, 4, 2), UnitaryRNN(3, 4, batch_first=True)
    for call, error, text in (
        (lambda: OrthogonalLinear(0, 3), ValueError, r"^in_features must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalLinear(3, 2.5), ValueError, r"^out_features must be an integer >= 1, got 2\.5\.$"),
        (lambda: OrthogonalLinear(3, 3, init="he"), ValueError, r"^init must be one of 'haar', .*, got 'he'\.$"),
        (lambda: OrthogonalLinear(3, 4, init="henaff"), ValueError, r"^u must be square, got shape \(4, 3\)"),
        (
            lambda: OrthogonalLinear(3, 3, dtype=torch.bfloat16),
            TypeError,
            r"^dtype must be float32 or .*got bfloat16\.$",
        ),
        (lambda: OrthogonalConv2d(0, 3), ValueError, r"^channels must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalConv2d(3, (3, 0)), ValueError, r"^width must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalConv2d(3, (3,)), ValueError, r"^size must be an integer or a pair of them, got \(3,\)\.$"),
        (lambda: OrthogonalConv2d(3, 2.5), ValueError, r"^size must be an integer or a pair of them, got 2\.5\.$"),
        (lambda: OrthogonalConv2d(3, 3, init="?"), ValueError, r"'delta', got '\?'\.$"),
        (lambda: OrthogonalConv2d(3, 3, dtype=torch.int64), TypeError, r"got int64\.$"),
        (lambda: conv([1.0]), TypeError, r"^input must be a torch\.Tensor, got list\.$"),
        (
            lambda: conv(torch.ones(2, 3, 5, 4)),
            ValueError,
            r"^input must have shape \(N, 3, 4, 5\) or \(3, 4, 5\), got \(2, 3, 5, 4\): another size of image needs",
        ),
        (lambda: conv(torch.ones(4, 5)), ValueError, r"got \(4, 5\)"),
        (lambda: conv(torch.ones(3, 4, 5).double()), TypeError, r"the dtype of the layer, float32, got float64\.$"),
        (lambda: OrthogonalRNN(3, 0), ValueError, r"^hidden_size must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalRNN(3, 4, 0), ValueError, r"^num_layers must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalRNN(3, 4, nonlinearity="elu"), ValueError, r"^nonlinearity must be one of .*, got 'elu'\.$"),
        (lambda: OrthogonalRNN(3, 4, dtype=torch.complex64), TypeError, r"float32 or float64, got complex64\.$"),
        (lambda: UnitaryRNN(3, 4, dtype=torch.float32), TypeError, r"complex64 or complex128, got float32\.$"),
        (lambda: rnn(3), TypeError, r"^input must be a torch\.Tensor, got int\.$"),
        (lambda: rnn(torch.ones(5, 2, 4)), ValueError, r"\(T, N, 3\) or \(T, 3\) with T >= 1, got \(5, 2, 4\)\.$"),
        (lambda: rnn(torch.ones(0, 2, 3)), ValueError, r"with T >= 1, got \(0, 2, 3\)\.$"),
        (lambda: unitary(torch.ones(2, 0, 3)), ValueError, r"\(N, T, 3\) or \(T, 3\) with T >= 1, got \(2, 0, 3\)\.$"),
        (lambda: rnn(torch.ones(5, 2, 3).double()), TypeError, r"of the weights, float32, got float64\.$"),
        (lambda: unitary(torch.ones(2, 5, 3).double()), TypeError, r"of the weights, complex64, got float64\.$"),
        (lambda: rnn(torch.ones(5, 2, 3), 0.0), TypeError, r"^h0 must be a torch\.Tensor, got float\.$"),
        (lambda: rnn(torch.ones(5, 2, 3), torch.ones(1, 2, 4)), ValueError, r"^h0 must have shape \(2, 2, 4\), got"),
        (lambda: rnn(torch.ones(5, 3), torch.ones(2, 1, 4)), ValueError, r"^h0 must have shape \(2, 4\), got"),
        (lambda: unitary(torch.ones(5, 3), torch.ones(1, 4)), TypeError, r"^h0 must have the dtype of the weights"),
        (lambda: modReLU(0), ValueError, r"^features must be an integer >= 1, got 0\.$"),
        (lambda: modReLU(3, dtype=torch.complex64), TypeError, r"^dtype must be real, .*got complex64\.$"),
        (lambda: modrelu(torch.ones(2), torch.ones(2) * 1j), TypeError, r"^bias must be real, got complex64\.$"),
    ):
        with pytest.raises(error, match=text) as caught:
            call()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
