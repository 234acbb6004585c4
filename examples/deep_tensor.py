"""DeepTensor: factors from untrained networks, against SVD, NMF and a 3-D deep image prior; no network sees clean data.

1. Four images of 128 x 128 with Poisson noise of 20 photons, rank 32: a budget of 150 iterations fixed beforehand, and
   the stopping rule "holdout". 2. A cube of spectra at 10 photons. 3. Faces with outliers: loss l2 against huber. 4. A
   volume by CP, against one network with 3-D convolutions. 5. Factors without any structure, where nothing is gained.

    python examples/deep_tensor.py             5 seeds for the images, 2 for the rest; six minutes of one core
    python examples/deep_tensor.py --quick     one seed, a smaller volume, narrower networks: under a minute

PSNR is in dB of a range of 1. Times are CPU seconds of one thread.

Method and claims: Saragadam et al., DeepTensor (2204.03145). Deep image prior: Ulyanov et al. (1711.10925).
"""

import argparse
import sys
from functools import partial

import numpy as np
import torch
from _deep_tensor_data import PHOTONS, counted, faces, images, noisy_volume, psnr, spectra_cube, spoilt, unstructured
from _deep_tensor_methods import (
    LONGEST,
    by_sklearn,
    deep,
    factorization,
    held_out,
    image_prior,
    spread,
    svd_psnr,
    timed,
)
from _deep_tensor_plot import plot
from _flags import add_run_flags, check_run_flags, parse
from scipy.ndimage import median_filter
from skimage.restoration import denoise_tv_chambolle
from sklearn.decomposition import TruncatedSVD
from threadpoolctl import threadpool_limits

from sslkern.decomposition import ConvGenerator

RANK, BUDGET = 32, 150
LONGER = 12  # times that an image prior may take longer than CP
GAIN, ENOUGH = 6.0, 3  # dB over the SVD of the rank, and the number of the four images that must show it
CUBE_GAIN, OUTLIER_GAIN, TIMES = 3.0, 0.5, 3.0  # dB over the best SVD; dB of huber over l2; times slower


def images_prior(args):
    return {"rank": RANK, "generator": partial(ConvGenerator, width=64 if args.quick else 128)}


def denoise_images(args):
    """Rows of PSNR and time by image, and the models of the first seed."""
    print(f"Poisson noise, {PHOTONS} photons, rank {RANK}: median (range) over {args.seeds} seed(s)")
    head = ("noisy", f"SVD {RANK}", "best SVD", f"NMF {RANK}", f"{BUDGET} iterations", "holdout")
    print(f"{'':<11}" + "".join(f"{name:>25}" for name in head))
    rows, models = {}, {}
    for name, truth in images().items():
        found = []
        for seed in range(args.seed, args.seed + args.seeds):
            x = counted(truth, PHOTONS, seed)
            svd = svd_psnr(x, truth, range(1, 64))
            _, fast = timed(lambda x=x, seed=seed: by_sklearn(TruncatedSVD(RANK, random_state=seed), x))
            nmf, slow = timed(lambda x=x, seed=seed: by_sklearn(factorization(RANK, 100, seed, args), x))
            fixed, at_budget, seconds = deep(x, truth, seed, **images_prior(args), max_iter=args.iterations or BUDGET)
            stopped, at_stop, longer = deep(x, truth, seed, **images_prior(args), **held_out(args))
            best = max(svd.values())
            found.append((psnr(x, truth), svd[RANK], best, psnr(nmf, truth), at_budget, at_stop))
            rows.setdefault("seconds", []).append((fast, slow, seconds, longer))
            rows.setdefault("stops", {}).setdefault(name, []).append(stopped.best_iter_)
            models.setdefault(name, (truth, x, fixed))
        rows[name] = np.array(found)
        print(f"{name:<11}" + "".join(f"{spread(column):>25}" for column in rows[name].T), flush=True)
    times = dict(zip(("SVD", "NMF", f"{BUDGET} iterations", "holdout"), np.median(rows["seconds"], 0), strict=True))
    print("seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in times.items()))
    print("holdout kept iteration: " + ", ".join(f"{name} {sorted(at)}" for name, at in rows["stops"].items()))
    return rows, models


def judge_images(rows):
    """Gains of the median over both SVDs, for the budget and for the rule; whether enough images show them."""
    passed = True
    for column, method in ((4, "budget"), (5, "holdout")):
        over_rank = {name: np.median(rows[name][:, column] - rows[name][:, 1]) for name in images()}
        over_best = {name: np.median(rows[name][:, column] - rows[name][:, 2]) for name in images()}
        enough = (
            sum(v >= GAIN for v in over_rank.values()) >= ENOUGH and sum(v > 0 for v in over_best.values()) >= ENOUGH
        )
        passed &= enough
        for label, gains in ((f"SVD {RANK}", over_rank), ("the best SVD", over_best)):
            print(f"{method} over {label}: " + ", ".join(f"{name} {gain:+.2f} dB" for name, gain in gains.items()))
    return passed


def variants(args):
    """What else was tried on the first seed, on all images."""
    print("\nVariants on the images, first seed, 150 iterations unless it says otherwise")
    tried = {
        "as above": {},
        "no averaging": {"averaging": 0.0},
        "loss poisson": {"loss": "poisson"},
        "stopping discrepancy": {"stopping": "discrepancy"},
        "generator free (no prior)": {"generator": "free", "learning_rate": 3e-2, "max_iter": 600},
    }
    print(f"{'':<30}" + "".join(f"{name:>12}" for name in images()))
    for label, settings in tried.items():
        values = []
        for truth in images().values():
            x = counted(truth, PHOTONS, args.seed)
            more = {"max_iter": BUDGET} | settings
            if "stopping" in more:
                more |= {"noise_std": float(np.sqrt(x.mean() / PHOTONS)), "max_iter": LONGEST}
            more["max_iter"] = args.iterations or more["max_iter"]
            values.append(deep(x, truth, args.seed, rank=RANK, **more)[1])
        print(f"{label:<30}" + "".join(f"{value:>12.2f}" for value in values), flush=True)


def unmix(args):
    size = 64
    truth, grid = spectra_cube(size), partial(ConvGenerator, grid=(size, size), width=64)
    found = []
    for seed in range(args.seed, args.seed + args.few):
        x = counted(truth, 10, seed)
        svd = svd_psnr(x, truth, range(1, 13))
        nmf, slow = timed(lambda x=x, seed=seed: by_sklearn(factorization(5, 300, seed, args), x))
        _, matrix, seconds = deep(x, truth, seed, rank=5, generator=[grid, "conv"], **held_out(args))
        _, cp, less = deep(
            x.reshape(size, size, -1), truth.reshape(size, size, -1), seed, rank=RANK, form="cp", **held_out(args)
        )
        found.append((psnr(x, truth), max(svd.values()), psnr(nmf, truth), matrix, cp, slow, seconds, less))
    columns = np.array(found).T
    print(f"\nSpectra, {size} x {size} pixels x 64 bands, 5 materials, 10 photons; {args.few} seed(s)")
    names = ("noisy", "best SVD", "NMF 5", "DeepTensor 5, conv 2-D x 1-D", f"DeepTensor CP {RANK}")
    print("\n".join(f"{name:<30}{spread(column):>25}" for name, column in zip(names, columns, strict=False)))
    print("seconds: NMF {:.2f}, DeepTensor {:.1f}, CP {:.1f}".format(*np.median(columns[5:], 1)), flush=True)
    return float(np.median(columns[3] - columns[1]))


def mend_faces(args):
    truth, grid, found = faces(), partial(ConvGenerator, grid=(25, 25), width=64), []
    losses = ("l2", "huber") if args.quick else ("l2", "l1", "huber")
    for seed in range(args.seed, args.seed + args.few):
        x = spoilt(truth, seed)
        row = [psnr(x, truth), max(svd_psnr(x, truth, range(1, 30)).values())]
        row.append(psnr(by_sklearn(factorization(20, 200, seed, args), x.clip(0)), truth))
        for loss in losses:
            longest = args.iterations or (300 if args.quick else LONGEST)
            settings = {"generator": ["conv", grid], "delta": 0.3, "stopping": "holdout", "max_iter": longest}
            row.append(deep(x, truth, seed, rank=20, loss=loss, **settings)[1])
        found.append(row)
    print(f"\nFaces, 100 x 625 pixels, a tenth of them black or white, rank 20; {args.few} seed(s)")
    names = ("noisy", "best SVD", "NMF 20", *(f"DeepTensor {loss}" for loss in losses))
    columns = np.array(found).T
    print("\n".join(f"{name:<30}{spread(column):>25}" for name, column in zip(names, columns, strict=True)), flush=True)
    return float(np.median(columns[-1] - columns[3]))


def decompose_volume(x, truth, seed, args):
    """PSNR and CPU seconds of CP with its stopping rule."""
    settings = {"rank": 64, "form": "cp", "learning_rate": 3e-3} | held_out(args) | {"patience": 30}
    return deep(x, truth, seed, **settings)[1:]


def compare_volumes(args):
    """How many times longer the fastest image prior takes to the PSNR of the CP fit: the least over the seeds."""
    size, ratios, most = 32 if args.quick else 48, [], TIMES + 1 if args.quick else LONGER
    print(f"\nVolume of {size}^3 with white noise of 0.2; CP of rank 64, against 3-D image priors of 8 and 16 channels")
    for seed in range(args.seed, args.seed + args.few):
        x, truth = noisy_volume(size, seed)
        of_cp, seconds = decompose_volume(x, truth, seed, args)
        told, limit = [], most * seconds
        for width in (8, 16):
            reached, best = image_prior(x, truth, of_cp, limit, width, seed)
            told.append(f"{width} channels " + (f"{reached:.1f} s" if reached else f"{best:.2f} dB in {limit:.0f} s"))
            limit = reached or limit
        ratios.append(limit / seconds)
        print(
            f"seed {seed}: noisy {psnr(x, truth):.2f} dB, CP {of_cp:.2f} dB in {seconds:.1f} s; {', '.join(told)}",
            flush=True,
        )
    print(f"CP is sooner by factors of {', '.join(f'{r:.1f}' for r in ratios)} ({most:g}: or more)")
    return min(ratios)


def outlast(args):
    """What an image prior reaches in much more time than CP takes, where it is left alone."""
    for size in (32, 48):
        x, truth = noisy_volume(size, args.seed)
        of_cp, seconds = decompose_volume(x, truth, args.seed, args)
        _, best = image_prior(x, truth, np.inf, LONGER * seconds, 8, args.seed)
        print(
            f"{size}^3: CP ends at {of_cp:.2f} dB; in {LONGER} times its time, the image prior of 8 channels passes "
            f"through {best:.2f} dB at its best",
            flush=True,
        )


def lose(args):
    truth, x = unstructured(4, args.seed)
    svd = svd_psnr(x, truth, (4, 16))
    print("\nIndependent Gaussian factors of rank 4 with noise of their size (no structure: nothing to gain)")
    for rank in (4, 16):
        budget = deep(x, truth, args.seed, rank=rank, max_iter=args.iterations or 600)[1]
        rule = deep(x, truth, args.seed, rank=rank, **held_out(args))[1]
        print(f"rank {rank:>2}: SVD {svd[rank]:.2f} dB, DeepTensor {budget:.2f} (600 iterations), {rule:.2f} (holdout)")


def compare_filters(args):
    """Denoisers that know the picture as a picture, and no rank. The weight 0.2 is about the best one by the truth."""
    print("\nNot of low rank, for comparison")
    seeds = range(args.seed, args.seed + args.seeds)
    for name, truth in images().items():
        found = [psnr(denoise_tv_chambolle(counted(truth, PHOTONS, seed), 0.2), truth) for seed in seeds]
        print(f"{name:<11}{'total variation, weight 0.2':<30}{spread(found)}")
    truth = faces()
    found = [median_filter(spoilt(truth, s).reshape(-1, 25, 25), (1, 3, 3)).reshape(truth.shape) for s in seeds]
    print(f"{'faces':<11}{'median of 3 x 3 pixels':<30}{spread([psnr(x, truth) for x in found])}")


def curves(args):
    """PSNR of the average by the budget, for each image."""
    budgets = (20,) if args.quick else (10, 25, 50, 100, 150, 300)
    budgets = [min(b, args.iterations or b) for b in budgets]
    return {
        name: [
            (b, deep(counted(t, PHOTONS, args.seed), t, args.seed, **images_prior(args), max_iter=b)[1])
            for b in budgets
        ]
        for name, t in images().items()
    }


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--iterations", type=int, default=0, metavar="N", help="of every fit, instead of its own budget"
    )
    add_run_flags(parser, "out/deep_tensor.png")
    args = parse(parser, {}, "one seed, a smaller volume, narrower networks, no variants, no factors without structure")
    check_run_flags(parser, args, {"iterations": 0})
    args.seeds, args.few = (1, 1) if args.quick else (5, 2)
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    threadpool_limits(1)  # a thread of a BLAS that waits counts as CPU time
    rows, models = denoise_images(args)
    passed = {"images": judge_images(rows)}
    if not args.quick:
        variants(args)
    cube, outliers, times = unmix(args), mend_faces(args), compare_volumes(args)
    if not args.quick:
        outlast(args)
        lose(args)
    compare_filters(args)
    plot(args.out, models, curves(args), rows, RANK, BUDGET)
    sooner = 1 if args.quick else TIMES  # the smaller volume takes CP too short a time to be timed well
    passed |= {"cube": cube >= CUBE_GAIN, "faces": outliers >= OUTLIER_GAIN, "volume": times >= sooner}
    bounds = (
        f"images: {GAIN:g} dB over SVD {RANK} and above the best SVD on {ENOUGH} of 4; spectra {cube:.1f} dB over the "
        f"best SVD (bound {CUBE_GAIN:g}); faces: huber {outliers:.1f} dB over l2 (bound {OUTLIER_GAIN:g}); volume: CP "
        f"{times:.1f} times sooner (bound {sooner:g})"
    )
    failed = [name for name, good in passed.items() if not good]
    print(f"FAIL ({', '.join(failed)}): {bounds}" if failed else f"PASS: {bounds}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
