"""A linear map whose backward does not form the gradient of the weight: it returns the factors of the gradient, as a
`FactoredGradient`."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import declare, forced, pick
from ..core import internals
from ..core.autograd import Op, opaque
from ..core.collectives import Peers
from ..core.dtypes import short, without_autocast
from ..core.factor_exchange import mean_gradient, mean_gradient_by_name
from ..core.factored_gradient import FactoredGradient
from ..core.factored_tensor import ANY
from ..reference import factored_linear as _reference
from .matrix_product import by_other_library, no_stack, other_library

_FULL = (torch.float32, torch.float64)
_FEW = (8, 64, 128)  # rows of x from which and up to which our kernel for x W' wins on a CPU; up to 128 for a large W
_FASTER = (16, 64)  # rows up to which our kernels for x W' and dy W win against a library that is faster than torch's
_NUMBERS = (1 << 18, 1 << 22)  # numbers of W, at least, and of a large one
_NARROW = 32  # our kernel for dy W wins for a large W with up to min(p, q) / 32 rows, and up to 128
LEAST = 1 << 21  # numbers of W from which factors pay for the time that Python takes for them
_SHARE = 4  # the factors of more than min(p, q) / 4 rows would not save enough: the gradient is formed
_FAST = 16  # a CPU is no faster with more than min(p, q) / 16 rows

_ALONE = (
    "A layer that exchanges its factors has gradients of the joint batch only for a contiguous float32 or float64 "
    "parameter, without torch.func and create_graph: end the exchange by exchange_factors_(model, None)."
)
_library = torch.library.Library("sslkern_factored", "DEF")


_products = partial(declare, vmap=no_stack, dtypes=_FULL, devices=("cpu",))
_products("factored_linear_fwd(Tensor x, Tensor w) -> Tensor", _reference.factored_linear_fwd)
_products("factored_linear_bwd(Tensor dy, Tensor w) -> Tensor", _reference.factored_linear_bwd)


def _no_vmap(*_: Any) -> NoReturn:
    raise NotImplementedError("A compiled factored layer has no batched gradients: differentiate it outside of vmap.")


# A compiled graph may add the gradients of two uses of a weight by code of its own, which reads their memory, so this
# operator returns matrices
_compiled_mean = opaque(
    _library,
    "mean_gradient(Tensor w, Tensor dy, Tensor x, int most, str name, int size, int rank, str transport, bool even)"
    " -> Tensor",
    mean_gradient_by_name,
    fake=lambda w, *_: torch.empty_like(w),
    rule=_no_vmap,
    tags=(torch.Tag.cudagraph_unsafe,),
)


def most_rows(w: Tensor) -> int:
    """The most rows N of the factors of a gradient of w (q, p), all uses of w together."""
    return min(w.shape) // _SHARE


def stays_factored(rows: int, w: Tensor) -> bool:
    """Whether the gradient of w for one batch with so many rows is kept as factors. A small weight has them only
    because its layer was made so: they are kept as long as they save memory."""
    fast = w.device.type == "cpu" and w.numel() >= LEAST
    return rows <= min(w.shape) // (_FAST if fast else _SHARE)


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of a batch (N, p). On a CPU, our kernel runs a product of few rows, and the fastest library others."""
    other = _elsewhere(x, w, 1)
    most = _FASTER[0] if other and w.numel() >= LEAST else _FEW[2] if w.numel() >= _NUMBERS[1] else _FEW[1]
    few = _ours(x, w, 1, _NUMBERS[0], most)
    if not (few or other) or (bias is not None and bias.dtype != w.dtype):
        return F.linear(x, w, bias)
    y: Tensor = pick("factored_linear_fwd", x)(x.contiguous(), w) if few else by_other_library(x, w)
    return y if bias is None else y.add_(bias)


def product_of_gradient(dy: Tensor, w: Tensor) -> Tensor:
    """dy conj(W). On a CPU as in `product`, unless it is differentiated or batched in turn."""
    other = _elsewhere(dy, w, 0)
    few = _ours(dy, w, 0, _NUMBERS[1], min(_FASTER[1] if other else _FEW[2], min(w.shape) // _NARROW))
    if not few and not other:
        return dy @ w.conj()
    if torch.is_grad_enabled() or internals.transforms_active() or internals.batched(dy):
        return dy @ w.conj()
    dx: Tensor = pick("factored_linear_bwd", dy)(dy.contiguous(), w) if few else by_other_library(dy, w.mT)
    return dx


def _formed(w: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """The gradient dy' x as a matrix, from rows (N, q) and (N, p), where it is not differentiated in turn."""
    if w.dtype == dy.dtype and _elsewhere(dy, w, 0):
        return by_other_library(dy.mT, x.mT)
    return (dy.mT @ x.conj()).to(w.dtype)


def _elsewhere(x: Tensor, w: Tensor, axis: int) -> bool:
    """Whether another library than torch's own runs the product of x with an axis of w, for a batch that is no vector
    and a weight that is worth the call."""
    return other_library(x, w) and _ours(x, w, axis, _NUMBERS[0], x.numel())


def _ours(x: Tensor, w: Tensor, axis: int, least: int, most: int) -> bool:
    """Whether our kernel runs the product of x with an axis of w, if it wins from `least` numbers of w on and up to
    `most` rows of x. Not if another back-end is forced, and not if the product is an error."""
    if x.device.type != "cpu" or w.device.type != "cpu" or not x.numel() or not x.dim():
        return False
    size = x.shape[-1]
    if x.dtype != w.dtype or w.dtype not in _FULL or w.numel() < least or size != w.shape[axis]:
        return False
    if torch.compiler.is_compiling() or forced() not in (None, "native"):
        return False
    return _FEW[0] <= x.numel() // size <= most


class _Linear(Op):
    """y = x W' + b, for `orthogonal` optimizers with y and dx among the factors. With `wide`, y = x W."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype | None,
        orthogonal: bool,
        wide: bool,
        peers: Peers | None,
    ) -> tuple[Tensor, Tensor | None]:
        if wide:
            return x @ w, None
        used = w if dtype is None else w.to(dtype)
        if dtype is not None:
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with without_autocast(x):
            return product(x, used, bias), None if used is w else used

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, w, _, _, ctx.orthogonal, ctx.wide, ctx.peers = inputs
        y, used = output
        if used is not None:
            ctx.mark_non_differentiable(used)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, used, y if ctx.orthogonal and w.shape[0] == w.shape[1] else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
        x, w, used, y = ctx.saved_tensors
        if dy is None:
            return (None,) * 7
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        used = w if used is None and w.dtype == dy.dtype else w.to(dy.dtype) if used is None else used
        with without_autocast(dy):
            dx = None
            if need_x or ctx.orthogonal:
                dx = dy @ used.mH if ctx.wide else product_of_gradient(dy, used)
            dw = _weight_gradient(ctx, w, dy, x, y, dx) if need_w else None
            db = _rows(dy).sum(0).to(w.dtype) if need_bias else None
        return dx.to(x.dtype) if dx is not None and need_x else None, dw, db, None, None, None, None


def _weight_gradient(ctx: Any, w: Tensor, dy: Tensor, x: Tensor, y: Tensor | None, dx: Tensor | None) -> Tensor:
    dy, x = _rows(dy), _rows(x.to(dy.dtype))
    of_y, of_dx = (None if t is None else _rows(t) for t in (y, dx))
    if ctx.wide:  # the gradient is x^H dy
        dy, x = x.conj(), dy.conj()
        of_y, of_dx = (None if t is None else t.conj() for t in (of_dx, of_y))
    most = ANY if ctx.orthogonal else most_rows(w)
    dense = torch.is_grad_enabled() or internals.transforms_active()  # for a derivative of this backward
    if dense or (not torch.compiler.is_compiling() and internals.batched(dy)):
        if ctx.peers is not None:
            raise RuntimeError(_ALONE)
        return (dy.mT @ x.conj()).to(w.dtype)
    if ctx.peers is not None:
        return _mean_gradient(w, dy, x, most, ctx.peers)
    if dy.shape[0] > most or (not ctx.orthogonal and not stays_factored(dy.shape[0], w)):
        return _formed(w, dy, x)
    return FactoredGradient.of(w, dy, x.conj(), of_y, None if of_dx is None else of_dx.conj(), most)


def _mean_gradient(w: Tensor, dy: Tensor, x: Tensor, most: int, peers: Peers) -> Tensor:
    if not torch.compiler.is_compiling():
        return mean_gradient(w, dy, x, most, peers)
    transport = "" if peers.transport is None else short(peers.transport)
    name, size, rank, _, even = peers
    mean: Tensor = _compiled_mean(w, dy, x, most, name, size, rank, transport, even)
    return mean


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(0, t.shape[-1])


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    orthogonal: bool = False,
    wide: bool = False,
    peers: Peers | None = None,
) -> Tensor:
    """The product x W' + b for x (..., p), W (q, p) and b (q,), or x W for W (p, q) with `wide`.

    The gradient of W is a `FactoredGradient`, if W is a contiguous leaf tensor of at least 32 bits a number and if this
    backward keeps no graph for another derivative. Otherwise, and inside torch.func or compiled code, this is torch's
    own product. With `orthogonal`, the factors are never formed for their number, and the output and the gradient of
    the input are kept beside them: optimizers of orthogonal matrices save products by these. Autocast applies as to
    `F.linear`, but the factors are not rounded further: the sum over them is in the dtype of W.
    With `peers`, the gradient of W is the mean of those of the ranks; see `core.factor_exchange`.
    """
    if torch.compiler.is_compiling() and peers is None:
        return F.linear(x, w.mT if wide else w, bias)
    asked = torch.is_grad_enabled() and w.requires_grad
    transformed = internals.transforms_active() or internals.forward_mode()
    if not asked or transformed or not w.is_leaf or w.dtype.itemsize < 4 or not w.is_contiguous():
        if peers is not None and (asked or transformed):
            raise RuntimeError(_ALONE)
        return F.linear(x, w.mT if wide else w, bias)
    formed = not orthogonal and peers is None and not stays_factored(x.numel() // max(1, w.shape[1]), w)
    if formed and (wide or not _elsewhere(x, w, 1) or _autocast(x, w) is not None):
        return F.linear(x, w, bias)
    settings = _autocast(x, w), orthogonal, wide, peers
    if x.dim() < 3 or not x.numel():
        return _Linear.apply(x, w, bias, *settings)[0]
    y: Tensor = _Linear.apply(x.flatten(0, -2), w, bias, *settings)[0]  # a view made inside could not be modified
    return y.view(*x.shape[:-1], y.shape[-1])


def _autocast(x: Tensor, w: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would run the product of x and w, or None if it does not apply."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (x.dtype, w.dtype) or w.is_complex():
        return None
    return torch.get_autocast_dtype(device)
