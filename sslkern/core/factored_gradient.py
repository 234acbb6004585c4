"""The gradient of a weight, kept as the factors of a sum of products.

The gradient of the weight of y = x W' is P = dy' x, (q, p), for dy (N, q) and x (N, p). It has rank N at most. A
`FactoredGradient` has the shape, dtype and strides of the weight, but holds dy and x. What follows from the factors is
computed from them: sums, multiples, and the norm, by ||dy' x||^2 = <dy dy', x x'>. Any other operation forms the matrix
first, inside the tensor, which is then an ordinary matrix for the rest of its life. So the tensor is either factored or
formed, nothing that is written to it is lost, and any code that takes gradients can take it.
"""

from __future__ import annotations

from typing import Any

from . import internals
from .factored_operators import HANDLERS, on_formed
from .factored_tensor import FactoredTensor


class FactoredGradient(FactoredTensor):
    """The gradient sum_b scale_b dy_b' x_b of a weight, as factors, or formed. See the module.

    `torch.optim`, hooks, `torch.nn.utils.clip_grad_norm_` and GradScaler take it like any gradient. `sslkern.optim`
    moves a weight by its factors.
    """

    __torch_function__ = internals.no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: tuple = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return on_formed(func, args, kwargs)
