"""Modules that hold parameters and call functional.py; no math here. For use without Hugging Face PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .checks import BASE_DTYPES, check_number
from .dispatch import check_backend_name
from .four_bit import FourBit, quantize
from .functional import compute_dtype, dora_linear, lora_linear
from .norm_cache import NormCache


class LoRALinear(nn.Module):
    """``y = x Wᵀ + b + (alpha / r) (D(x) Aᵀ) Bᵀ`` with ``W`` and ``b`` frozen (Hu et al., "LoRA", 2021).

    Built by :meth:`from_linear`. ``lora_A [r, K]`` starts Kaiming-uniform and ``lora_B [N, r]`` zero, as in PEFT, so
    that a fresh layer computes what the base layer did.
    """

    def __init__(
        self,
        weight: Tensor | FourBit,
        bias: Tensor | None,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        fan_in_fan_out: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        """See :meth:`from_linear`; ``weight`` is ``[N, K]``, or ``[K, N]`` with ``fan_in_fan_out``."""
        super().__init__()
        _check_settings(r, alpha, dropout, adapter_dtype)
        check_backend_name(backend)
        self._hold(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.fan_in_fan_out = fan_in_fan_out
        self.out_features, self.in_features = reversed(weight.shape) if fan_in_fan_out else weight.shape
        self.r, self.alpha, self.dropout, self.backend = r, alpha, dropout, backend
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=adapter_dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=adapter_dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        adapter_dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> Self:
        """An adapter of rank ``r`` on ``linear``, whose weight and bias are shared, not copied, and frozen.

        Args:
            linear: ``torch.nn.Linear``, or GPT-2's ``Conv1D`` (weight ``[K, N]``).
            r: rank, at least 1.
            alpha: the scaling is ``alpha / r``; ``alpha`` is ``r`` when left out.
            dropout: probability in [0, 1) with which the adapter's inputs are dropped in training.
            adapter_dtype: dtype of ``lora_A`` and ``lora_B``, float32 as in PEFT.
            backend: see :func:`fastpeft.functional.lora_linear`.

        Raises:
            TypeError: ``linear`` is of another class. ValueError: a number is out of its range.
        """
        fan_in_fan_out = _is_conv1d(linear)
        return cls(
            linear.weight,  # type: ignore[arg-type]
            linear.bias,  # type: ignore[arg-type]
            r,
            float(r) if alpha is None else alpha,
            dropout,
            fan_in_fan_out=fan_in_fan_out,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )

    @property
    def scaling(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.r

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        return lora_linear(
            x,
            self.matrix(),
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.dropout,
            self.training,
            backend=self.backend,
        )

    def _hold(self, weight: Tensor | FourBit) -> None:
        assert isinstance(weight, Tensor)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def matrix(self) -> Tensor | FourBit:
        """The weight ``[N, K]``, as :mod:`fastpeft.functional` takes it."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}"
        )


class DoRALinear(LoRALinear):
    """``y = c (x Wᵀ + (alpha / r) (x Aᵀ) Bᵀ) + b`` with ``c = m / ‖W + (alpha / r) B A‖`` (Liu et al., "DoRA", 2024).

    Built by :meth:`from_linear`. The magnitude ``lora_magnitude_vector [N]`` starts as the norm of each row of ``W``,
    so that a fresh layer computes what the base layer did. For the formula with dropout and for what is kept see
    :func:`fastpeft.functional.dora_linear`. The norm is computed anew only when ``W``, ``A``, ``B`` or ``alpha``
    have changed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`from_linear`."""
        super().__init__(*args, **kwargs)
        self._norms = NormCache()
        self.lora_magnitude_vector = nn.Parameter(self.weight_norm().to(self.lora_A.dtype))

    def weight_norm(self, tokens: int = 1) -> Tensor:
        """``‖W + (alpha / r) B A‖`` of each output row: ``[N]``, float32 or float64.

        Args:
            tokens: of the call that it is for; see :class:`fastpeft.norm_cache.NormCache`.
        """
        check_backend_name(self.backend)
        weight = self.matrix()
        settings = self.scaling, compute_dtype(weight), self.backend
        return self._norms.get(weight, self.lora_A, self.lora_B, *settings, tokens=tokens)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        return dora_linear(
            x,
            self.matrix(),
            self.bias,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector,
            self.scaling,
            self.dropout,
            training=self.training,
            norm=self.weight_norm(x.numel() // max(1, self.in_features)),
            backend=self.backend,
        )


class QLoRALinear(LoRALinear):
    """:class:`LoRALinear` whose frozen weight is kept in 4 bits (Dettmers et al., "QLoRA", 2023).

    Built by :meth:`from_linear`. The products decode the weight tile by tile; a dense one never exists. ``weight``
    holds the packed codes (uint8), the buffers ``weight_...`` what they stand for, in the dtypes of bitsandbytes: a
    change of the module's dtype leaves them as they are. Computes in the input's dtype, or in autocast's.
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        nested: bool = True,
        adapter_dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> Self:
        """An adapter of rank ``r`` on ``linear``, whose weight is quantized (a copy) and whose bias is shared, frozen.

        Args:
            linear, r, alpha, dropout, adapter_dtype, backend: as for :meth:`LoRALinear.from_linear`.
            quant_type: ``"nf4"`` or ``"fp4"``.
            blocksize: elements that share a scale: 32, 64, 128, ... or 4096.
            nested: whether the scales are quantized too, to 8 bits.

        Raises:
            TypeError: ``linear`` is of another class, or its weight of another dtype than float32, float16 or bfloat16.
            ValueError: a number is out of its range.
        """
        weight: Tensor = linear.weight.t() if _is_conv1d(linear) else linear.weight  # type: ignore[assignment, operator]
        return cls(
            quantize(weight, quant_type, blocksize, nested),
            linear.bias,  # type: ignore[arg-type]
            r,
            float(r) if alpha is None else alpha,
            dropout,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )

    def _hold(self, weight: Tensor | FourBit) -> None:
        assert isinstance(weight, FourBit)
        self.blocksize = weight.blocksize
        self.register_buffer("weight", weight.packed)
        self.register_buffer("weight_code", weight.code)
        self.register_buffer("weight_absmax", weight.absmax)
        for name, tensor in zip(_NESTED, weight.nested or (), strict=False):
            self.register_buffer(name, tensor)

    def matrix(self) -> FourBit:
        """The weight ``[N, K]`` in 4 bits, as :mod:`fastpeft.functional` takes it."""
        code, absmax = self._buffers["weight_code"], self._buffers["weight_absmax"]
        nested = tuple(self._buffers[name] for name in _NESTED if name in self._buffers)
        shape = self.out_features, self.in_features
        return FourBit(self.weight, code, absmax, nested or None, shape, self.blocksize)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)
        return self


class QDoRALinear(QLoRALinear, DoRALinear):
    """:class:`DoRALinear` whose frozen weight is kept in 4 bits; :meth:`from_linear` is :class:`QLoRALinear`'s."""


def _check_settings(r: object, alpha: object, dropout: object, adapter_dtype: object) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an integer, got {r!r}")
    if r < 1:
        raise ValueError(f"r must be a rank of at least 1, got {r}")
    check_number("alpha", alpha)
    if not math.isfinite(alpha):  # type: ignore[arg-type]
        raise ValueError(f"alpha must be finite, got {alpha}")
    check_number("dropout", dropout)
    if not 0.0 <= dropout < 1.0:  # type: ignore[operator]
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if not isinstance(adapter_dtype, torch.dtype):
        raise TypeError(f"adapter_dtype must be a torch.dtype, got {type(adapter_dtype).__name__}")
    if adapter_dtype not in BASE_DTYPES:
        raise TypeError(f"adapter_dtype must be float64, float32, float16 or bfloat16, got {adapter_dtype}")


_NESTED = ("weight_code2", "weight_absmax2", "weight_offset")


def _is_conv1d(linear: nn.Module) -> bool:
    """Whether ``linear`` is GPT-2's ``Conv1D``; TypeError where it is no linear layer at all."""
    conv1d = type(linear).__name__ == "Conv1D"
    if not conv1d and not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be a torch.nn.Linear or a Conv1D, got {type(linear).__name__}")
    return conv1d
