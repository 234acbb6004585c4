"""The figure of deep_tensor.py: images side by side, and PSNR against the budget of iterations."""

import matplotlib
import numpy as np
from _deep_tensor_data import psnr
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = ("piecewise", "astronaut")


def plot(out, models, lines, rows, rank, budget):
    figure = plt.figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))
    shown_images = [(name, models[name]) for name in SHOWN]
    for row, (name, (truth, x, fixed)) in zip(left.subplots(len(SHOWN), 4), shown_images, strict=True):
        u, s, v = np.linalg.svd(x)
        shown = (x, u[:, :rank] * s[:rank] @ v[:rank], fixed.reconstruction_, truth)
        titles = (f"{name}, noisy", f"SVD {rank}", f"{budget} iterations", "truth")
        for axis, picture, title in zip(row, shown, titles, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=truth.max())
            value = "" if picture is truth else f"\n{psnr(picture, truth):.1f} dB"
            axis.set_title(title + value, fontsize=8)
            axis.axis("off")
    axis = right.subplots()
    for k, (name, points) in enumerate(lines.items()):
        axis.plot(*zip(*points, strict=True), ".-", color=f"C{k}", label=name)
        axis.axhline(np.median(rows[name][:, 1]), color=f"C{k}", ls=":", lw=1)
        axis.axhline(np.median(rows[name][:, 2]), color=f"C{k}", ls="--", lw=1)
    axis.axvline(budget, color="0.6", lw=1)
    axis.set(
        xscale="log", xlabel="iterations", ylabel="PSNR, dB", title=f"Dashed: best SVD, dotted: SVD of rank {rank}"
    )
    axis.legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    few_colours = Image.open(out).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few_colours.save(out, optimize=True)
    print(f"\n{out}")
