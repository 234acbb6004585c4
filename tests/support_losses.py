"""Losses, as functions and as modules, each with its formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import support_formulas as plain
import support_spectra as spectra
import torch
from support import LABELS, MEAN, POSITIONS, ROWS, WHOLE, A, B, D, Leaf, add
from torch import Tensor

from sslkern import losses


def add_loss(function: Callable, kind: type, formula: Callable, *leaves: Leaf, name: str = "", **rest: Any) -> None:
    """`name` tells a setting, in which the function is called by `call`, and the module by `as_module`."""
    family = rest.pop("family", "Losses of columns" if "more" in rest else "Losses of pairs of rows")
    public = name or getattr(function, "__name__", "")
    call = rest.pop("call", function)
    as_module = rest.pop("as_module", lambda *z, group=None, **settings: kind(**settings, group=group)(*z))
    setting = public.partition(" ")[2]
    add(public, family, call, formula, *leaves, group=MEAN, **rest)
    add(f"{kind.__name__} {setting}".strip(), f"{family}, as modules", as_module, formula, *leaves, group=MEAN, **rest)


VICREG = {"sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0, "gamma": 1.0, "eps": 1e-4}
VCREG = {key: VICREG[key] for key in ("std_coeff", "cov_coeff", "gamma", "eps")}
add_loss(losses.vicreg_loss, losses.VICRegLoss, plain.vicreg, A, B, settings=VICREG, more=POSITIONS)
add_loss(losses.vcreg_loss, losses.VCRegLoss, plain.vcreg, A, settings=VCREG, more=POSITIONS)
VIBCREG = {**VICREG, "cov_coeff": 200.0}
add_loss(losses.vibcreg_loss, losses.VIbCRegLoss, spectra.vibcreg, A, B, settings=VIBCREG, more=POSITIONS)
add_loss(
    losses.barlow_twins_loss,
    losses.BarlowTwinsLoss,
    plain.barlow_twins,
    A,
    B,
    settings={"lambd": 0.0051, "eps": 1e-5},
    more=POSITIONS,
)
INFO = {"sim_coeff": 1.0, "ent_coeff": 1.0, "noise": 1.0}
add_loss(losses.info_vicreg_loss, losses.InfoVICRegLoss, plain.info_vicreg, A, B, settings=INFO, more=POSITIONS)
for entropy, formula in (("diagonal", plain.info_vicreg_diagonal), ("pairwise-kl", plain.info_vicreg_pairwise)):
    add_loss(
        losses.info_vicreg_loss,
        losses.InfoVICRegLoss,
        formula,
        A,
        B,
        name=f"info_vicreg_loss ({entropy})",
        call=partial(losses.info_vicreg_loss, entropy=entropy),
        as_module=lambda a, b, entropy=entropy, **rest: losses.InfoVICRegLoss(entropy, **rest)(a, b),
        settings=INFO,
        more=POSITIONS,
    )
add_loss(losses.nt_xent_loss, losses.NTXentLoss, plain.nt_xent, A, B, settings={"temperature": 0.5})
add_loss(
    losses.nt_xent_loss,
    losses.NTXentLoss,
    plain.nt_xent,
    A,
    B,
    Leaf((ROWS, D)),
    name="nt_xent_loss (three views)",
    call=lambda a, b, c, **rest: losses.nt_xent_loss(a, b, others=[c], **rest),
    as_module=lambda a, b, c, **rest: losses.NTXentLoss(**rest)(a, b, others=[c]),
    settings={"temperature": 0.5},
)
add_loss(
    losses.nt_xent_loss,
    losses.NTXentLoss,
    plain.nt_xent_bank,
    A,
    B,
    Leaf((7, D)),
    name="nt_xent_loss (bank)",
    call=lambda a, b, bank, **rest: losses.nt_xent_loss(a, b, negatives=bank, **rest),
    as_module=lambda a, b, bank, **rest: losses.NTXentLoss(**rest)(a, b, negatives=bank),
    settings={"temperature": 0.5},
)
add_loss(losses.info_nce_loss, losses.InfoNCELoss, plain.info_nce, A, B, settings={"temperature": 0.1})
add_loss(
    losses.info_nce_loss,
    losses.InfoNCELoss,
    plain.clip,
    A,
    B,
    name="info_nce_loss (symmetric)",
    call=partial(losses.info_nce_loss, symmetric=True),
    as_module=lambda q, k, **rest: losses.InfoNCELoss(symmetric=True, **rest)(q, k),
    settings={"scale": 5.0},
)
add_loss(
    losses.supervised_contrastive_loss,
    losses.SupervisedContrastiveLoss,
    plain.supervised,
    A,
    LABELS,
    settings={"temperature": 0.1},
)
add_loss(losses.sigmoid_loss, losses.SigmoidLoss, plain.sigmoid, A, B, settings={"scale": 10.0, "bias": -10.0})
add_loss(losses.spectral_contrastive_loss, losses.SpectralContrastiveLoss, plain.spectral, A, B, settings={"mu": 1.0})
PAIRED: dict[str, Any] = {"family": "Losses of pairs of rows", "more": POSITIONS}
add_loss(losses.byol_loss, losses.BYOLLoss, plain.byol, A, Leaf((ROWS, D), "data"), **PAIRED)
add_loss(
    losses.simple_contrastive_loss,
    losses.SimpleContrastiveLoss,
    plain.simple_contrastive,
    A,
    B,
    settings={"beta": 0.5},
    **PAIRED,
)
HEAD = Leaf((7, D), "shared")
TAUGHT = Leaf((ROWS, D), "data"), Leaf((7, D), "data")


def every_patch(z: Any, w: Any, y: Any, v: Any, loss: Callable = losses.ibot_patch_loss, **rest: Any) -> Any:
    return loss(z, y, w, v, torch.ones(z.shape[0], 1, dtype=torch.bool, device=z.device), **rest)


TEACHING = {"temperature": 0.5, "teacher_temperature": 0.4}
for public, kind, formula, leaves, call, as_module, settings in (
    (
        losses.swav_loss,
        losses.SwAVLoss,
        plain.swav,
        (A, B, HEAD),
        lambda a, b, w, **rest: losses.swav_loss([a, b], w, **rest),
        lambda a, b, w, **rest: losses.SwAVLoss(**rest)([a, b], w),
        {"temperature": 0.5, "epsilon": 0.4},
    ),
    (
        losses.dino_loss,
        losses.DINOLoss,
        plain.dino,
        (A, B, HEAD, TAUGHT[0], *TAUGHT),
        lambda a, b, w, x, y, v, **rest: losses.dino_loss([a, b], [x, y], w, v, **rest),
        lambda a, b, w, x, y, v, **rest: losses.DINOLoss(7, **rest).eval().to(a.device)([a, b], [x, y], w, v),
        TEACHING,
    ),
    (
        losses.ibot_patch_loss,
        losses.IBOTPatchLoss,
        plain.ibot,
        (A, HEAD, *TAUGHT),
        every_patch,
        lambda *z, **rest: every_patch(*z, loss=losses.IBOTPatchLoss(7, **rest).eval().to(z[0].device)),
        TEACHING,
    ),
    (
        losses.msn_loss,
        losses.MSNLoss,
        plain.msn,
        (A, HEAD, TAUGHT[0]),
        lambda z, w, y, **rest: losses.msn_loss([z], y, w, **rest),
        lambda z, w, y, **rest: losses.MSNLoss(**rest)([z], y, w),
        {"temperature": 0.5, "target_temperature": 0.4},
    ),
):
    add_loss(
        public,
        kind,
        formula,
        *leaves,
        call=call,
        as_module=as_module,
        settings=settings,
        family="Losses over prototypes",
    )

add_loss(
    losses.whitening_mse_loss,
    losses.WhiteningMSELoss,
    spectra.whitening_mse,
    A,
    B,
    call=partial(losses.whitening_mse_loss, eps=0.1),
    as_module=lambda *z, group=None: losses.WhiteningMSELoss(eps=0.1, group=group)(*z),
    more=POSITIONS,
)
SPECTRA: dict[str, Any] = {"family": "Losses of spectra"}
add_loss(
    losses.tico_loss,
    losses.TiCoLoss,
    spectra.tico,
    A,
    B,
    as_module=lambda *z, **rest: losses.TiCoLoss(z[0].shape[1], **rest).to(z[0].device)(*z),
    settings={"rho": 8.0},
    **SPECTRA,
)
for function, kind, formula, settings in (
    (losses.frossl_loss, losses.FroSSLLoss, spectra.frossl, {"invariance_weight": 1.0}),
    (losses.coding_rate_loss, losses.CodingRateLoss, spectra.coding_rate, {"rate_coeff": 1.0, "inv_coeff": 200.0}),
    (losses.mmcr_loss, losses.MMCRLoss, spectra.mmcr, {"lambd": 0.005}),
):
    add_loss(function, kind, formula, A, B, settings=settings, **SPECTRA)


def dense(loss: Callable) -> Callable:
    """VICRegL of two large views, with places of their own."""

    def call(a: Tensor, b: Tensor, c: Tensor, d: Tensor, **rest: Any) -> Tensor:
        grids = [torch.arange(z.shape[0] * 8.0, device=z.device).view(-1, 2, 2, 2).sin() for z in (a, a)]
        return loss([(a, c), (b, d)], [grids[0], grids[1].flip(1)], **rest)

    return call


MAP = Leaf((ROWS, 2, 2, 3))
add_loss(
    losses.vicregl_loss,
    losses.VICRegLLoss,
    dense(lambda features, grids, **rest: spectra.vicregl(features, [g.double() for g in grids], 2, **rest)),
    A,
    B,
    MAP,
    MAP,
    call=dense(losses.vicregl_loss),
    as_module=lambda *z, group=None, **settings: dense(losses.VICRegLLoss(**settings, group=group))(*z),
    settings={"alpha": 0.75},
    **SPECTRA,
)
PROJECTED: dict[str, Any] = {"family": "Losses of random projections"}
add_loss(
    losses.sigreg_loss,
    losses.SIGRegLoss,
    plain.sigreg,
    A,
    call=lambda z, **rest: losses.sigreg_loss(z, directions=plain.directions(z), **rest),
    as_module=lambda z, **rest: losses.SIGRegLoss(**rest)(z, directions=plain.directions(z)),
    more=WHOLE,
    **PROJECTED,
)
add_loss(
    losses.lejepa_loss,
    losses.LeJEPALoss,
    plain.lejepa,
    Leaf((2, ROWS, D)),
    Leaf((3, ROWS, D)),
    call=lambda g, z, **rest: losses.lejepa_loss(g, z, directions=plain.directions(g), **rest),
    as_module=lambda g, z, **rest: losses.LeJEPALoss(**rest)(g, z, directions=plain.directions(g)),
    settings={"lambd": 0.05},
    size=1.0,
    **PROJECTED,
)
