"""A convolution that is an orthogonal or unitary linear map."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.dtypes import short
from .init import BY_NAME, Init, haar_, one_of_dtypes
from .orthogonal import OrthogonalModule

ConvInit = Literal[Init, "delta"]


class OrthogonalConv2d(OrthogonalModule):
    """A circular convolution with a kernel of the size of the image. As a linear map of (C, H, W), it is unitary.

        Y_k = U_k X_k at every frequency k of the 2-d Fourier transforms X of x and Y of y, U_k unitary (C, C)

    A real convolution is orthogonal, and has U_-k = conj(U_k). So U_k is real where k and -k are the same frequency: at
    frequency 0 and, along a side of even length, at half that length. Only independent blocks U_k are parameters, so a
    step that keeps each block unitary keeps the convolution unitary or orthogonal:

        weight_orthogonal   real, (s, C, C): the s = 1, 2 or 4 frequencies with k = -k
        weight_unitary      complex, ((H W - s) / 2, C, C): one block for each other pair {k, -k}

    A complex convolution has only `weight_unitary`, (H W, C, C).

    `weight` is the spatial kernel, (C, C, H, W), with which the layer equals

        F.conv2d(F.pad(x, (0, W - 1, 0, H - 1), mode="circular"), weight, bias)

    Args:
        channels: C, the number of channels of the input and of the output.
        size: (H, W) of the image, or one number for both.
        bias: whether to add b, (C,), which is initialised with zeros.
        init: the initialisation of the blocks. "haar", "identity", "henaff" and "cayley" draw each block independently.
            "delta" sets all blocks to the same real Haar matrix, which gives a 1 x 1 convolution (Xiao et al.,
            1806.05393).
        device, dtype: the device and the dtype of the images and of `weight_orthogonal`; float32 or float64 for a real
            convolution, complex64 or complex128 for a complex one.

    Raises:
        ValueError: `channels` or `size` is below 1, or `init` is unknown; in `forward`, the input has another shape.
        TypeError: another dtype.

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
        checks.positive("channels", channels)
        if not isinstance(size, int) and not (isinstance(size, (tuple, list)) and len(size) == 2):
            raise ValueError(f"size must be an integer or a pair of them, got {size!r}.")
        height, width = (size, size) if isinstance(size, int) else size
        checks.positive("height", height)
        checks.positive("width", width)
        checks.one_of("init", init, (*get_args(Init), "delta"))
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
        """Initialise the parameters again."""
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
        """Whether the images are real."""
        return self.weight_orthogonal is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the images."""
        return self.weight_unitary.dtype if self.weight_orthogonal is None else self.weight_orthogonal.dtype

    @property
    def spectrum(self) -> Tensor:
        """The blocks U_k at all frequencies, (H, W, C, C). Gradients flow through them to the parameters.

        For a real layer, only the half of the frequencies that `torch.fft.rfft2` returns: (H, W // 2 + 1, C, C).
        """
        (height, width), block = self.size, self.weight_unitary.shape[1:]
        if self.weight_orthogonal is None:
            return self.weight_unitary.view(height, width, *block)
        rows, own_rows, own_columns = (height - 1) // 2, 2 - height % 2, 2 - width % 2
        own = self.weight_orthogonal.to(self.weight_unitary.dtype).view(own_rows, own_columns, *block)
        edge = self.weight_unitary[: rows * own_columns].view(rows, own_columns, *block)
        inner = self.weight_unitary[rows * own_columns :].view(height, (width - 1) // 2, *block)
        edges = torch.cat([own[:1], edge, own[1:], edge.flip(0).conj()])  # columns 0, W / 2: row -f is conj(row f)
        return torch.cat([edges[:, :1], inner, edges[:, 1:]], 1)

    @property
    def weight(self) -> Tensor:
        """The spatial kernel, (C, C, H, W), for a cross-correlation as in torch.nn.Conv2d. It is differentiable."""
        spectrum = self.spectrum.permute(2, 3, 0, 1)
        if self.is_real:
            return torch.fft.irfft2(spectrum.conj(), s=self.size)
        return torch.fft.fft2(spectrum, norm="forward")

    def forward(self, input: Tensor) -> Tensor:
        """Convolve an input (N, C, H, W) or (C, H, W). The output has the same shape and dtype.

        The input has the dtype of the layer. A real layer also accepts bfloat16 and float16.
        """
        self._check(input)
        x = input.to(self.dtype)
        if x.numel() == 0:  # MKL does not transform empty tensors
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
                f"input must have shape {shapes}, got {tuple(input.shape)}: the layer is for one size of image."
            )
        if input.dtype != self.dtype and (not self.is_real or input.dtype not in (torch.bfloat16, torch.float16)):
            expects = short(self.dtype)
            raise TypeError(f"input must have the dtype of the layer, {expects}, got {short(input.dtype)}.")

    def extra_repr(self) -> str:
        """The settings, as text."""
        return f"{self.channels}, size={self.size}, bias={self.bias is not None}, init={self.init!r}"
