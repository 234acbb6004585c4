"""lightly's VICRegL loss."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor, nn

from ....losses import vicregl_loss
from .._peers import promoted, shown, world
from .vicreg_loss import VICRegLoss

Features = Sequence[tuple[Tensor, Tensor]]


class VICRegLLoss(nn.Module):
    """lightly's `VICRegLLoss`: `sslkern.losses.vicregl_loss`. The loss has shape (1,), as in lightly.

    Args:
        lambda_param, mu_param, nu_param: the weights of invariance, variance and covariance. The covariance of matched
            features has half the weight.
        alpha: the weight of the global loss; that of the local loss is 1 - alpha.
        gather_distributed: compute variance and covariance from the rows of all processes, if torch.distributed is
            initialised.
        eps: a number >= 0, added to the variances.
        num_matches: how many matches of a global view, and of the other view, are kept. None and -1 keep all.

    Attributes:
        vicreg_loss: the `VICRegLoss` of matched features, as in lightly. It is not called.

    Raises:
        ValueError: torch has no distributed package and `gather_distributed` is True, or features and grids do not fit.

    Source: Bardes, Ponce and LeCun, VICRegL (2210.01571).
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        alpha: float = 0.75,
        gather_distributed: bool = False,
        eps: float = 0.0001,
        num_matches: tuple[int, int] = (20, 4),
    ) -> None:
        super().__init__()
        self.alpha, self.num_matches = alpha, num_matches
        self.lambda_param, self.mu_param, self.nu_param = lambda_param, mu_param, nu_param
        self.eps, self.gather_distributed = eps, gather_distributed
        self.vicreg_loss = VICRegLoss(
            lambda_param=lambda_param,
            mu_param=mu_param,
            nu_param=0.5 * nu_param,
            eps=eps,
            gather_distributed=gather_distributed,
        )

    def forward(
        self,
        global_view_features: Features,
        global_view_grids: Sequence[Tensor],
        local_view_features: Features | None = None,
        local_view_grids: Sequence[Tensor] | None = None,
    ) -> Tensor:
        if (local_view_features is None) != (local_view_grids is None):
            raise ValueError(
                "local_view_features and local_view_grids must both be given or both be None, got "
                f"{type(local_view_features).__name__} and {type(local_view_grids).__name__}."
            )
        large, small = list(global_view_features), list(local_view_features or ())
        tensors = iter(promoted(*(tensor for view in (*large, *small) for tensor in view)))
        views = list(zip(tensors, tensors, strict=True))
        loss = vicregl_loss(
            views[: len(large)],
            list(global_view_grids),
            views[len(large) :],
            list(local_view_grids or ()),
            self.lambda_param,
            self.mu_param,
            self.nu_param,
            alpha=self.alpha,
            num_matches=tuple(sys.maxsize if k in (None, -1) else k for k in self.num_matches),  # type: ignore[arg-type]
            eps=self.eps,
            group=world(self.gather_distributed),
        )
        return loss.reshape(1)

    def extra_repr(self) -> str:
        return shown(self, "lambda_param", "mu_param", "nu_param", "alpha", "gather_distributed", "eps", "num_matches")
