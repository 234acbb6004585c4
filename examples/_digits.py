"""Parts of the examples on digits: images, two views, network, linear probe."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

TRAINING_IMAGES = 1198  # two thirds of the images; the others are held out


def split_digits(seed):
    """Training and test images (N, 1, 8, 8) in [0, 1], and the labels of both."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images / 16).float().view(-1, 1, 8, 8)
    return train_test_split(images, labels, train_size=TRAINING_IMAGES, stratify=labels, random_state=seed)


def batch_of(images, labels, size, generator):
    rows = torch.randint(len(labels), (size,), generator=generator)
    return images[rows], torch.from_numpy(labels)[rows]


@torch.no_grad()
def accuracy(images, labels, network):
    device = next(network.parameters()).device
    return float((network(images.to(device)).argmax(-1).cpu().numpy() == labels).mean())


def augment(images, generator):
    """Apply a random rotation, scale, shift, brightness and noise to every image, with bilinear sampling."""
    n = len(images)

    def uniform(low, high):
        return torch.rand(n, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.3, 0.3), uniform(0.8, 1.2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, uniform(-0.25, 0.25), sin, cos, uniform(-0.25, 0.25)], 1).view(n, 2, 3)
    views = F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)
    noise = torch.randn(views.shape, generator=generator)
    return views * uniform(0.7, 1.3).view(n, 1, 1, 1) + 0.1 * noise


def two_views(images, batch, generator, device):
    picked = images[torch.randperm(len(images), generator=generator)[:batch]]
    return [augment(picked, generator).to(device) for _ in range(2)]


class Normalize(nn.Module):
    def forward(self, images):
        return (images - 0.3) / 0.37  # mean and standard deviation of the digits


def build_network(args):
    """Encoder to 512 features, projector hidden-hidden-width. The same seed gives the same weights."""
    torch.manual_seed(args.seed)
    encoder = nn.Sequential(
        Normalize(),
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(1024, 512), nn.ReLU()),
    )
    projector = nn.Sequential(
        *(nn.Linear(512, args.hidden), nn.LayerNorm(args.hidden), nn.ReLU()),
        *(nn.Linear(args.hidden, args.hidden), nn.LayerNorm(args.hidden), nn.ReLU()),
        nn.Linear(args.hidden, args.width),
    )
    return nn.Sequential(encoder, projector).to(args.device)


def features(network, *image_sets):
    """The encoder's output for every set of images, as numpy arrays."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return [network[0](images.to(device)).cpu().numpy() for images in image_sets]


def linear_accuracy(train_x, test_x, train_y, test_y):
    """Accuracy of a linear classifier on held-out digits."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    return classifier.fit(train_x, train_y).score(test_x, test_y)


def probe(train_x, test_x, train_y, test_y, draws=5):
    """Accuracy of a linear classifier on held-out digits, from all labels and from 5 per class (mean of the draws)."""
    few = []
    for draw in range(draws):
        random = np.random.default_rng(draw)
        rows = [i for c in range(10) for i in random.choice(np.flatnonzero(train_y == c), 5, replace=False)]
        few.append(linear_accuracy(train_x[rows], test_x, train_y[rows], test_y))
    return linear_accuracy(train_x, test_x, train_y, test_y), float(np.mean(few))
