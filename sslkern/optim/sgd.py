"""SGD that moves weights by the factors of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.factored_gradient import FactoredGradient
from ..ops.factored_update import factored_update_
from . import _factored_steps as steps


class SGD(steps.FactoredSteps, torch.optim.SGD):
    r"""torch.optim.SGD, which also takes the factored gradients of `sslkern.nn.FactoredLinear`.

        g <- P + weight_decay W                   P is the gradient, or its negative with `maximize`
        m <- momentum m + (1 - dampening) g       m <- g in the first step
        W <- W - lr m                             or W - lr (g + momentum m) with `nesterov`

    A weight with a factored gradient P = dy' x is moved in one pass over W and m, and P is never formed. All other
    parameters take torch's own step. Arguments, defaults, errors and the state_dict are those of torch.optim.SGD, so a
    run can go on from a state_dict of either. A GradScaler unscales the factors.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning (ICML 2013), as
    torch.optim.SGD has it.
    """

    _of_torch = torch.optim.SGD

    def move(self, group: dict[str, Any], p: Tensor, grad: FactoredGradient) -> None:
        """Update a parameter by the factors of its gradient."""
        dy, x, scale = grad.stacked()
        s = steps.one_number(scale)
        s, lr, decay, momentum = -s if group["maximize"] else s, group["lr"], group["weight_decay"], group["momentum"]
        if momentum == 0:
            factored_update_(p, [], dy, x, self._numbers(p, (0, 0, 0, 1 - lr * decay, 0, -lr * s)))
            return
        state = self.state[p]
        old, new = momentum, 1 - group["dampening"]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"], old, new = torch.zeros_like(p), 0.0, 1.0
        of_w, of_m, of_p = (1 - lr * decay, -lr * momentum, -lr * s) if group["nesterov"] else (1.0, -lr, 0.0)
        numbers = (old, new * s, new * decay, of_w, of_m, of_p)
        factored_update_(p, [state["momentum_buffer"]], dy, x, self._numbers(p, numbers))
