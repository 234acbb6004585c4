"""Images, a cube of spectra, a volume and faces for deep_tensor.py, clean and with noise, in the range 0 to 1."""

import numpy as np
from skimage import data

PHOTONS = 20  # in each pixel of an image where it is 1


def psnr(model, truth):
    return float(-10 * np.log10(np.square(np.asarray(model) - truth).mean()))


def piecewise_constant(size=128, seed=1):
    """Twelve rectangles of random place, size and grey value on a grey ground."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size), 0.3)
    for _ in range(12):
        (top, bottom), (left, right) = (sorted(rng.integers(0, size, 2)) for _ in range(2))
        image[top:bottom, left:right] = rng.uniform(0.1, 1)
    return image


def images():
    camera, astronaut = data.camera() / 255, data.astronaut()[..., 0] / 255
    return {
        "piecewise": piecewise_constant(),
        "camera": camera[120:248, 150:278],
        "sky": camera[:128, :128],
        "astronaut": astronaut[60:188, 160:288],
    }


def counted(image, photons, seed):
    return (np.random.default_rng(seed).poisson(image * photons) / photons).astype(np.float32)


def spectra_cube(size, bands=64, materials=5):
    """(size^2, bands): a mixture of smooth random spectra, weighted by the colours and greys of real images."""
    rng, step = np.random.default_rng(0), 128 // size
    colours = data.astronaut()[60:188:step, 160:288:step] / 255
    grey = data.camera()[120:248:step, 150:278:step] / 255
    weights = np.dstack([colours, 1 - colours.mean(-1), grey]).reshape(-1, materials)
    weights /= weights.sum(-1, keepdims=True)
    x = np.linspace(0, 1, bands)

    def peak():
        return rng.uniform(0.2, 1) * np.exp(-(((x - rng.uniform()) / rng.uniform(0.05, 0.2)) ** 2) / 2)

    cube = weights @ np.array([0.2 + 0.8 * sum(peak() for _ in range(3)) for _ in range(materials)])
    return cube / cube.max()


def volume(size, blobs=14, seed=0):
    """Gaussian ellipsoids in random directions: smooth, but of high CP rank, because the axes are not the modes."""
    rng = np.random.default_rng(seed)
    points = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij"), -1)
    out = np.zeros((size,) * 3)
    for _ in range(blobs):
        axes = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        distance = ((points - rng.uniform(-0.7, 0.7, 3)) @ axes) / rng.uniform(0.12, 0.5, 3)
        out += rng.uniform(0.3, 1) * np.exp(-(distance**2).sum(-1))
    return out / out.max()


def faces():
    """(100, 625): the 100 faces of 25 x 25 pixels that scikit-image ships."""
    return data.lfw_subset()[:100].reshape(100, -1).astype(np.float64)


def spoilt(x, seed, share=0.1, noise=0.05):
    """White noise, and a random share of the pixels black or white."""
    rng = np.random.default_rng(seed)
    noisy = x + noise * rng.standard_normal(x.shape)
    outliers = rng.random(x.shape) < share
    return np.where(outliers, rng.integers(0, 2, x.shape), noisy).astype(np.float32)


def unstructured(rank, seed, size=128):
    """A matrix with independent Gaussian factors, whose rows have no order, and the matrix with noise of its size."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((size, rank)) @ rng.standard_normal((rank, size))
    return truth, (truth + rank**0.5 * rng.standard_normal(truth.shape)).astype(np.float32)


def noisy_volume(size, seed):
    truth = volume(size)
    return (truth + 0.2 * np.random.default_rng(seed).standard_normal(truth.shape)).astype(np.float32), truth
