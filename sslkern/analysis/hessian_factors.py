"""The Hessian of the squared error in the weight of one layer of a piecewise affine network, as a product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core import checks
from ..core.dtypes import without_autocast
from ._linearized import Linearized, differentiable, frozen, recording, shown, versions
from ._networks import check_point, inputs, kind, module
from ._operators import Operator
from ._piecewise import check_piecewise
from .conditioning import ExtremeSingularValues, extreme_singular_values, not_converged


class HessianFactors:
    """The Hessian H = R'R, (P, P), of P weights; `hessian_factors` returns it.

    R = 2^(1/2) J, where J, (N q, P), is the derivative of the q outputs of N samples in the weight. A product with H
    costs about two backward passes. The products use the weights that the network had: changing them in place makes
    later products raise an error.

    Attributes:
        shape: (P, P).
        weight_shape: of the weight, whose rows follow each other in the P weights.
        rank_bound: min(N q, P); the rank of H is at most this.
        inputs: the inputs of the layer, (N, ..., d).
    """

    def __init__(self, net: nn.Module, layer: nn.Module, x: Tensor) -> None:
        self._net, self._layer, self._x = net, layer, x.detach().clone()
        self._versions = versions(net)
        weight: Any = layer.weight
        name = next(name for name, p in net.named_parameters() if p is weight)
        with differentiable(net, x.device), recording(layer) as calls:
            state = frozen(net)
            self._map = Linearized(lambda w: functional_call(net, state | {name: w}, (self._x.clone(),)), weight)
            if not calls:
                raise ValueError("layer must be used by net for x, but it is not called.")
            if self._map.curved():
                check_piecewise("net", net)
                raise ValueError(
                    "net must be piecewise affine in the weight of layer, but its derivative changes with the weight: "
                    "the weight is used more than once, or a later part is not piecewise affine."
                )
        self.inputs: Tensor = calls[0].detach()
        self.weight_shape = tuple(weight.shape)
        p, outputs = weight.numel(), self._map.value.numel()
        self.shape, self.rank_bound = (p, p), min(p, outputs)
        self.dtype, self.device = weight.dtype, weight.device

    def __repr__(self) -> str:
        return f"HessianFactors(shape={self.shape}, rank_bound={self.rank_bound}, dtype={self.dtype})"

    def matvec(self, v: Tensor) -> Tensor:
        """H v for v in the shape of the weight, or of shape (P,)."""
        if not isinstance(v, Tensor) or tuple(v.shape) not in (self.weight_shape, self.shape[:1]):
            raise ValueError(f"v must have shape {self.weight_shape} or {self.shape[:1]}, got {shown(v)}.")
        return self.matmat(v.reshape(-1, 1)).reshape(v.shape)

    def matmat(self, v: Tensor) -> Tensor:
        """H V, (P, k), for V of shape (P, k)."""
        root = self.root
        return root.rmatmat(root.matmat(v))

    @property
    def root(self) -> Operator:
        """R, (N q, P), as `extreme_singular_values` accepts it. Its singular values are the roots of those of H."""
        shape = (self._map.value.numel(), self.shape[0])
        return Operator(shape, self.dtype, self.device, self._push, self._pull)

    def matrix(self) -> Tensor:
        """H, (P, P), from R as a matrix of N q P numbers."""
        root = self.root.dense()
        with without_autocast(root):
            return root.mT @ root

    def maps(self) -> Tensor:
        """M, (N, q, d_out): the derivative of a sample's outputs in its outputs of the layer, before any activation.

        With the inputs x_i of the layer, H = 2 sum_i (M_i'M_i) (x) (x_i x_i'). For a `torch.nn.Linear` whose input is
        (N, d), and a network whose rows do not depend on each other.
        """
        if not isinstance(self._layer, nn.Linear) or self.inputs.dim() != 2 or len(self.inputs) != len(self._x):
            raise ValueError(
                f"maps needs a torch.nn.Linear whose input has shape ({len(self._x)}, d), got "
                f"{type(self._layer).__name__} with input {tuple(self.inputs.shape)}."
            )
        self._check_weights()
        moved = self.inputs.new_zeros(len(self.inputs), self._layer.out_features)
        with differentiable(self._net, self.device):
            state = frozen(self._net)

            def outputs(move: Tensor) -> Tensor:
                with recording(self._layer, move):
                    out: Tensor = functional_call(self._net, state, (self._x.clone(),))
                    return out.reshape(len(moved), -1)

            found = Linearized(outputs, moved)
        q = found.value.shape[1]
        rows = torch.eye(q, dtype=self.dtype, device=self.device)[:, None].expand(q, len(moved), q)
        return found.pull(rows).movedim(0, 1)

    def extreme_singular_values(self, k: int = 1, **settings: Any) -> ExtremeSingularValues:
        """The k largest and the k smallest eigenvalues of H, which are its singular values, from those of R.

        The settings are those of the function `extreme_singular_values`. R has the root of the condition of H, so this
        takes fewer products than H itself. P - N q zeros are known if there are more weights than outputs.
        """
        checks.positive("k", k)
        if k > self.shape[0]:
            raise ValueError(f"k must be at most {self.shape[0]}, the number of weights, got {k}.")
        found = extreme_singular_values(self.root, min(k, self.rank_bound), **settings)
        zeros = found.largest.new_zeros(min(k, self.shape[0] - self.rank_bound))
        large, small = found.largest, found.smallest
        off_large, off_small = (
            (2 * s + r) * r for s, r in ((large, found.largest_residuals), (small, found.smallest_residuals))
        )
        return ExtremeSingularValues(
            torch.cat([large**2, zeros])[:k],
            torch.cat([zeros, small**2])[:k],
            torch.cat([off_large, zeros])[:k],
            torch.cat([zeros, off_small])[:k],
            found.largest_converged,
            found.smallest_converged or len(zeros) >= k,
            found.n_products,
            (self.shape[0], self.shape[0]),
            found.method,
        )

    def condition(self, **settings: Any) -> float:
        """The largest over the smallest eigenvalue of H; infinity if N q < P, where H is singular.

        Raises a RuntimeError if Lanczos' method did not converge.
        """
        if self.rank_bound < self.shape[0]:
            return float("inf")
        found = self.extreme_singular_values(**settings)
        if not found.converged:
            raise RuntimeError(not_converged(found))
        return found.condition

    def as_operator(self) -> Operator:
        """H itself, as the function `extreme_singular_values` uses it."""
        return Operator((self.shape[0], self.shape[0]), self.dtype, self.device, self.matmat, self.matmat)

    def _push(self, v: Tensor) -> Tensor:
        stack = self._columns(v, self.shape[0]).reshape(-1, *self.weight_shape)
        return 2**0.5 * self._map.push(stack).reshape(len(stack), -1).mT

    def _pull(self, u: Tensor) -> Tensor:
        stack = self._columns(u, self._map.value.numel()).reshape(-1, *self._map.value.shape)
        return 2**0.5 * self._map.pull(stack).reshape(len(stack), -1).mT

    def _columns(self, v: Any, rows: int) -> Tensor:
        self._check_weights()
        if not isinstance(v, Tensor) or v.dim() != 2 or v.shape[0] != rows:
            raise ValueError(f"v must have shape ({rows}, k), got {shown(v)}.")
        checks.alike("v", v, "x", self._x)
        return v.detach().mT

    def _check_weights(self) -> None:
        if versions(self._net) != self._versions:
            raise RuntimeError("the weights of net have changed: call hessian_factors again.")


def hessian_factors(net: nn.Module, layer: nn.Module | str, x: Tensor) -> HessianFactors:
    r"""The Hessian of the squared error sum_i |net(x_i) - y_i|^2 in the weight of one layer, as a product.

    If what follows the layer is piecewise affine, the squared error is piecewise quadratic in its weight W, with the
    same Hessian for all targets y. For a layer z = W h with inputs h_i, it is

        H = 2 sum_i (D_i M_i'M_i D_i) (x) (h_i h_i'),

    where D_i is the slope of the activation at z_i and M_i the map from there to the outputs. The general form, also
    for convolutions, is H = R'R with R = 2^(1/2) d net(x)/dW. Products with R and R' are passes through the network, so
    H is not formed. For the mean of the squares, divide by the number of outputs.

    Args:
        net: a module, which runs in evaluation mode and is then set back to its mode. A compiled or DDP-wrapped module
            is unwrapped. Nothing in it changes.
        layer: a layer of net with a parameter `weight`, or its name in `net.named_modules()`. The network must be
            piecewise affine in this weight, so it must use the weight once.
        x: the samples, (N, ...), N >= 1, float32 or float64 as the parameters of net, on their device.

    Returns:
        A `HessianFactors`. At a border of two pieces, it has the derivative that autograd chooses.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or is not finite; layer is not in
        net, or the network is not piecewise affine in its weight.

    Source: Riedi, Balestriero and Baraniuk, Singular value perturbation and deep network optimization (2203.03099).
    """
    net = module("net", net)
    layer = _layer(net, layer)
    inputs("x", x)
    check_point(net, x)
    return HessianFactors(net, layer, x)


def _layer(net: nn.Module, layer: Any) -> nn.Module:
    names = dict(net.named_modules())
    if isinstance(layer, str):
        if layer not in names:
            raise ValueError(f"layer must be a layer of net or its name, got {layer!r}, which net has not.")
        layer = names[layer]
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a layer of net or its name, got {kind(layer)}.")
    if all(part is not layer for part in names.values()):
        raise ValueError(f"layer must be a layer of net, but net does not contain this {type(layer).__name__}.")
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None or not weight.is_floating_point():
        raise ValueError(f"layer must have a parameter named weight, but this {type(layer).__name__} has none.")
    return layer
