"""The affine map that a piecewise affine network is around a sample, by products with vectors."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core import checks
from ._linearized import Linearized, differentiable, frozen, random_like, shown, versions
from ._networks import check_point, inputs, module
from ._operators import Operator
from ._piecewise import check_piecewise


class LocalAffine:
    r"""The maps x' -> A x' + b of N samples, or, after `maps[i]`, of one sample; `local_affine` returns it.

    A has p rows, the flattened outputs of a sample, and d columns, its flattened inputs. Products cost about one
    backward pass through the network, for all N samples at once. They use the weights that the network had: changing
    the weights in place makes later products raise an error.

    Attributes:
        shape: (N, p, d), or (p, d) for one sample.
        offset: b, (N, p) or (p,).
        input_shape, output_shape: of one sample, before flattening.
    """

    def __init__(self, net: nn.Module, x: Tensor, one: bool) -> None:
        self._net, self._one = net, one
        self._versions = versions(net)
        with differentiable(net, x.device):
            state = frozen(net)
            self._map = Linearized(lambda point: functional_call(net, state, (point.clone(),)), x)
            _check_rows(self._map, len(x))
        self._x, self._y = self._map.point.detach(), self._map.value.detach()
        self.input_shape, self.output_shape = tuple(x.shape[1:]), tuple(self._y.shape[1:])
        d, p = self._x[0].numel(), self._y[0].numel()
        self.shape: tuple[int, ...] = (p, d) if one else (len(x), p, d)
        self.dtype, self.device = x.dtype, x.device
        self.offset = (self._y - self._map.push(self._x)).reshape(len(x), p)
        if one:
            self.offset = self.offset[0]

    def __len__(self) -> int:
        if self._one:
            raise TypeError("this is the map of one sample, which has no length.")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LocalAffine(shape={self.shape}, dtype={self.dtype}, device={self.device})"

    def __getitem__(self, i: int) -> LocalAffine:
        """The map of sample i, from a graph of its own."""
        if self._one:
            raise TypeError("this is the map of one sample, which has no others.")
        if isinstance(i, bool) or not isinstance(i, Integral) or not -len(self) <= i < len(self):
            raise IndexError(f"the sample must be an integer from {-len(self)} to {len(self) - 1}, got {i!r}.")
        self._check_weights()
        return LocalAffine(self._net, self._x[int(i) : int(i) + 1 or None], one=True)

    def __call__(self, x: Tensor) -> Tensor:
        """A x + b for samples (N, ...), or for one sample, in the shapes of the network."""
        shape = self.input_shape if self._one else (len(self), *self.input_shape)
        if not isinstance(x, Tensor) or tuple(x.shape) != shape:
            raise ValueError(f"x must have shape {shape}, got {shown(x)}.")
        flat = x.reshape(-1) if self._one else x.reshape(len(x), -1)
        return (self.matvec(flat) + self.offset).reshape(
            self.output_shape if self._one else (len(x), *self.output_shape)
        )

    def matvec(self, v: Tensor) -> Tensor:
        """A v: (N, p) for v of shape (N, d), or of shape (d,) for all samples; (p,) for one sample."""
        return self.matmat(_column("v", v))[..., 0]

    def rmatvec(self, u: Tensor) -> Tensor:
        """A'u: (N, d) for u of shape (N, p) or (p,); (d,) for one sample."""
        return self.rmatmat(_column("u", u))[..., 0]

    def matmat(self, v: Tensor) -> Tensor:
        """A V: (N, p, k) for V of shape (N, d, k) or (d, k); (p, k) for one sample."""
        return self._product("v", v, self.shape[-1], self.shape[-2], self._map.push, self._x.shape)

    def rmatmat(self, u: Tensor) -> Tensor:
        """A'U: (N, d, k) for U of shape (N, p, k) or (p, k); (d, k) for one sample."""
        return self._product("u", u, self.shape[-2], self.shape[-1], self._map.pull, self._y.shape)

    def matrix(self) -> Tensor:
        """A, (N, p, d) or (p, d), by min(p, d) products for all samples at once."""
        p, d = self.shape[-2:]
        if d <= p:
            return self.matmat(torch.eye(d, dtype=self.dtype, device=self.device))
        return self.rmatmat(torch.eye(p, dtype=self.dtype, device=self.device)).mT

    def as_operator(self) -> Operator:
        """The products of one sample, as `extreme_singular_values` uses them."""
        if not self._one:
            raise ValueError(f"a must be the map of one sample, got those of {len(self)}: take maps[i].")
        p, d = self.shape
        return Operator((p, d), self.dtype, self.device, self.matmat, self.rmatmat)

    def as_linear_operator(self) -> Any:
        """One sample's A as a `scipy.sparse.linalg.LinearOperator`, whose vectors are NumPy arrays."""
        return self.as_operator().as_scipy()

    def _product(self, name: str, v: Any, rows: int, out: int, product: Any, shape: torch.Size) -> Tensor:
        self._check_weights()
        lead = (self._x.shape[0], rows)
        fits = isinstance(v, Tensor) and v.is_floating_point() and v.dim() in ((2,) if self._one else (2, 3))
        if not fits or tuple(v.shape[:-1]) not in (lead[1:], lead):
            full = ", ".join(map(str, lead[1:] if self._one else lead))
            raise ValueError(f"{name} must be a floating-point tensor ({full}, k), got {shown(v)}.")
        checks.alike(name, v, "x", self._x)
        stack = v.detach().expand(*lead, v.shape[-1]).movedim(-1, 0)
        found = product(stack.reshape(-1, *shape)).reshape(-1, lead[0], out).movedim(0, -1)
        return found[0] if self._one else found

    def _check_weights(self) -> None:
        if versions(self._net) != self._versions:
            raise RuntimeError("the weights of net have changed: call local_affine again.")


def local_affine(net: nn.Module, x: Tensor) -> LocalAffine:
    r"""The affine maps A_i x' + b_i that a piecewise affine network is around the samples x_i.

    A network of affine layers and of activations such as ReLU, leaky ReLU or the absolute value, and of max-pooling,
    splits its inputs into polytopes, and on each of them it is one affine map:

        net(x') = A_i x' + b_i    for x' in the same polytope as x_i,

    exactly. A is not formed: a product with A or with its transpose is one pass through the network. At a sample on a
    border, where a preactivation is exactly 0, A is the derivative that autograd chooses, 0 for the ReLU of 0, which
    may be the map of no polytope.

    Args:
        net: a module whose rows do not depend on each other in evaluation mode, in which it runs; it is then set back
            to its mode. A compiled or DDP-wrapped module is unwrapped. Nothing in it changes.
        x: the samples, (N, ...), N >= 1, float32 or float64 as the parameters of net, on their device.

    Returns:
        A `LocalAffine` of N samples. `maps[i]` is the map of one sample, which `extreme_singular_values` accepts.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or is not finite; net is not
        piecewise affine, mixes the rows of the batch, or does not return N rows.

    Source: Riedi, Balestriero and Baraniuk, Singular value perturbation and deep network optimization (2203.03099).
    """
    net = module("net", net)
    inputs("x", x)
    check_point(net, x)
    check_piecewise("net", net)
    return LocalAffine(net, x, one=False)


def _check_rows(found: Linearized, n: int) -> None:
    """Check that the network returns n rows, the first of which depends on the first row of x alone."""
    value = found.value
    if value.dim() < 1 or value.shape[0] != n:
        raise ValueError(f"net must return {n} rows for {n} rows, got shape {tuple(value.shape)}.")
    first = torch.zeros_like(value)
    first[0] = random_like(value[0])
    if n > 1 and bool(found.pull(first)[1:].any()):
        raise ValueError("net must treat the rows of x separately, but its first row depends on others: pass one row.")


def _column(name: str, v: Any) -> Tensor:
    if not isinstance(v, Tensor) or v.dim() < 1:
        raise ValueError(f"{name} must be a floating-point tensor with one dimension or more, got {shown(v)}.")
    return v[..., None]
