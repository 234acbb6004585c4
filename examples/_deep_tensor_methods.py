"""The methods that the example of DeepTensor compares, with their times in CPU seconds."""

import time
import warnings

import numpy as np
import torch
from _deep_tensor_data import psnr
from sklearn.decomposition import NMF

from sslkern.decomposition import ConvGenerator, DeepTensor

LONGEST = 800  # iterations of a fit with a stopping rule


def timed(function):
    start = time.process_time()
    return function(), time.process_time() - start


def deep(x, truth, seed, **settings):
    model, seconds = timed(lambda: DeepTensor(random_state=seed, **settings).fit(x))
    return model, psnr(model.reconstruction_, truth), seconds


def held_out(args):
    return {"stopping": "holdout", "max_iter": args.iterations or LONGEST, "patience": 40 if args.quick else 100}


def svd_psnr(x, truth, ranks):
    """PSNR by rank of the truncated SVD."""
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    return {k: psnr(u[:, :k] * s[:k] @ v[:k], truth) for k in ranks if k <= len(s)}


def by_sklearn(estimator, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NMF fits noise until its last iteration
        return estimator.fit_transform(x) @ estimator.components_


def factorization(rank, iterations, seed, args):
    return NMF(rank, max_iter=args.iterations or iterations, random_state=seed)


def image_prior(x, truth, enough, longest, width, seed):
    """CPU seconds until a 3-D deep image prior first has this PSNR by the truth, and its best one, within `longest`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ConvGenerator(x.size, 1, width=width, coarsest=8, grid=x.shape)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    target = torch.from_numpy((x - x.mean()) / x.std()).flatten()
    start, reached, best = time.process_time(), None, 0.0
    while (spent := time.process_time() - start) < longest and reached is None:
        out = network()[:, 0]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(out, target).backward()
        optimizer.step()
        best = max(best, psnr(out.detach().view(x.shape).numpy() * x.std() + x.mean(), truth))
        reached = spent if best >= enough else None
    return reached, best


def spread(values):
    return f"{np.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"
