"""Layers with orthogonal or unitary weights, which `sslkern.ops.rank_k_update_` keeps so while they learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _torch
from ..ops import _checks
from ..optim import factored as _factored
from .init import BY_NAME, Init, haar_, one_of_dtypes, uniform_

ConvInit = Literal[Init, "delta"]


class OrthogonalModule(nn.Module):
    """A layer that names which of its own parameters have orthonormal columns, in `orthogonal_names`.

    Any module with that attribute, an iterable of strings on the class or the instance, is understood by
    `orthogonal_parameters`; this class adds one thing: a complex parameter stays complex when the layer changes its
    precision, and a real one real, so `.double()` and `.to(torch.complex128)` both make float64 and complex128 of them.
    """

    orthogonal_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthogonalModule:
        def of_its_kind(t: Tensor) -> Tensor:
            moved = fn(torch.view_as_real(t) if t.is_complex() else t)
            moved = moved.real.contiguous() if moved.is_complex() else moved
            if t.is_complex() and moved.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{type(self).__name__} has complex weights, which are complex64 or complex128: they cannot become "
                    f"{_checks.short(moved.dtype)}."
                )
            return torch.view_as_complex(moved.contiguous()) if t.is_complex() else moved

        return super()._apply(of_its_kind, recurse)


def orthogonal_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model whose columns must stay orthonormal, each once: those for `sslkern.optim.ProjUNN`.

    They are those that a module of the model names in its attribute `orthogonal_names`; the layers of `sslkern.nn` do.

        optimizers = [ProjUNN(orthogonal_parameters(model)), torch.optim.Adam(other_parameters(model))]

    Args:
        module: any model.

    Returns:
        An iterator of parameters (..., n, p), n >= p, in the order of `module.parameters()`.

    Raises:
        TypeError: not a torch.nn.Module.
    """
    ours = _orthogonal_ids(module)
    return (p for p in module.parameters() if id(p) in ours)


def other_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model that are not among its `orthogonal_parameters`; with them, all of them.

    Args:
        module: any model.

    Returns:
        An iterator of parameters, in the order of `module.parameters()`.

    Raises:
        TypeError: not a torch.nn.Module.
    """
    ours = _orthogonal_ids(module)
    return (p for p in module.parameters() if id(p) not in ours)


def _orthogonal_ids(module: nn.Module) -> set[int]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    return {
        id(_torch.parameters(layer)[name])
        for layer in module.modules()
        for name in getattr(layer, "orthogonal_names", ())
        if _torch.parameters(layer).get(name) is not None
    }


class OrthogonalLinear(OrthogonalModule):
    """y = x W^T + b, where W has orthonormal columns, or orthonormal rows where it is wide.

    W is (out_features, in_features), as in torch.nn.Linear. Its parameter `weight_u` is always tall, which is what
    `rank_k_update_` takes: W itself for out >= in, W^T for out < in. `weight` is W, a view of it. So |W x| = |x| for
    out >= in, and |W^T dy| = |dy|, the norm of the gradient, for out <= in.

    Args:
        in_features, out_features: at least 1.
        bias: with b, (out_features,), uniform in +-1 / sqrt(in_features) as in torch.nn.Linear.
        init: of `weight_u`, a name in `sslkern.nn.init`: "haar", "identity"; for a square one also "henaff", "cayley".
        device, dtype: of the parameters; float32, float64, complex64 or complex128, and the input has it too.
        factored: whether backward leaves `weight_u` no gradient but its factors, a row for each of the input's, from
            which `sslkern.optim.ProjUNN` descends without forming a matrix: for one process and plain descent. Until
            its step the input must stay as it is. torch.compile leaves the graph at such a layer.

    Raises:
        ValueError: no features, an unknown init, one for square matrices where W is not. TypeError: other dtypes.

    Source: Kiani et al., projUNN (2203.05483).
    """

    orthogonal_names = ("weight_u",)
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init: Init = "haar",
        device: Any = None,
        dtype: torch.dtype | None = None,
        factored: bool = False,
    ) -> None:
        super().__init__()
        _checks.positive("in_features", in_features)
        _checks.positive("out_features", out_features)
        _checks.one_of("init", init, get_args(Init))
        dtype = one_of_dtypes(dtype)
        self.in_features, self.out_features, self.init, self.factored = in_features, out_features, init, factored
        tall = max(in_features, out_features), min(in_features, out_features)
        self.weight_u = nn.Parameter(torch.empty(tall, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        BY_NAME[self.init](self.weight_u)
        if self.bias is not None:
            uniform_(self.bias, self.in_features**-0.5)

    @property
    def weight(self) -> Tensor:
        """W, (out_features, in_features), differentiable."""
        return self.weight_u if self.out_features >= self.in_features else self.weight_u.mT

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if not self.factored:
            return F.linear(input, self.weight, self.bias)
        y = _factored.linear(input, self.weight_u, self.out_features < self.in_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """torch's settings, and the init."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"init={self.init!r}" + (", factored=True" if self.factored else "")
        )


class OrthogonalConv2d(OrthogonalModule):
    """A circular convolution as wide as the image, orthogonal or unitary as a linear map of (C, H, W).

        Y_k = U_k X_k at every frequency k of the 2-d Fourier transforms X of x and Y of y, U_k unitary (C, C)

    A real convolution has U_-k = conj(U_k), so U_k is real where k and -k are the same bin: at 0 and, where a side is
    even, at its half. Only independent blocks are parameters, so that a step which keeps each of them unitary keeps the
    convolution orthogonal: `weight_orthogonal`, real, (s, C, C), of the s self-conjugate bins (s = 1, 2 or 4), and
    `weight_unitary`, complex, ((H W - s) / 2, C, C), one block for each pair {k, -k} of the others. A complex
    convolution has `weight_unitary` alone, (H W, C, C).

    `weight` is the kernel in space, (C, C, H, W), such that the layer equals

        F.conv2d(F.pad(x, (0, W - 1, 0, H - 1), mode="circular"), weight, bias)

    Args:
        channels: C, of the input and of the output.
        size: (H, W) of the image, or one number for both.
        bias: with b, (C,), zero at first.
        init: of the blocks: "haar", "identity", "henaff", "cayley", each drawn for itself, or "delta": one real Haar
            matrix for all, a 1 x 1 convolution (Xiao et al., 1806.05393).
        device, dtype: float32, float64 for a real convolution, complex64, complex128 for a complex one.

    Raises:
        ValueError: no channels, an empty image, an unknown init, an input of another shape. TypeError: another dtype.

    Source: Kiani et al., projUNN (2203.05483).
    """

    orthogonal_names = ("weight_unitary", "weight_orthogonal")
    weight_orthogonal: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int],
        bias: bool = True,
        init: ConvInit = "haar",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.positive("channels", channels)
        if not isinstance(size, int) and not (isinstance(size, (tuple, list)) and len(size) == 2):
            raise ValueError(f"size must be an integer or a pair of them, got {size!r}.")
        height, width = (size, size) if isinstance(size, int) else size
        _checks.positive("height", height)
        _checks.positive("width", width)
        _checks.one_of("init", init, (*get_args(Init), "delta"))
        dtype = one_of_dtypes(dtype)
        self.channels, self.size, self.init = channels, (height, width), init
        own = 0 if dtype.is_complex else (2 - height % 2) * (2 - width % 2)
        pairs = height * width if dtype.is_complex else (height * width - own) // 2
        block = channels, channels
        self.weight_unitary = nn.Parameter(torch.empty(pairs, *block, device=device, dtype=dtype.to_complex()))
        self.weight_orthogonal = nn.Parameter(torch.empty(own, *block, device=device, dtype=dtype)) if own else None
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        blocks = [w for w in (self.weight_unitary, self.weight_orthogonal) if w is not None]
        if self.init == "delta":
            one = haar_(torch.empty_like(blocks[-1][:1].real))
        with torch.no_grad():
            for weight in blocks:
                weight.copy_(one) if self.init == "delta" else BY_NAME[self.init](weight)
            if self.bias is not None:
                self.bias.zero_()

    @property
    def is_real(self) -> bool:
        """Whether it is a convolution of real images."""
        return self.weight_orthogonal is not None

    @property
    def dtype(self) -> torch.dtype:
        """That of the images."""
        return self.weight_unitary.dtype if self.weight_orthogonal is None else self.weight_orthogonal.dtype

    @property
    def spectrum(self) -> Tensor:
        """U, differentiable: (H, W, C, C), or the half (H, W // 2 + 1, C, C) of `torch.fft.rfft2` for a real one."""
        (height, width), block = self.size, self.weight_unitary.shape[1:]
        if self.weight_orthogonal is None:
            return self.weight_unitary.view(height, width, *block)
        rows, own_rows, own_columns = (height - 1) // 2, 2 - height % 2, 2 - width % 2
        own = self.weight_orthogonal.to(self.weight_unitary.dtype).view(own_rows, own_columns, *block)
        edge = self.weight_unitary[: rows * own_columns].view(rows, own_columns, *block)
        inner = self.weight_unitary[rows * own_columns :].view(height, (width - 1) // 2, *block)
        edges = torch.cat([own[:1], edge, own[1:], edge.flip(0).conj()])  # columns 0 and W / 2: row -f is that of f
        return torch.cat([edges[:, :1], inner, edges[:, 1:]], 1)

    @property
    def weight(self) -> Tensor:
        """The kernel in space, (C, C, H, W), differentiable, as torch.nn.Conv2d has it: a cross-correlation."""
        spectrum = self.spectrum.permute(2, 3, 0, 1)
        if self.is_real:
            return torch.fft.irfft2(spectrum.conj(), s=self.size)
        return torch.fft.fft2(spectrum, norm="forward")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) to the same shape; a real layer takes bfloat16 and float16 too."""
        self._check(input)
        x = input.to(self.dtype)
        if x.numel() == 0:  # which MKL does not transform
            output = torch.einsum("ochw,...chw->...ohw", self.weight, x)
        else:
            x = torch.fft.rfft2(x) if self.is_real else torch.fft.fft2(x)
            y = torch.einsum("hwoc,...chw->...ohw", self.spectrum, x)
            output = torch.fft.irfft2(y, s=self.size) if self.is_real else torch.fft.ifft2(y)
        output = output if self.bias is None else output + self.bias[:, None, None]
        return output.to(input.dtype)

    def _check(self, input: Tensor) -> None:
        expected = (self.channels, *self.size)
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}.")
        if input.dim() not in (3, 4) or input.shape[-3:] != expected:
            shapes = f"(N, {', '.join(map(str, expected))}) or {expected}"
            raise ValueError(
                f"input must have shape {shapes}, got {tuple(input.shape)}: another size of image needs another layer."
            )
        if input.dtype != self.dtype and (not self.is_real or input.dtype not in (torch.bfloat16, torch.float16)):
            expects = _checks.short(self.dtype)
            raise TypeError(f"input must have the dtype of the layer, {expects}, got {_checks.short(input.dtype)}.")

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.channels}, size={self.size}, bias={self.bias is not None}, init={self.init!r}"
