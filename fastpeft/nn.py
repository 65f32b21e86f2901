"""Modules that hold parameters and call functional.py; no math here. For use without Hugging Face PEFT."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from .dispatch import check_backend_name
from .functional import compute_dtype, dora_linear, lora_linear
from .norm_cache import NormCache


class LoRALinear(nn.Module):
    """``y = x Wᵀ + b + (alpha / r) (D(x) Aᵀ) Bᵀ`` with ``W`` and ``b`` frozen (Hu et al., "LoRA", 2021).

    Built by :meth:`from_linear`. ``lora_A [r, K]`` starts Kaiming-uniform and ``lora_B [N, r]`` zero, as in PEFT, so
    that a fresh layer computes what the base layer did.
    """

    def __init__(
        self,
        weight: Tensor,
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
        if r < 1:
            raise ValueError(f"r must be a rank of at least 1, got {r}")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if not adapter_dtype.is_floating_point:
            raise TypeError(f"adapter_dtype must be a floating dtype, got {adapter_dtype}")
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
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
        fan_in_fan_out = type(linear).__name__ == "Conv1D"
        if not fan_in_fan_out and not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear or a Conv1D, got {type(linear).__name__}")
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
            self._matrix(),
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.dropout,
            self.training,
            backend=self.backend,
        )

    def _matrix(self) -> Tensor:
        """The weight as ``[N, K]``."""
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

    def weight_norm(self) -> Tensor:
        """``‖W + (alpha / r) B A‖`` of each output row: ``[N]``, float32 or float64."""
        check_backend_name(self.backend)
        weight = self._matrix()
        dtype = compute_dtype(weight)
        return self._norms.get(weight, self.lora_A, self.lora_B, self.scaling, dtype, self.backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        return dora_linear(
            x,
            self._matrix(),
            self.bias,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector,
            self.scaling,
            self.dropout,
            self.training,
            norm=self.weight_norm(),
            backend=self.backend,
        )
