"""ProjUNN: gradient descent over orthogonal and unitary matrices with low-rank steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import FULL, HALF
from ..core.factored_gradient import FactoredGradient
from ..ops.rank_k_update import Retraction, rank_k_update_
from . import _layer_factors as layer_factors
from ._checked import CheckedOptimizer, check_decay, check_lr, value_of
from .factors import Method, low_rank_factors
from .moments import AGES, SecondMoment, directions_of
from .orthogonality import off_orthonormal, reorthogonalize_
from .stacks import stack, unstack

_STACKED = 128 * 128  # matrices with more elements are not stacked: the call overhead does not matter for them
_NEAR = 1e-5  # up to this, an orthogonality error counts as rounding drift


class ProjUNN(CheckedOptimizer):
    r"""An optimizer that keeps the columns of its parameters orthonormal, in O(k n p) per step.

        m <- momentum m + g                                 momentum as in torch.optim.SGD; g is the gradient
        d = m                                               or d = g + momentum m with `nesterov`
        v <- beta2 v + (1 - beta2) |g|^2                    only with `second_moment`
        d <- (1 - momentum) d / (sqrt(v) + eps)             only with `second_moment`
        U <- retraction of U - lr left right^H              left right^H: rank-k approximation of d's tangent part

    With `second_moment`, d is the direction of Adam with bias correction, or of RMSprop if there is no momentum.
    `low_rank_factors` computes left and right.

    Parameters are stacks of matrices (..., n, p), n >= p, real or complex, whose columns must be orthonormal at first.
    `sslkern.ops.rank_k_update_` keeps the columns orthonormal. bfloat16 and float16 are too coarse for orthogonality: a
    parameter of these dtypes is a rounded copy of a float32 master, which is the entry "master" of its state. Each step
    overwrites whatever else was written to such a parameter. There is no weight decay, because it would add a matrix of
    rank n to a gradient of rank k, and because the norm of a matrix with orthonormal columns is fixed.

    Layers with `factored=True` keep the factors of their gradient instead of the gradient. With the method "sketch",
    and without momentum and second moments, a step takes the factors and forms no n x p matrix. With other options it
    forms the gradient.

    Random numbers depend only on `seed` and the step count of a parameter, so a run that resumes from a state_dict
    continues bit for bit. Matrices of the same shape use the same random numbers, whether or not they are stacked.

    Args:
        params: an iterable of parameters, or of groups with their own options.
        lr: the step length, a number or a one-element tensor. A step of norm 0.1 is long. With `second_moment`, d has
            a norm of sqrt(n p).
        rank: k, the rank of every step. Larger values are reduced to min(n, p), with which a step uses all of d.
        retraction: "tangent" (projUNN-T, square matrices only), "direct" (projUNN-D) or "cayley".
        momentum: a number in [0, 1).
        nesterov: whether to use Nesterov momentum.
        second_moment: None, "scalar" or "elementwise". "scalar" is the mean of |g|^2 over each matrix, which keeps the
            rank of a gradient. "elementwise" is the moment of RMSprop and Adam, which does not keep the rank, so that a
            step with a small k follows less of the gradient.
        beta2: the decay of the second moment, in [0, 1).
        eps: added to the square root of the second moment, in units of the gradient.
        method: the method of `low_rank_factors`: "sketch", "columns" or "svd".
        warm_start: whether a sketch starts from the right factor of the last step, as in PowerSGD. This is more
            accurate at the same cost.
        riemannian: whether to factor only the tangent part of d. False reads less memory per step, but spends some of
            the rank on the rest of d. This rest does not move U and need not vanish at an optimum, so descent stops
            early.
        reorthogonalize_every: m: after every m-th step, `reorthogonalize_` corrects m directions. This keeps float32
            parameters within about 4e-8 sqrt(p / 2) of orthonormal, and costs 10 n p operations per step on average
            for any m. None turns it off.
        seed: the seed of all random numbers.
        foreach: whether to update parameters of the same shape, dtype and device as a stack, in one call. None means
            True for matrices of up to 128 x 128 elements.
        weight_decay: must be 0.0. The argument exists only to give a clear error message.

    Raises:
        TypeError, ValueError: an option is out of range, a parameter is a vector or has more columns than rows, a
        parameter is not square with "tangent", or there is weight decay. In the first step of a parameter, its columns
        are not orthonormal. RuntimeError: in a step, a gradient is sparse, or what a layer kept of it was modified.

    Sources: Kiani et al., projUNN: efficient method for training deep networks with unitary matrices (2203.05483); for
    the warm start, Vogels et al., PowerSGD (1905.13727).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        rank: int = 1,
        retraction: Retraction = "tangent",
        momentum: float = 0.0,
        nesterov: bool = False,
        second_moment: SecondMoment | None = None,
        beta2: float = 0.99,
        eps: float = 1e-12,
        method: Method = "sketch",
        warm_start: bool = True,
        riemannian: bool = True,
        reorthogonalize_every: int | None = 32,
        seed: int = 0,
        foreach: bool | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "retraction": retraction,
            "momentum": momentum,
            "nesterov": nesterov,
            "second_moment": second_moment,
            "beta2": beta2,
            "eps": eps,
            "method": method,
            "warm_start": warm_start,
            "riemannian": riemannian,
            "reorthogonalize_every": reorthogonalize_every,
            "seed": seed,
            "foreach": foreach,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:
        """Check the options and the parameters of a group."""
        _check(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Return the value of `closure`, run with grad."""
        loss = value_of(closure)
        moving = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for group, params in zip(self.param_groups, moving, strict=True):
            for p in params:
                if p.grad.layout != torch.strided:
                    raise RuntimeError(f"ProjUNN does not support sparse gradients, got layout {p.grad.layout}.")
                if isinstance(p.grad, FactoredGradient):
                    p.grad.check()
                self._initialize(group, p)
        for group, params in zip(self.param_groups, moving, strict=True):
            for together in self._stacks(group, params):
                self._step(group, together)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same as in torch.optim.Optimizer, but without casting the state to the dtypes of the parameters."""
        super().load_state_dict(state_dict)
        saved, ours = (
            chain.from_iterable(g["params"] for g in x) for x in (state_dict["param_groups"], self.param_groups)
        )
        for index, p in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)

    def _stacks(self, group: dict[str, Any], params: list[Tensor]) -> Iterable[list[Tensor]]:
        """Lists of parameters that one call can update, with the same matrix shape, dtype, device and step counts."""
        stacks: dict[tuple, list[Tensor]] = {}
        for p in params:
            stacked = group["foreach"]
            if stacked is None:
                stacked = p.shape[-2] * p.shape[-1] <= _STACKED
            stacked = stacked and layer_factors.usable(p, group) is None
            ages = tuple(self.state[p].get(name, 0) for name in ("step", *AGES.values()))
            key = (p.shape[-2:], p.dtype, p.device, ages) if stacked else (p,)
            stacks.setdefault(key, []).append(p)
        return stacks.values()

    def _initialize(self, group: dict[str, Any], p: Tensor) -> None:
        """Create or update the state of a parameter. In its first step, check that its columns are orthonormal."""
        state = self.state[p]
        half = p.dtype in HALF
        if "step" not in state or half != ("master" in state):  # p is new, or its precision has changed
            state.pop("master", None)
            u = p.float() if half else p
            if off_orthonormal(u) > _NEAR:
                for _ in range(3):  # reduces the error of bfloat16: 2e-3, 3e-6, 7e-12
                    reorthogonalize_(u)
            if u is not p:
                state["master"] = u
            state.setdefault("step", 0)
        u = state.get("master", p)
        wanted: dict[str, Any] = {}
        k = min(group["rank"], u.shape[-1])
        if _warm(group):
            wanted["right"] = (*u.shape[:-2], u.shape[-1], k), u.dtype
        if group["momentum"]:
            wanted["momentum_buffer"] = u.shape, u.dtype
        if group["second_moment"] == "scalar":
            wanted["square_avg"] = (*u.shape[:-2], 1, 1), torch.float64
        elif group["second_moment"] == "elementwise":
            wanted["square_avg"] = u.shape, u.dtype.to_real()
        for name, (shape, dtype) in wanted.items():  # options may change between steps
            if name not in state or state[name].shape != shape:
                state[name] = torch.zeros(shape, dtype=dtype, device=u.device)
                if name in AGES:
                    state[AGES[name]] = 0
            state[name] = state[name].to(dtype)

    def _step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        for state in states:
            for name in ("step", *AGES.values()):
                if name in state:
                    state[name] += 1
        step = states[0]["step"]
        targets = [state.get("master", p) for p, state in zip(params, states, strict=True)]
        generator = torch.Generator(params[0].device).manual_seed((group["seed"] + step * 0x9E3779B1) % 2**63)

        u = stack(targets)
        scale: Tensor | float = 1.0
        last = [state["right"] for state in states] if _warm(group) else []
        warm, point = stack(last) if last else None, u if group["riemannian"] else None
        factors = layer_factors.usable(params[0], group)
        if factors is not None:
            left, right = layer_factors.take(factors, u, group["rank"], warm, generator, group["riemannian"])
        else:
            grads = [_formed(p).to(u.dtype) for p in params]
            directions, scales = directions_of(group, grads, states)
            scale = stack(scales) if scales else 1.0
            left, right = low_rank_factors(stack(directions), group["rank"], group["method"], warm, generator, u=point)
        if last:
            unstack(last, right)
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        rank_k_update_(u, left, (right * (-lr * scale)).to(u.dtype), group["retraction"])
        every = group["reorthogonalize_every"]
        if every and step % every == 0:
            reorthogonalize_(u, every, generator)
        unstack(targets, u)
        for p, target in zip(params, targets, strict=True):
            if target is not p:
                p.copy_(target)


def _formed(p: Tensor) -> Any:
    return p.grad.form_() if isinstance(p.grad, FactoredGradient) else p.grad


def _check(group: dict[str, Any]) -> None:
    """Check the options and the parameters of a group."""
    check_lr(group["lr"])
    checks.non_negative("eps", group["eps"])
    for name in ("momentum", "beta2"):
        check_decay(name, group[name])
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov=True needs momentum > 0.")
    checks.one_of("retraction", group["retraction"], get_args(Retraction))
    checks.one_of("method", group["method"], get_args(Method))
    if group["second_moment"] is not None and group["second_moment"] not in get_args(SecondMoment):
        raise ValueError(f"second_moment must be None, 'scalar' or 'elementwise', got {group['second_moment']!r}.")
    checks.positive("rank", group["rank"])
    if group["reorthogonalize_every"] is not None:
        checks.positive("reorthogonalize_every", group["reorthogonalize_every"])
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
        raise TypeError(f"seed must be an integer, got {type(group['seed']).__name__}.")
    if group["weight_decay"] != 0:
        raise ValueError(
            "ProjUNN takes no weight_decay: it would add rank n to a low-rank step, and the norm of a matrix with "
            "orthonormal columns is fixed."
        )
    for p in group["params"]:
        checks.orthonormal("A parameter of ProjUNN", p, FULL + HALF)
        if group["retraction"] == "tangent" and p.shape[-2] != p.shape[-1]:
            raise ValueError(
                f"A parameter of ProjUNN must be square for 'tangent', got shape {tuple(p.shape)}: "
                "use 'direct' or 'cayley'."
            )


def _warm(group: dict[str, Any]) -> bool:
    return group["method"] == "sketch" and group["warm_start"]
