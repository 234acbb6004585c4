"""Orthogonal convolutions: as dense matrices, as torch's own, moved, and of no images."""

import math

import pytest
import torch
import torch.nn.functional as F
from orthogonal import DOUBLES, deviation, wander
from torch import nn

from sslkern.nn import OrthogonalConv2d, orthogonal_parameters

SIZES = ((1, 1), (1, 2), (2, 2), (3, 5), (4, 6), (5, 4), (6, 3), (1, 7), (8, 1))


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
