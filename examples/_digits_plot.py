"""The figure of vicreg_digits.py: loss curves, times, accuracies."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_curves(axis, runs):
    axis.plot(runs["sslkern"]["loss"], color="C0", label="sslkern")
    axis.plot(runs["published"]["loss"], "--", color="black", lw=1.6, label="published formula")
    axis.set(title="Training loss, same seed", xlabel="step")
    axis.legend(frameon=False)


def plot_micro(axis, args, runs):
    for name, label, style in (
        ("sslkern", f"batch {args.batch}", "C0.-"),
        ("unbiased", f"micro-batches of {args.micro}, unbiased", "C2.-"),
        ("plugin", f"micro-batches of {args.micro}, plug-in", "C3.-"),
    ):
        points = {step: value for step, value in runs[name]["yardstick"].items() if step < args.published_steps}
        axis.plot(list(points), list(points.values()), style, label=label)
    axis.set(title=f"Unbiased loss of the whole batch of {args.batch}", xlabel="step")
    axis.legend(frameon=False)


def plot_times(axis, times, distance):
    for i, part in enumerate(("loss", "step")):
        old, new = times["published"][part] * 1e3, times["sslkern"][part] * 1e3
        axis.bar([i - 0.2, i + 0.2], [old, new], 0.36, color=["0.45", "C0"])
        axis.text(i - 0.2, old * 1.1, f"{old:.0f} ms", ha="center")
        axis.text(i + 0.2, new * 1.1, f"{new:.1f} ms\n{old / new:.1f}x", ha="center", color="C0", weight="bold")
    axis.set(yscale="log", xticks=[0, 1], xticklabels=["loss alone", "whole step"])
    values = [seconds * 1e3 for parts in times.values() for seconds in parts.values()]
    axis.set(ylim=(min(values) / 3, max(values) * 4), ylabel="ms")
    axis.set_title(f"Median time: published, sslkern (curves within {distance:.0e})")


def plot_accuracies(axis, accuracies):
    y = np.arange(len(accuracies))[::-1]
    for k, (label, color) in enumerate((("all labels", "C0"), ("5 per class", "0.65"))):
        values = [pair[k] for pair in accuracies.values()]
        axis.barh(y + 0.2 - 0.4 * k, values, 0.36, color=color, label=label)
        for at, value in zip(y + 0.2 - 0.4 * k, values, strict=True):
            axis.text(value - 0.004, at, f"{value:.3f}", va="center", ha="right", color="white", fontsize=9)
    low = min(min(pair) for pair in accuracies.values())
    axis.set(yticks=y, yticklabels=list(accuracies), xlim=(max(0, low - 0.08), 1), title="Linear probe, held-out")
    axis.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def plot(args, runs, times, distance, accuracies):
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(13, 9), layout="constrained")
    top, bottom = (row.subplots(1, 2) for row in figure.subfigures(2, 1, hspace=0.05))
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    plot_curves(top[0], runs)
    plot_times(top[1], times, distance)
    plot_accuracies(bottom[1], accuracies)
    if "unbiased" in runs:
        plot_micro(bottom[0], args, runs)
    else:
        bottom[0].axis("off")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(f"\n{args.out}")
