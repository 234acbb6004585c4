"""The settings and arguments with which more of lightly's classes are compared."""

from functools import partial
from typing import Any, NamedTuple

import torch
from compat_lightly_formulas import (
    WMSE,
    TiCo,
    Whitening,
    alignment,
    by_rows,
    detcon,
    emp_ssl,
    frossl,
    hypersphere,
    koleo,
    lejepa,
    macl,
    mmcr,
    sigreg,
    vicregl,
)
from ranks import normal


class Case(NamedTuple):
    """A class by its name here and in lightly, its formula, its settings, and the shapes of what it is called with.

    `make` turns the leaves into arguments, (args, kwargs). Where `single` is set, lightly computes in float32.
    """

    name: str
    formula: Any
    settings: dict
    shapes: tuple
    make: Any = lambda *z: (z, {})
    steps: int = 1
    single: bool = False


def listed(*views):
    return (list(views),), {}


def ids(*shape, seed):
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(seed))


def masked(*z):
    shape = z[0].shape[:2]
    return (*z, ids(*shape, seed=0), ids(*shape, seed=1)), {}


def with_mask(student, teacher):
    mask = normal(*student.shape[:2], seed=3) > 0.6
    mask[0] = True
    mask[0, :1] = False  # an image with one token left
    return (student, teacher, mask), {}


def grids(*maps):
    return [normal(*z.shape[:3], 2, seed=9 + k) for k, z in enumerate(maps)]


def large_views(*z):
    return ([z[:2], z[2:]], grids(z[1], z[3])), {}


def all_views(*z):
    places = grids(*z[1::2])
    return ([z[:2], z[2:4]], places[:2], [z[4:6]], places[2:]), {}


def pairs(*shapes, count=2):
    return tuple((shape,) * count for shape in shapes)


PLANES = ((9, 33), (33, 4), (70, 65), (2, 3))
MAPS = (((6, 5), (6, 3, 4, 7), (6, 5), (6, 2, 2, 7)),)
CASES = {
    "SIGReg": Case("SIGReg", sigreg, {"num_vectors": 40}, pairs((9, 33), (3, 8, 5), (1, 2), count=1), single=True),
    "SIGReg, knots": Case(
        "SIGReg", sigreg, {"knots": 5, "t_max": 4.0, "num_vectors": 7}, pairs((9, 4), count=1), single=True
    ),
    "LeJEPA": Case(
        "LeJEPALoss",
        lejepa,
        {"sigreg_num_vectors": 30, "lambda_param": 0.3},
        (((3, 8, 5), (2, 8, 5)),),
        lambda a, b: ((), {"local_proj": a, "global_proj": b}),
        single=True,
    ),
    "KoLeo": Case("KoLeoLoss", koleo, {}, pairs(*PLANES, (1, 5), count=1)),
    "KoLeo, p": Case("KoLeoLoss", koleo, {"p": 3.0, "eps": 1e-3}, pairs((9, 5), (70, 65), count=1)),
    "hypersphere": Case("HypersphereLoss", hypersphere, {}, pairs(*PLANES)),
    "hypersphere, settings": Case("HypersphereLoss", hypersphere, {"t": 2.5, "lam": 0.3, "alpha": 1.5}, pairs(*PLANES)),
    "hypersphere, other": Case("HypersphereLoss", hypersphere, {"t": -1.0, "alpha": 0.5}, pairs((70, 65))),
    "MACL": Case("MACLLoss", macl, {}, pairs(*PLANES, (1, 3))),
    "MACL, settings": Case("MACLLoss", macl, {"temperature": 0.4, "alpha": 0.8, "A_0": 0.3}, pairs(*PLANES)),
    "DetConB": Case("DetConBLoss", detcon, {}, pairs((3, 5, 4), (9, 8, 70), (1, 1, 3), count=4), masked, single=True),
    "DetConS": Case(
        "DetConSLoss",
        lambda **settings: lambda a, b, *masks: detcon(a, b, a, b, *masks, **settings),
        {"temperature": 0.3},
        pairs((3, 5, 4), (9, 8, 70)),
        masked,
        single=True,
    ),
    "patches": Case("PatchKernelAlignmentLoss", alignment, {}, pairs((3, 7, 5), (2, 4, 9)), single=True),
    "patches, mask": Case("PatchKernelAlignmentLoss", alignment, {}, pairs((3, 7, 5)), with_mask, single=True),
    "patches, drawn": Case(
        "PatchKernelAlignmentLoss", alignment, {"max_tokens": 4}, pairs((3, 7, 5), (2, 4, 3)), single=True
    ),
    "patches, both": Case(
        "PatchKernelAlignmentLoss", alignment, {"max_tokens": 3}, pairs((4, 9, 5)), with_mask, single=True
    ),
    "FroSSL": Case("FroSSLLoss", frossl, {}, (*pairs(*PLANES), *pairs((9, 5), (70, 65), count=4)), listed),
    "FroSSL, weight": Case("FroSSLLoss", frossl, {"invariance_weight": 0.2}, pairs((9, 5), (66, 70)), listed),
    "TiCo": Case("TiCoLoss", TiCo, {}, pairs(*PLANES), steps=3),
    "TiCo, settings": Case("TiCoLoss", TiCo, {"beta": 0.3, "rho": 2.0}, pairs((9, 5), (66, 70)), steps=2),
    "MMCR": Case("MMCRLoss", mmcr, {}, pairs((9, 2, 5), (4, 3, 7), (30, 2, 70))),
    "MMCR, lmda": Case("MMCRLoss", mmcr, {"lmda": 0.7}, pairs((9, 2, 5), (30, 2, 70))),
    "EMP-SSL": Case("EMPSSLLoss", emp_ssl, {}, (*pairs(*PLANES), *pairs((9, 5), (70, 65), count=3)), listed),
    "EMP-SSL, settings": Case(
        "EMPSSLLoss", emp_ssl, {"tcr_eps": 1.5, "inv_coef": 3.0}, (*pairs((9, 5), (66, 70)), ((7, 3),)), listed
    ),
    "VICRegL": Case("VICRegLLoss", vicregl, {}, MAPS, large_views),
    "VICRegL, small": Case(
        "VICRegLLoss",
        vicregl,
        {"alpha": 0.4, "num_matches": (None, 3), "nu_param": 5.0},
        (((6, 5), (6, 3, 4, 7)) * 3,),
        all_views,
    ),
    "W-MSE": Case("WMSELoss", WMSE, {"embedding_dim": 5, "w_size": 12}, pairs((24, 5), (48, 5), count=1), steps=2),
    "W-MSE, settings": Case(
        "WMSELoss",
        WMSE,
        {"embedding_dim": 4, "w_size": 10, "w_iter": 3, "num_samples": 3, "momentum": 0.3, "eps": 0.1},
        pairs((60, 4), count=1),
    ),
    "W-MSE, loss": Case(
        "WMSELoss",
        WMSE,
        {"embedding_dim": 4, "w_size": 10, "w_iter": 2, "num_samples": 3, "loss_fn": by_rows},
        pairs((60, 4), count=1),
    ),
    "whitening": Case("Whitening2d", Whitening, {"num_features": 6}, pairs((20, 6), count=1), steps=3),
    "whitening, settings": Case(
        "Whitening2d", Whitening, {"num_features": 6, "momentum": 0.4, "eps": 0.2}, pairs((20, 6), count=1), steps=2
    ),
}  # fmt: skip
GATHERED = {
    "SIGReg": Case("SIGReg", sigreg, {"num_vectors": 30}, pairs((2, 6, 5), count=1), single=True),
    "LeJEPA": CASES["LeJEPA"],
    "DetConB": CASES["DetConB"]._replace(shapes=pairs((3, 5, 4), count=4)),
    "DetConS": CASES["DetConS"]._replace(shapes=pairs((3, 5, 4))),
    "TiCo": CASES["TiCo"]._replace(shapes=pairs((9, 5), (4, 20))),
    "VICRegL": CASES["VICRegL"],
    "VICRegL, small": CASES["VICRegL, small"],
}
FUNCTIONS = (sigreg, lejepa, koleo, hypersphere, macl, detcon, alignment, frossl, mmcr, emp_ssl, vicregl)


def formula(case):
    """The formula of a case with its settings."""
    return partial(case.formula, **case.settings) if case.formula in FUNCTIONS else case.formula(**case.settings)


def leaves_of(shapes, seed=0, dtype=torch.float64, rank=0):
    """Correlated views, off zero."""
    common = normal(*shapes[0], seed=seed + 50 * rank)
    found = []
    for k, shape in enumerate(shapes):
        noise = normal(*shape, seed=seed + 7 * k + 1 + 50 * rank)
        found.append((noise + (0.7 * common if shape == common.shape else 0)).to(dtype).requires_grad_())
    return found


def run(loss, case, shapes, dtype=torch.float64, rank=0):
    """The values and gradients of some calls, and the running statistics after them."""
    found = []
    for step in range(case.steps):
        leaves = leaves_of(shapes, step, dtype, rank)
        args, kwargs = case.make(*leaves)
        torch.manual_seed(5 + step)  # of directions, tokens and sub-batches
        value = loss(*args, **kwargs)
        weighted = (value * torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)).sum()
        grads = torch.autograd.grad(weighted, leaves, allow_unused=True)
        assert all(g is None or g.dtype == x.dtype for g, x in zip(grads, leaves, strict=True))
        found.append(
            [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]
        )
    return found


def assert_equal(found, expected, tolerance, case, slack=None):
    """Values relative to 1 or more, gradients to their largest number or 0.1; `slack` is the plain formula in the same
    dtype."""
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for k, (f, e) in enumerate(zip(ours, theirs, strict=True)):
            assert f.shape == e.shape, (case, step, k, f.shape, e.shape)
            limit = tolerance * max(float(e.abs().max()), 0.1 if k else 1.0)
            if slack is not None:
                limit += 4 * float((slack[step][k].double() - e.double()).abs().max())
            error = float((f.double() - e.double()).abs().max())
            assert error <= limit, f"{case}, step {step}, {'gradient' if k else 'value'} {k}: {error:.1e} > {limit:.1e}"
