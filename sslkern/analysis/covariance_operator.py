"""Covariance operators: by which linear map contrastive losses and BYOL update the weight of a layer."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn

from ..core import checks
from ..core.dtypes import short
from ._connection import Connection
from ._layer_operator import CovarianceOperator, Mixing, Part
from ._networks import kind

Pairs = Literal["all", "distinct"]


def covariance_operator(
    net: nn.Module,
    views: Tensor | list[Tensor],
    layer: str | None = None,
    *,
    beta: float = 0.0,
    weights: Tensor | None = None,
    pairs: Pairs = "all",
    chunk_size: int | None = None,
) -> CovarianceOperator:
    r"""The covariance operator of a layer: the linear map by which a contrastive loss updates its weight.

    For the layer with the weight W and an input x, K(x)' is the derivative of the network's outputs f(x) with respect
    to vec(W), an (D, n) matrix. In a network of linear layers and ReLUs, K is the Kronecker product of the layer's
    input with the Jacobian from the layer's output to f. With Kbar_i the mean of K over the views of sample i,

        OP = 2 Cov_i[Kbar_i] - 2 beta mean_i Var_views[K_i],    Cov_i with denominator N - 1, Var_views with V

    The negative gradient of `losses.simple_contrastive_loss(a, b, beta)`, averaged over all pairs (a, b) of views, is

        update() = 2 Cov_i[Kbar_i, fbar_i] - 2 beta mean_i Cov_views[K_i, f_i],

    for every network. It equals the product OP vec(W) if f(x) = K(x)' vec(W) + constant. That holds

        for the last layer, always, if it is linear: its input may be any function, and its bias is the constant;
        for another layer, if all that follows is linear or homogeneous of degree one (ReLU, leaky ReLU, pooling,
            residual blocks of these), no shortcut leads around the layer, and neither the layer nor a later one has a
            bias, except the last one of the network. Layers before it may have biases and be of any kind.

    Batch norm in evaluation mode has a bias unless it subtracts and adds nothing. Where the condition fails, OP is
    still defined by the derivative K, and `apply()` and `update()` differ.

    K is not formed. `apply` differentiates all outputs along W, centres the view means, and goes back: the cost of a
    few backward passes through the layers from W on, and O(V N D) memory beside the recorded graph.

    Args:
        net: a module from (rows, ...) to (rows, ...) that treats rows independently. It runs in evaluation mode.
            Compiled and DistributedDataParallel modules are unwrapped. Output dimensions beyond the first are
            flattened. Its state is left as it was, and copied, so later training does not change the operator.
        views: (V, N, ...), V views of N >= 2 samples, or a list of V tensors (N, ...), on the device of net, in the
            dtype of the weight or of integers.
        layer: the name of a layer with a parameter `weight`, as in `named_modules`, or of a parameter. None is the last
            layer with a weight of two or more dimensions. The weight must be float32 or float64.
        beta: an additional weight of the positive pairs, a finite number.
        weights: (N, N), a weight w_ij for sample i with its negative j. The operator is then
            sum_ij w_ij (Kbar_i - Kbar_j)(Kbar_i - Kbar_j)', which is 2 Cov_i[Kbar_i] for w_ij = 1/(N (N - 1)). The loss
            is sum_ij w_ij (r+_i - r-_ij), with squared distances r and w held fixed; `update()` is its gradient for
            symmetric w, or without augmentation (V = 1). For InfoNCE with temperature t and logits -|f_i - f_j|^2/(2t),
            w_ij is the probability that it gives to the negative j, divided by N t.
        pairs: "all" averages over all ordered pairs of views, a view with itself included, as if both were drawn
            independently from V equally likely augmentations; the operator is positive semidefinite for beta = 0.
            "distinct" leaves a view with itself out, as a training step does: for two views, `update()` is the negative
            gradient of `simple_contrastive_loss(a, b, beta)`.
        chunk_size: None keeps the graph of all V N rows for all products. A number takes so many rows at a time and
            records their graph for each product, which needs less memory and more time.

    Returns:
        A `CovarianceOperator`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range; the layer does not exist,
        has no weight, or is not used; batch norm has no running statistics; or net is not twice differentiable.

    Source: Tian, Yu, Chen and Ganguli, Understanding self-supervised learning with dual deep networks (2010.00578).
    """
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not abs(beta) < float("inf"):
        raise ValueError(f"beta must be a finite number, got {checks.got(beta)}.")
    connection = _connect(net, views, layer, pairs, chunk_size)
    v, n = connection.counts
    mixing: Mixing = "centre" if weights is None else _laplacian(weights, n, connection.weight)
    scale = 2 / (n - 1) if weights is None else 1.0
    within = [Part(-2 * beta / n * (1.0 if pairs == "all" else v / (v - 1)))] if beta else []
    if pairs == "distinct":
        within.append(Part(-scale / (v - 1), mixing))
    connection.record()
    return CovarianceOperator(connection, (Part(scale, mixing),), tuple(within))


def byol_covariance_operator(
    net: nn.Module,
    predictor: float | Tensor | nn.Linear,
    views: Tensor | list[Tensor],
    layer: str | None = None,
    *,
    batch_norm: bool = True,
    pairs: Pairs = "all",
    chunk_size: int | None = None,
) -> CovarianceOperator:
    r"""The linear map by which BYOL updates the weight of a layer, with a linear predictor P.

        OP = mean_i Kbar_i P'(I - P) Kbar_i' - mean_iv (K_iv - Kbar_i) P'P (K_iv - Kbar_i)'

    K_iv belongs to view v of sample i, and Kbar_i is the mean of the views; see `covariance_operator`. For P = p I the
    terms are p (1 - p) E[Kbar Kbar'] and -p^2 E Var_views[K]. With batch norm, Kbar is centred, and the first term is
    p (1 - p) Cov_i[Kbar_i], with denominator N: an implicit contrastive term, without negatives in the loss. Without a
    predictor (P = I) it is zero. Only the second term is left, which shrinks what differs between the views. Without
    batch norm, the first term is there, but it is no covariance: it also grows what all samples share.

    This is the negative gradient of BYOL's loss with the outputs of net not normalised,

        loss = 1/2 mean |P c(f(x)) - sg c(f(x'))|^2, sg: stop-gradient

    over all pairs of views x, x' of a sample (see `pairs` of `covariance_operator`), under these assumptions:

        the target network is the online network: there is no moving average;
        the predictor is linear, and it is not part of the layer;
        batch norm stands at the end of net, and only its centring c over all V N rows counts, not its scaling.
            Centring in the backward alone gives the same operator.

    `update()` is this negative gradient for every network. `apply()` equals it under the conditions of
    `covariance_operator`; without batch norm, the bias of the last layer must be zero too.

    Args:
        net: the online network up to the predictor, without the batch norm at its end.
        predictor: a number p for P = p I, where 1 means no predictor; or P, a (D, D) tensor, applied as z P'; or an
            nn.Linear with D inputs and outputs. Its bias must be None without batch norm, and has no effect with it.
        views, layer, pairs, chunk_size: as in `covariance_operator`.
        batch_norm: whether the outputs are centred.

    Returns:
        A `CovarianceOperator`. It is symmetric if P is.

    Raises:
        TypeError, ValueError: as `covariance_operator`, or for a predictor of another type, shape, dtype or device.

    Source: Tian, Yu, Chen and Ganguli, Understanding self-supervised learning with dual deep networks (2010.00578).
    """
    if not isinstance(batch_norm, bool):
        raise TypeError(f"batch_norm must be a bool, got {checks.got(batch_norm)}.")
    _check_predictor(predictor, batch_norm)
    connection = _connect(net, views, layer, pairs, chunk_size)
    v, n = connection.counts
    p = _matrix(predictor, connection.record())
    mixing: Mixing = "centre" if batch_norm else None
    own = 0.0 if pairs == "all" else 1 / (v - 1)  # what a view lacks in the mean of the other views
    if isinstance(p, Tensor):
        square = p.mT @ p
        between, within = Part(1 / n, mixing, p - square), Part(-1 / n, None, square + own * p)
    else:
        between, within = Part(p * (1 - p) / n, mixing), Part(-p * (p + own) / n)
    return CovarianceOperator(connection, (between,), (within,))


def _connect(net: Any, views: Any, layer: Any, pairs: Any, chunk_size: Any) -> Connection:
    checks.one_of("pairs", pairs, get_args(Pairs))
    connection = Connection(net, views, layer, chunk_size)
    if pairs == "distinct" and connection.counts[0] < 2:
        raise ValueError(f"pairs='distinct' needs at least two views, got {connection.counts[0]}.")
    return connection


def _laplacian(weights: Any, n: int, like: Tensor) -> Tensor:
    """The matrix L with x'L y = sum_ij w_ij (x_i - x_j)(y_i - y_j), in the dtype of `like`."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a torch.Tensor of shape ({n}, {n}) or None, got {kind(weights)}.")
    if weights.shape != (n, n) or weights.device != like.device:
        raise ValueError(
            f"weights must have shape ({n}, {n}) and be on {like.device}, "
            f"got {tuple(weights.shape)} on {weights.device}."
        )
    if not weights.isfinite().all():
        raise ValueError("weights must be finite, but they contain NaN or infinity.")
    both = weights.detach().to(like.dtype)
    both = both + both.mT
    return both.sum(1).diag() - both


def _check_predictor(predictor: Any, batch_norm: bool) -> None:
    if isinstance(predictor, nn.Linear):
        if predictor.bias is not None and not batch_norm:
            raise ValueError("predictor must have no bias without batch norm: the update would not be linear.")
    elif not isinstance(predictor, Tensor):
        if isinstance(predictor, bool) or not isinstance(predictor, int | float):
            raise TypeError(f"predictor must be a number, a torch.Tensor or a torch.nn.Linear, got {kind(predictor)}.")
        if not abs(predictor) < float("inf"):
            raise ValueError(f"predictor must be finite, got {predictor!r}.")


def _matrix(predictor: float | Tensor | nn.Linear, outputs: Tensor) -> float | Tensor:
    """The predictor as a number p, or as a matrix P of the outputs' columns, dtype and device."""
    p = predictor.weight if isinstance(predictor, nn.Linear) else predictor
    if not isinstance(p, Tensor):
        return float(p)
    d = outputs.shape[-1]
    if p.shape != (d, d) or p.device != outputs.device:
        raise ValueError(
            f"predictor must have shape ({d}, {d}) and be on {outputs.device}, got {tuple(p.shape)} on {p.device}."
        )
    if p.dtype != outputs.dtype:
        raise TypeError(f"predictor must have the dtype of net, {short(outputs.dtype)}, got {short(p.dtype)}.")
    return p.detach().clone()
