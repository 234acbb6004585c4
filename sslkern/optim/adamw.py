"""AdamW that moves weights by the factors of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.factored_gradient import FactoredGradient
from ..ops.factored_update import factored_update_
from . import _factored_steps as steps


class AdamW(steps.FactoredSteps, torch.optim.AdamW):
    r"""torch.optim.AdamW, which also takes the factored gradients of `sslkern.nn.FactoredLinear`.

        m <- beta1 m + (1 - beta1) P              P is the gradient, or its negative with `maximize`
        v <- beta2 v + (1 - beta2) P^2
        W <- (1 - lr weight_decay) W - lr m' / (sqrt(v') + eps),   m' = m / (1 - beta1^t), v' = v / (1 - beta2^t)

    A weight with a factored gradient P = dy' x is moved in one pass over W, m and v, and P is never formed. All other
    parameters take torch's own step. Arguments, defaults, errors and the state_dict are those of torch.optim.AdamW, so
    a run can go on from a state_dict of either. A GradScaler unscales the factors.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization (1711.05101).
    """

    _of_torch = torch.optim.AdamW

    def move(self, group: dict[str, Any], p: Tensor, grad: FactoredGradient) -> None:
        """Update a parameter by the factors of its gradient."""
        dy, x, scale = grad.stacked()
        state = self.state[p]
        if not state:
            on_device = group["capturable"] or group["fused"]
            kind = torch.float32 if group["fused"] or torch.get_default_dtype() != torch.float64 else torch.float64
            state["step"] = torch.zeros((), dtype=kind, device=p.device if on_device else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        t = state["step"].double() if state["step"].device.type != "cpu" else state["step"].item()
        (beta1, beta2), lr, s = group["betas"], group["lr"], steps.one_number(scale)
        numbers = (
            -s if group["maximize"] else s,
            1 - beta1,
            beta2,
            1 - beta2,
            1 - lr * group["weight_decay"],
            lr / (1 - beta1**t),
            (1 - beta2**t) ** -0.5,
            group["eps"],
        )
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        factored_update_(p, [state[name] for name in names], dy, x, self._numbers(p, numbers), "adam")
