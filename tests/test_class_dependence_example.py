"""The example of class dependence: its images, its functions at a small size, its flags."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("class_dependence")
    monkeypatch.setattr(module, "TRAINING", 4)
    monkeypatch.setattr(module, "TESTING", 6)
    return module


def slope(images):
    """The angle of the long axis of each image in degrees, by second moments."""
    weight = (images[:, 0] - 0.5).clamp_min(0)
    weight = weight / weight.sum((1, 2), keepdim=True)
    line = torch.linspace(-1, 1, images.shape[-1])
    down, right = torch.meshgrid(line, line, indexing="ij")
    down, right = (axis - (weight * axis).sum((1, 2), keepdim=True) for axis in (down, right))
    xx, yy, xy = ((weight * product).sum((1, 2)) for product in (right**2, down**2, right * down))
    return torch.rad2deg(torch.atan2(2 * xy, xx - yy) / 2)


def test_the_bars_differ_in_their_angle(example):
    images, y = importlib.import_module("_oriented_shapes").draw(50, torch.Generator().manual_seed(0))
    assert images.shape == (500, 1, 16, 16) and torch.bincount(y).tolist() == [50] * 10
    shapes = importlib.import_module("_oriented_shapes")
    for label, sign in ((8, 1), (9, -1)):
        angles = sign * slope(images[y == label])
        assert abs(angles.mean() - shapes.SLANT) < 3 and (angles > 0).all()
    turned = slope(shapes.rotate(images[y == 8], 180, torch.Generator().manual_seed(0)))
    assert (turned < -shapes.SLANT).any() and (turned > 3 * shapes.SLANT).any()
    means = [images[y == c].mean((1, 2, 3)) for c in (8, 9)]
    assert abs(means[0].mean() - means[1].mean()) < means[0].std()  # their length is a weak cue


def test_rotations(example):
    rotate = importlib.import_module("_oriented_shapes").rotate
    images = torch.rand(6, 1, 16, 16)
    generator = torch.Generator().manual_seed(0)
    assert rotate(images, 0, generator) is images
    small = rotate(images, 1e-3, generator)
    torch.testing.assert_close(small, images, rtol=0, atol=1e-3)


def test_it_measures_and_draws(example, tmp_path, capsys):
    """Two seeds and few steps: all tables, the figure, and a verdict that fails, since nothing was learned."""
    args = SimpleNamespace(seed=0, seeds=2, splits=2, steps=2, angles=(0, 90), out=tmp_path / "figure.png")
    effect = example.augmentation(example.shapes, args, class_names=example.NAMES)
    path = example.decay(example.shapes, args, class_names=example.NAMES)
    again = example.augmentation(example.shapes, args, class_names=example.NAMES)
    assert (effect.class_means == again.class_means).all()
    assert effect.strengths.tolist() == [0, 90] and path.strengths.tolist() == pytest.approx(example.DECAYS.tolist())
    effects, times = (
        {"shapes": effect, "decay": path},
        {(60, 8): example.race(0, 60, 8, 1), (8, 60): example.race(0, 8, 60, 1)},
    )
    example.print_tables(effects, times)
    example.plot(args, effects)
    assert not example.verdict(effects, times)
    out = capsys.readouterr().out
    assert args.out.stat().st_size > 10_000 and "ridge_path" in out
    verdicts = [line[:4] for line in out.splitlines() if line[:4] in ("PASS", "FAIL")]
    assert len(verdicts) == 4 and verdicts[1] == "FAIL" and verdicts[3] == "PASS"


def test_the_seeds_draw_new_images(example):
    first, second = example.shapes(0), example.shapes(1)
    assert not torch.equal(first[0], second[0]) and len(first[2]) == 40 and len(first[3]) == 60
    assert not torch.equal(first[0][:40], first[1][:40])
    for part, dtype in zip(example.digits(0), (torch.float32, torch.float32, torch.int64, torch.int64), strict=True):
        assert part.dtype == dtype
    np.testing.assert_array_equal(*(np.bincount(part) for part in (first[2], second[2])))


@pytest.mark.parametrize(
    "flags, said",
    (
        (("--seeds", "1"), "--seeds must be at least 2, got 1"),
        (("--splits", "0"), "--splits must be at least 2, got 0"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--seed", "-1"), "--seed must be between 0 and"),
        (("--quick", "--out", "figure.pdf"), "--out must be the name of a .png file"),
    ),
)
def test_a_wrong_flag_gets_one_sentence(flags, said, example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["class_dependence", *flags])
    with pytest.raises(SystemExit) as ended:
        example.parse_arguments()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_quick_flags(example, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["class_dependence", "--quick", "--steps", "7"])
    args = example.parse_arguments()
    assert (args.seeds, args.steps, args.angles) == (example.QUICK["seeds"], 7, example.QUICK_ANGLES)
