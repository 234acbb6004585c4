"""Small generated images: eight shapes at any angle, and two classes of bars that differ in their angle."""

import math

import torch
import torch.nn.functional as F

SIDE = 16  # pixels
NAMES = ("arc", "triangle", "cross", "T", "L", "two dots", "two bars", "three dots", "bar +10°", "bar -10°")
ORIENTED = NAMES[-2:]
SLANT, WOBBLE = 10, 5  # degrees
HALF_LENGTHS = (0.73, 0.65)  # of the two bars, before the random scale of 0.8 to 1.2: a weak cue beside the angle
NOISE = 0.1  # standard deviation; pixels are in [0, 1]


def draw(per_class, generator):
    """Images (N, 1, 16, 16) and labels, with a random angle, size, place and noise.

    The first eight classes have any angle. A bar is within 5 degrees of +10 or of -10 degrees, its class.
    """
    y = torch.arange(len(NAMES)).repeat_interleave(per_class)

    def uniform(bound):
        return (2 * torch.rand(len(y), 1, 1, generator=generator) - 1) * bound

    bars = (y >= 8)[:, None, None]
    slant = torch.where(y == 8, SLANT, -SLANT)[:, None, None] + uniform(WOBBLE)
    angle = torch.where(bars, slant, uniform(180)) * (math.pi / 180)
    scale = 1 + uniform(0.2)
    line = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    down, right = torch.meshgrid(line, line, indexing="ij")
    down, right = (down - uniform(0.15)) / scale, (right - uniform(0.15)) / scale
    u, v = angle.cos() * right + angle.sin() * down, angle.cos() * down - angle.sin() * right
    inside = _fields(u, v)[y, torch.arange(len(y))]
    images = torch.sigmoid(0.6 * SIDE * inside) + NOISE * torch.randn(inside.shape, generator=generator)
    return images[:, None], y


def _fields(u, v):
    """For each class, a function of the plane that is above 0 inside its shape; (classes, N, 16, 16)."""

    def bar(along, across, half=0.7):
        return torch.minimum(half - along.abs(), 0.15 - across.abs())

    def dots(*centers):
        return torch.stack([0.25 - torch.hypot(u - a, v - b) for a, b in centers]).amax(0)

    either, both = torch.maximum, torch.minimum
    return torch.stack(
        [
            both(0.15 - (torch.hypot(u, v) - 0.55).abs(), v + 0.1),
            both(v + 0.45, 0.7 - v - 1.6 * u.abs()),
            either(bar(u, v), bar(v, u)),
            either(bar(u, v - 0.5), bar(v, u)),
            either(bar(u, v - 0.55), bar(v, u - 0.55)),
            dots((-0.5, 0), (0.5, 0)),
            either(bar(u, v - 0.45), bar(u, v + 0.45)),
            dots((-0.5, -0.35), (0.5, -0.35), (0, 0.5)),
            *(bar(u, v, half) for half in HALF_LENGTHS),
        ]
    )


def rotate(images, degrees, generator):
    """Rotate every image by a random angle of at most this many degrees, with bilinear sampling."""
    if degrees == 0:
        return images
    angle = (2 * torch.rand(len(images), generator=generator) - 1) * (degrees * math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    return F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)
