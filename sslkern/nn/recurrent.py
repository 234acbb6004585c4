"""Recurrent layers whose hidden weight is orthogonal or unitary, and therefore preserves the norm of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import checks
from ..core.dtypes import short
from ..ops import factored_linear
from .init import BY_NAME, Init, one_of_dtypes, uniform_
from .modrelu import modrelu
from .orthogonal import OrthogonalModule

Nonlinearity = Literal["relu", "tanh", "modrelu"]


class _RNN(OrthogonalModule):
    """h_t = f(V x_t + W h_(t-1) + b) with an orthogonal or unitary W. If f is modReLU, b is the bias of f instead."""

    _dtypes: tuple[torch.dtype, ...]
    _nonlinearities: tuple[str, ...]
    weight_hh_l0: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        nonlinearity: str,
        bias: bool,
        batch_first: bool,
        init: Init,
        device: Any,
        dtype: torch.dtype,
        factored: bool,
    ) -> None:
        super().__init__()
        checks.positive("input_size", input_size)
        checks.positive("hidden_size", hidden_size)
        checks.positive("num_layers", num_layers)
        checks.one_of("nonlinearity", nonlinearity, self._nonlinearities)
        checks.one_of("init", init, get_args(Init))
        one_of_dtypes(dtype, self._dtypes)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.nonlinearity, self.bias, self.batch_first, self.init = nonlinearity, bias, batch_first, init
        self.factored = factored
        self.orthogonal_names = tuple(f"weight_hh_l{layer}" for layer in range(num_layers))
        real = dtype.to_real() if nonlinearity == "modrelu" else dtype
        for layer in range(num_layers):
            into = hidden_size if layer else input_size
            self._add(f"weight_ih_l{layer}", (hidden_size, into), device, dtype)
            self._add(f"weight_hh_l{layer}", (hidden_size, hidden_size), device, dtype)
            if bias:
                self._add(f"bias_l{layer}", (hidden_size,), device, real)
        self.reset_parameters()

    def _add(self, name: str, shape: tuple[int, ...], device: Any, dtype: torch.dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def reset_parameters(self) -> None:
        """Initialise the parameters again."""
        for name, parameter in self.named_parameters(recurse=False):
            if name in self.orthogonal_names:
                BY_NAME[self.init](parameter)
            elif name.startswith("bias"):
                nn.init.zeros_(parameter)
            else:
                uniform_(parameter, self.hidden_size**-0.5)

    def forward(self, input: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the hidden states of the last layer at every step, and those of all layers at the last step.

        Args:
            input: (T, N, input_size), (N, T, input_size) with batch_first, or (T, input_size) without a batch; T >= 1.
            h0: (num_layers, N, hidden_size), or (num_layers, hidden_size) without a batch. None means zeros.

        Returns:
            The pair (output, h_n). `output` is (T, N, hidden_size), or laid out as the input is. `h_n` has the shape of
            `h0`.

        Raises:
            TypeError: `input` or `h0` is not a tensor, or has another dtype. ValueError: one of them has another shape.
        """
        self._check(input)
        batched = input.dim() == 3
        swapped = batched and self.batch_first
        x = input.transpose(0, 1) if swapped else input if batched else input.unsqueeze(1)
        last = []
        for layer, h in enumerate(self._start(x, h0, batched).unbind(0)):
            x, h = self._layer(x, h, layer)
            last.append(h)
        h_n = torch.stack(last)
        if not batched:
            return x.squeeze(1), h_n.squeeze(1)
        return (x.transpose(0, 1) if swapped else x), h_n

    def _layer(self, x: Tensor, h: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """From x (T, N, input) and h (N, hidden), return all states (T, N, hidden) and the last state (N, hidden)."""
        bias: Tensor | None = getattr(self, f"bias_l{layer}", None)
        inside = None if self.nonlinearity == "modrelu" else bias
        function = self._function(bias)
        v, u = getattr(self, f"weight_ih_l{layer}"), getattr(self, f"weight_hh_l{layer}")
        w, states = u.mT, []
        for step in F.linear(x, v, inside).unbind(0):  # indexing by step would cost O(T^2) in the backward
            h = function(
                step + factored_linear.linear(h, u, orthogonal=True) if self.factored else torch.addmm(step, h, w)
            )
            states.append(h)
        return torch.stack(states), h

    def _function(self, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        if self.nonlinearity == "modrelu":
            return (lambda z: z) if bias is None else (lambda z: modrelu(z, bias))
        return torch.relu if self.nonlinearity == "relu" else torch.tanh

    def _start(self, x: Tensor, h0: Tensor | None, batched: bool) -> Tensor:
        """The hidden states before the first step, (num_layers, N, hidden)."""
        dtype = self.weight_hh_l0.dtype
        shape = (self.num_layers, x.shape[1], self.hidden_size)
        if h0 is None:
            return torch.zeros(shape, dtype=dtype, device=x.device)
        expected = shape if batched else (shape[0], shape[2])
        if not isinstance(h0, Tensor):
            raise TypeError(f"h0 must be a torch.Tensor, got {type(h0).__name__}.")
        if h0.shape != expected:
            raise ValueError(f"h0 must have shape {expected}, got {tuple(h0.shape)}.")
        if h0.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"h0 must have the dtype of the weights, {short(dtype)}, got {short(h0.dtype)}.")
        h0 = h0.to(dtype)
        return h0 if batched else h0.unsqueeze(1)

    def _check(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}.")
        time = 1 if self.batch_first and input.dim() == 3 else 0
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size or not input.shape[time]:
            batched = "N, T" if self.batch_first else "T, N"
            raise ValueError(
                f"input must have shape ({batched}, {self.input_size}) or (T, {self.input_size}) with T >= 1, got "
                f"{tuple(input.shape)}."
            )
        dtype = self.weight_hh_l0.dtype
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"input must have the dtype of the weights, {short(dtype)}, got {short(input.dtype)}.")

    def extra_repr(self) -> str:
        """The settings that torch.nn.RNN shows, and the initialisation."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"nonlinearity={self.nonlinearity!r}, bias={self.bias}, batch_first={self.batch_first}, init={self.init!r}"
            + (", factored=True" if self.factored else "")
        )


class OrthogonalRNN(_RNN):
    r"""torch.nn.RNN with an orthogonal hidden weight W.

        h_t = f(V x_t + W h_(t-1) + b)                 f is "relu" or "tanh"
        h_t = modrelu(V x_t + W h_(t-1), bias=b)       "modrelu"; with bias=False, the identity replaces modrelu

    A product with W preserves the norm of the gradient, so W causes no decay or growth over any number of steps. The
    parameters have the names of torch.nn.RNN, but there is a single bias: in layer k, `weight_ih_l{k}` is V,
    `weight_hh_l{k}` is W and `bias_l{k}` is b. `orthogonal_parameters` returns W, but not V and b.

    Args:
        input_size, hidden_size, num_layers: integers >= 1, as in torch.nn.RNN.
        nonlinearity: "relu", "tanh" or "modrelu".
        bias: whether there is a bias b, which is initialised with zeros.
        batch_first: whether inputs and outputs are (N, T, ...) instead of (T, N, ...).
        init: the initialisation of W: "henaff", "cayley", "haar" or "identity". V is initialised uniformly in
            +-1 / sqrt(hidden_size).
        device, dtype: the device and the dtype of the parameters; float32 or float64.
        factored: as in `OrthogonalLinear`: the backward keeps the factors of the gradient of W, which have T N rows,
            for `ProjUNN`.

    Raises:
        ValueError: a size is below 1, or the nonlinearity or `init` is unknown. TypeError: another dtype.

    Sources: Kiani et al., projUNN (2203.05483); Henaff et al. (1602.06662).
    """

    _dtypes = (torch.float32, torch.float64)
    _nonlinearities = get_args(Nonlinearity)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "relu",
        bias: bool = True,
        batch_first: bool = False,
        init: Init = "henaff",
        device: Any = None,
        dtype: torch.dtype | None = None,
        factored: bool = False,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        super().__init__(
            input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, init, device, dtype, factored
        )


class UnitaryRNN(_RNN):
    """A recurrent network with complex hidden states, a unitary hidden weight and modReLU.

        h_t = modrelu(V x_t + W h_(t-1), bias=b)       with bias=False, the identity replaces modrelu

    The input is real or complex. The output is complex; `output.abs()` or `torch.view_as_real(output)` turns it into
    real features. The parameters have the names and meanings of `OrthogonalRNN`; V and W are complex, and b is real.

    Args:
        input_size, hidden_size, num_layers: integers >= 1, as in torch.nn.RNN.
        bias: whether there is a bias b, which is initialised with zeros.
        batch_first: whether inputs and outputs are (N, T, ...) instead of (T, N, ...).
        init: the initialisation of W: "henaff", "cayley", "haar" or "identity". V is initialised uniformly, with the
            mean square 1 / (3 hidden_size).
        device, dtype: the device and the dtype of the parameters; complex64 or complex128, where b has the real dtype
            of the same precision.
        factored: as in `OrthogonalLinear`.

    Raises:
        ValueError: a size is below 1, or `init` is unknown. TypeError: another dtype.

    Sources: Arjovsky et al. (1511.06464); Kiani et al., projUNN (2203.05483).
    """

    _dtypes = (torch.complex64, torch.complex128)
    _nonlinearities = ("modrelu",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        init: Init = "henaff",
        device: Any = None,
        dtype: torch.dtype | None = None,
        factored: bool = False,
    ) -> None:
        dtype = dtype or torch.get_default_dtype().to_complex()
        super().__init__(
            input_size, hidden_size, num_layers, "modrelu", bias, batch_first, init, device, dtype, factored
        )

    def forward(self, input: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same as `OrthogonalRNN.forward`, for complex hidden states.

        `input` is complex, in the dtype of the weights, or real, in the same or a lower precision than the weights.
        `h0` and both results are complex.
        """
        dtype = self.weight_hh_l0.dtype
        real = isinstance(input, Tensor) and input.is_floating_point()
        fits = real and torch.promote_types(input.dtype, dtype) == dtype
        return super().forward(input.to(dtype) if fits else input, h0)
