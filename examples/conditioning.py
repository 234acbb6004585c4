"""Skip connections and the condition of deep networks: ConvNet, ResNet and DenseNet, with three activations.

A layer is phi(W h) (ConvNet), phi(W h) + h (ResNet) or [phi(W h); h] (DenseNet), with normal weights of standard
deviation 0.3 fan_in^-0.5 and phi the ReLU, a leaky ReLU of slope 0.1 or the absolute value.

1. The condition of the affine map that 1 to 8 layers of 64 units are around a normal sample, and that 8 circular
   convolutions of 4 channels are around a digit of 8 x 8 pixels. Beside each layer, the bounds of the paper.
2. The condition of the Hessian of the squared error in the weight of the first and of the last of 4 layers of 8 units,
   from 200 normal samples, and the share of the error that 100 steps of gradient descent with the step 1/L leave. An
   orthogonal layer follows.
3. Lanczos' method on matrices of known condition: where it converges, and what it says where it does not.

    python examples/conditioning.py            some minutes on two cores, 10 seeds
    python examples/conditioning.py --quick    half a minute, 3 seeds; the same bounds

Paper: Riedi, Balestriero and Baraniuk, Singular value perturbation and deep network optimization (2203.03099).
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict

import torch
from _conditioning_networks import ACTIVATIONS, KINDS, convolutional_network, dense_network
from _conditioning_plot import plot
from _flags import add_run_flags, add_sizes, check_run_flags, parse
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from sslkern import analysis
from sslkern.analysis import condition_number, extreme_singular_values, hessian_factors, local_affine

UNITS, DEPTH, CHANNELS = 64, 8, 4
SMALL, LAYERS, SAMPLES, STEPS = 8, 4, 200, 100
CONDITIONS = (3, 10, 30, 100, 1000)
LIMIT = 15.65  # log10 of 1/eps of float64: beyond it, a condition is rounding
ONE_LAYER = (5, 100)  # bounds on the median conditions of W + I and of W
DEEP = {"ConvNet": 12, "ResNet": 1.5, "DenseNet": 0.2}  # bounds on the median log10 condition of 8 layers
DEEP_ABSOLUTE = 8  # the least of the ConvNet with the absolute value, which has no slope near 0
RATIO = 4  # least ratio of the median conditions of the Hessian in the first layer, ConvNet to ResNet


def log10_condition(matrix):
    """At most LIMIT."""
    kappa = condition_number(matrix, method="dense")
    return min(math.log10(kappa), LIMIT) if kappa < math.inf else LIMIT


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_layer(seed, draws):
    """The conditions of W and of W + I, for this number of draws of W."""
    w = normal(seed, draws, UNITS, UNITS) * 0.3 / UNITS**0.5
    return torch.linalg.cond(w).tolist(), analysis.residual_condition(w).value.tolist()


def bounds_of(net, kind, activation, x):
    """The bounds of the paper for every layer of a network at x."""
    results = []
    for layer in net:
        w = layer.linear.weight.detach()
        z = w @ x[0]
        d = torch.where(z > 0, 1.0, {"ReLU": 0.0, "leaky ReLU": 0.1, "absolute value": -1.0}[activation]).double()
        results.append(analysis.activation_condition(w, d))
        if activation == "absolute value":
            results.append(analysis.absolute_value_shift(w, d))
        if kind == "ResNet":
            results += [f(d[:, None] * w) for f in (analysis.residual_shift, analysis.residual_condition)]
        if kind == "DenseNet":
            results += [f(w, d) for f in (analysis.dense_shift, analysis.dense_condition)]
        x = layer(x).detach()
    return results


def measure_depth(args, seeds):
    """{(kind, activation): rows of log10 conditions by depth}, and {bound: [(value, bound, holds)]}."""
    found, bounds = {}, defaultdict(list)
    for kind in KINDS:
        for activation in ACTIVATIONS:
            rows = []
            for seed in seeds:
                net, x = dense_network(kind, activation, UNITS, DEPTH, seed), normal(seed, 1, UNITS)
                rows.append([log10_condition(local_affine(net[:d], x)[0].matrix()) for d in args.depths])
                for b in bounds_of(net, kind, activation, x):
                    bounds[b.name].append((b.value.item(), b.bound.item(), b.holds.item()))
            found[kind, activation] = rows
    return found, bounds


def measure_convolutions(seeds):
    """{(kind, activation): log10 conditions of 8 convolutions}, at a digit with random colours of ink and paper."""
    images, found = torch.from_numpy(load_digits().images / 16), {}
    for kind in KINDS:
        for activation in ACTIVATIONS:
            found[kind, activation] = []
            for seed in seeds:
                ink, paper = normal(seed, 2, CHANNELS, 1, 1)
                digit = paper + (ink - paper) * images[seed % len(images)]
                net = convolutional_network(kind, activation, CHANNELS, DEPTH, seed)
                found[kind, activation].append(log10_condition(local_affine(net, digit[None])[0].matrix()))
    return found


def hessian_of(kind, activation, seed, layer):
    """log10 of the condition, and the mean share of the error that gradient descent leaves, from normal weights."""
    net = dense_network(kind, activation, SMALL, LAYERS, seed)
    width = SMALL * (1 + LAYERS * (kind == "DenseNet"))
    net.append(nn.Linear(width, SMALL, bias=False).double())
    with torch.no_grad():
        net[-1].weight.copy_(torch.linalg.qr(normal(seed, width, SMALL)).Q.mT)
    factors = hessian_factors(net, net[layer].linear, normal(seed + 1, SAMPLES, SMALL))
    kappa = factors.condition(method="dense")
    eigenvalues = torch.linalg.eigvalsh(factors.matrix()).clamp(min=0)
    left = (eigenvalues * (1 - eigenvalues / eigenvalues[-1]) ** (2 * STEPS)).sum() / eigenvalues.sum()
    return min(math.log10(kappa), LIMIT) if kappa < math.inf else LIMIT, left.item()


def measure_hessians(seeds):
    """{(kind, activation, layer): [(log10 condition, error left)]}."""
    return {
        (kind, activation, layer): [hessian_of(kind, activation, seed, layer) for seed in seeds]
        for layer in (0, LAYERS - 1)
        for kind in KINDS
        for activation in ACTIVATIONS
    }


def known_condition(n, kappa, seed):
    """A matrix with n singular values from 1 to kappa in equal steps."""
    a = torch.diag(torch.linspace(1, kappa, n, dtype=torch.float64))
    u, v = (z / z.norm() for z in normal(seed, 2, n))
    a = a - 2 * torch.outer(u, u @ a)
    return a - 2 * torch.outer(a @ v, v)


def measure_lanczos(args, seed):
    """{condition: ExtremeSingularValues}, and the sentence for the largest condition."""
    matrices = {kappa: known_condition(args.size, kappa, seed) for kappa in CONDITIONS}
    found = {k: extreme_singular_values(a, max_products=args.products) for k, a in matrices.items()}
    try:
        condition_number(matrices[CONDITIONS[-1]], max_products=args.products)
        said = ""
    except RuntimeError as error:
        said = str(error)
    dense = condition_number(matrices[CONDITIONS[-1]], method="dense")
    return found, said, dense


def spread(values, digits=2):
    values = list(values)
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def print_tables(args, one, depth, bounds, convolutions, hessians, lanczos):
    print(f"\nOne layer of {UNITS} units: condition, median (range) of {len(one[0])} draws")
    print(f"W {spread(one[0], 1)}; W + I {spread(one[1])}")
    print(f"\nlog10 of the condition by the number of layers, median of {args.seeds} seeds; {LIMIT}: beyond float64")
    print(f"{'':<26}" + "".join(f"{d:>7}" for d in args.depths) + f"{f'range at {DEPTH}':>18}{'8 convolutions':>24}")
    for (kind, activation), rows in depth.items():
        cells = "".join(f"{statistics.median(row[k] for row in rows):>7.2f}" for k in range(len(args.depths)))
        last = [row[-1] for row in rows]
        print(
            f"{kind:<10}{activation:<16}{cells}{f'{min(last):.2f} to {max(last):.2f}':>18}"
            f"{spread(convolutions[kind, activation]):>24}"
        )
    print(f"\n{'bounds, every layer of every network above':<52}{'holds':>12}{'value':>10}{'bound':>10}{'closest':>10}")
    for name, seen in bounds.items():
        finite = [(v, b) for v, b, _ in seen if 0 < b < math.inf]
        closest = f"{max(v / b for v, b in finite):.3f}" if finite else ""
        middle = [statistics.median(s[k] for s in seen) for k in (0, 1)]
        cells = f"{sum(h for *_, h in seen)}/{len(seen)}", *(f"{v:.3g}" for v in middle), closest
        print(f"{name:<52}{cells[0]:>12}{cells[1]:>10}{cells[2]:>10}{cells[3]:>10}")
    print("value, bound: medians; closest: the largest value / bound where the bound is finite and not 0")
    print(f"\nHessian in one layer: log10 of the condition; share of the error after {STEPS} steps; median (range)")
    for (kind, activation, layer), seen in hessians.items():
        where = "first layer" if layer == 0 else "last layer"
        shares = spread((share for _, share in seen), 4)
        print(f"{where:<13}{kind:<10}{activation:<16}{spread(k for k, _ in seen):>24}{shares:>28}")
    found, said, dense = lanczos
    print(f"\nLanczos, n = {args.size}, even spectrum, at most {args.products} products")
    print(f"{'condition':>10}{'found':>12}{'residual':>11}{'products':>10}  converged")
    for kappa, result in found.items():
        residual = result.smallest_residuals.item()
        print(f"{kappa:>10}{result.condition:>12.4f}{residual:>11.1e}{result.n_products:>10}  {result.converged}")
    print(f"condition {CONDITIONS[-1]} by the SVD: {dense:.4f}; Lanczos says: {said}")


def verdict(one, depth, bounds, hessians, lanczos):
    """Print the claims with their bounds; True if all hold."""
    w, skip = map(statistics.median, one)
    deep = {key: statistics.median(row[-1] for row in rows) for key, rows in depth.items()}
    plain = min(deep["ConvNet", a] for a in ("ReLU", "leaky ReLU"))
    worst = {kind: max(deep[kind, a] for a in ACTIVATIONS) for kind in KINDS}
    first = {(kind, a): statistics.median(k for k, _ in hessians[kind, a, 0]) for kind in KINDS for a in ACTIVATIONS}
    ratio = min(10 ** (first["ConvNet", a] - first["ResNet", a]) for a in ACTIVATIONS)
    found, said, dense = lanczos
    right = all(abs(r.condition / k - 1) < 1e-5 if r.converged else r.condition <= k for k, r in found.items())
    silent = [r.converged for k, r in found.items() if k <= 10] != [True, True] or found[CONDITIONS[-1]].converged
    share = sum(h for seen in bounds.values() for *_, h in seen), sum(map(len, bounds.values()))
    claims = (
        (f"one layer: W + I {skip:.2f} (< {ONE_LAYER[0]}), W {w:.0f} (> {ONE_LAYER[1]})",
         skip < ONE_LAYER[0] and w > ONE_LAYER[1]),
        (f"8 layers, log10: ConvNet {plain:.1f} (> {DEEP['ConvNet']}) with the ReLUs, "
         f"{deep['ConvNet', 'absolute value']:.1f} (> {DEEP_ABSOLUTE}) with the absolute value; ResNet at most "
         f"{worst['ResNet']:.2f} (< {DEEP['ResNet']}), DenseNet {worst['DenseNet']:.3f} (< {DEEP['DenseNet']})",
         plain > DEEP["ConvNet"] and deep["ConvNet", "absolute value"] > DEEP_ABSOLUTE
         and all(worst[kind] < DEEP[kind] for kind in KINDS[1:])),
        (f"bounds: {share[0]} of {share[1]} hold (all)", share[0] == share[1]),
        (f"Hessian in the first layer, ConvNet to ResNet: at least {ratio:.1f} times (> {RATIO})", ratio > RATIO),
        (f"Lanczos: right where it converges, says so where not, SVD of condition {CONDITIONS[-1]}: {dense:.2f}",
         right and not silent and 'method="dense"' in said and abs(dense / CONDITIONS[-1] - 1) < 1e-6),
    )  # fmt: skip
    for text, holds in claims:
        print(f"{'holds' if holds else 'FAILS'}  {text}")
    passed = all(holds for _, holds in claims)
    print(f"{'PASS' if passed else 'FAIL'}: {sum(holds for _, holds in claims)} of {len(claims)} claims hold")
    return passed


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, {"seeds": 10})
    add_run_flags(parser, "out/conditioning.png")
    args = parse(parser, {"seeds": 3}, "4 depths, smaller matrices for Lanczos")
    check_run_flags(parser, args, {"seeds": 1})
    args.depths = (1, 2, 4, 8) if args.quick else tuple(range(1, DEPTH + 1))
    args.size, args.products = (500, 700) if args.quick else (1200, 2000)
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    seeds = range(args.seed, args.seed + args.seeds)
    with tqdm(total=4, desc="parts", ncols=80) as bar:
        one = one_layer(args.seed, 200)
        depth, bounds = measure_depth(args, seeds)
        bar.update()
        convolutions = measure_convolutions(seeds[: 1 if args.quick else 5])
        bar.update()
        hessians = measure_hessians(seeds)
        bar.update()
        lanczos = measure_lanczos(args, args.seed)
        bar.update()
    print_tables(args, one, depth, bounds, convolutions, hessians, lanczos)
    plot(args, depth, hessians, lanczos[0], LIMIT)
    return 0 if verdict(one, depth, bounds, hessians, lanczos) else 1


if __name__ == "__main__":
    sys.exit(main())
