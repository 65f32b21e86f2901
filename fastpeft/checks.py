"""Checks of what users pass to functional.py: each error names the argument, what was expected and what it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import ops
from .call import Adapters
from .four_bit import FourBit
from .reference import expert_rows
from .usual import is_usual

BASE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OFFSET_DTYPES = (torch.int32, torch.int64)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_adapters(A: Any, B: Any, scaling: Any, dropout_p: Any, adapter_index: Tensor | None = None) -> Adapters:
    """The adapters' arguments as lists of one length each, once they are tensors and lists at all."""
    As, Bs = tensors("A", A), tensors("B", B)
    scalings = list(scaling) if isinstance(scaling, (list, tuple)) else [scaling] * len(As)
    ps = list(dropout_p) if isinstance(dropout_p, (list, tuple)) else [dropout_p] * len(As)
    return Adapters(As, Bs, [], scalings, ps, None, adapter_index)


def check_call(x: Tensor, weight: Tensor | FourBit, bias: Tensor | None, adapters: Adapters, training: object) -> None:
    """Raises TypeError or ValueError where an argument does not fit the others."""
    if is_usual(x, weight, bias, adapters, training):
        return
    check_weight(weight)
    check_input(x, bias, tuple(weight.shape))
    check_device("weight", weight, x)
    check_adapters(x, weight.shape, adapters)
    check_index(x, adapters)
    check_training(training)
    check_dtype(x, weight)


def check_grouped(
    x: Tensor, offsets: Tensor, weight: Tensor | FourBit, bias: Tensor | None, adapters: Adapters, training: object
) -> None:
    """The same of experts whose weights are stacked; on a GPU what the offsets hold is not looked at."""
    check_stack(weight)
    check_input(x, bias, tuple(weight.shape))
    if x.dim() != 2:
        raise ValueError(f"x must have shape [T, K={weight.shape[2]}], got {list(x.shape)}")
    check_device("weight", weight, x)
    check_adapters(x, weight.shape, adapters)
    check_offsets(offsets, x, weight.shape[0])
    check_training(training)
    check_dtype(x, weight)


def check_offsets(offsets: Tensor, x: Tensor, experts: int) -> None:
    check_tensor("offsets", offsets)
    if offsets.dtype not in OFFSET_DTYPES:
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}")
    if offsets.shape != (experts + 1,):
        raise ValueError(f"offsets must have shape [E + 1 = {experts + 1}], got {list(offsets.shape)}")
    check_device("offsets", offsets, x)
    if is_readable(offsets):
        expert_rows(offsets, len(x))


def check_update(x: Tensor, bias: Tensor | None, adapters: Adapters, training: object) -> None:
    """The same without a weight: the first adapter says how many inputs and outputs there are."""
    check_tensor("x", x)
    for name, matrices in (("A", adapters.A), ("B", adapters.B)):
        if matrices and matrices[0].dim() != 2:
            raise ValueError(f"{name} must be a matrix, got shape {list(matrices[0].shape)}")
    shape = adapters.shape if adapters.A and adapters.B else (0, 0)
    check_adapters(x, shape, adapters)
    check_input(x, bias, shape)
    if x.dtype not in BASE_DTYPES:
        raise TypeError(f"x must be float64, float32, float16 or bfloat16, got {x.dtype}")
    check_index(x, adapters)
    check_training(training)


def check_training(training: object) -> None:
    check_flag("training", training)


def check_flag(name: str, flag: object) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_weight(weight: Tensor | FourBit, shape: str = "N, K") -> None:
    if not isinstance(weight, FourBit):
        check_tensor("weight", weight)
        if weight.dtype not in BASE_DTYPES:
            raise TypeError(f"weight must be float64, float32, float16 or bfloat16, got {weight.dtype}")
    if len(weight.shape) != len(shape.split()):
        raise ValueError(f"weight must have shape [{shape}], got {list(weight.shape)}")


def check_stack(weight: Tensor | FourBit) -> None:
    """Of the weights of experts."""
    check_weight(weight, "E, N, K")
    if weight.shape[0] == 0:
        raise ValueError("weight holds no expert; at least one is expected")


def check_dtype(x: Tensor, weight: Tensor | FourBit) -> None:
    """A weight in 4 bits takes an input in any of the dtypes."""
    if not isinstance(weight, FourBit) and x.dtype != weight.dtype and not is_autocast(x):
        raise TypeError(f"x must have the dtype of weight, {weight.dtype}, got {x.dtype} (and autocast casts neither)")


def check_input(x: Tensor, bias: Tensor | None, shape: Sequence[int]) -> None:
    """Of a layer of shape ``[N, K]``, or of stacked ones of shape ``[E, N, K]``."""
    *experts, N, K = shape
    check_tensor("x", x)
    if x.device.type == "meta":
        raise ValueError("x is a meta tensor and holds no data; move the model and its input to a real device first")
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must have shape [..., K={K}], got {list(x.shape)}")
    if bias is not None:
        check_tensor("bias", bias)
        if not bias.is_floating_point():
            raise TypeError(f"bias must have a floating dtype, got {bias.dtype}")
        if bias.shape != (*experts, N):
            raise ValueError(f"bias must have shape [{_stack(experts)}N={N}], got {list(bias.shape)}")
        check_device("bias", bias, x)


def _stack(experts: Sequence[int]) -> str:
    """How the shape of a stack begins."""
    return "".join(f"E={count}, " for count in experts)


def check_adapters(x: Tensor, shape: Sequence[int], adapters: Adapters) -> None:
    As, Bs, _, scalings, ps, *_ = adapters
    count = len(As)
    if count == 0:
        raise ValueError("A holds no adapter; at least one is expected")
    for name, values in (("B", Bs), ("scaling", scalings), ("dropout_p", ps)):
        if len(values) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} adapters in A, got {len(values)}")
    *experts, N, K = shape
    stack = _stack(experts)
    for i, (A, B, s, p) in enumerate(zip(As, Bs, scalings, ps, strict=True)):
        at = f"[{i}]" if count > 1 else ""
        if not A.is_floating_point() or not B.is_floating_point():
            raise TypeError(f"A{at} and B{at} must have floating dtypes, got {A.dtype} and {B.dtype}")
        if A.dim() != len(shape) or A.shape[:-2] != tuple(experts) or A.shape[-1] != K or A.shape[-2] == 0:
            expected = f"[{stack}r, K={K}]"
            raise ValueError(f"A{at} must have shape {expected} with a rank r of at least 1, got {list(A.shape)}")
        if B.shape != (*experts, N, A.shape[-2]):
            raise ValueError(f"B{at} must have shape [{stack}N={N}, r={A.shape[-2]}], got {list(B.shape)}")
        check_device(f"A{at}", A, x)
        check_device(f"B{at}", B, x)
        check_scaling(f"scaling{at}", s)
        check_dropout_p(f"dropout_p{at}", p)


def check_dropout_p(name: str, p: Any) -> None:
    check_number(name, p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {p}")


def check_scaling(name: str, s: float | Tensor) -> None:
    if isinstance(s, Tensor):
        if s.is_meta:
            raise ValueError(f"{name} is a meta tensor and holds no number")
        if s.numel() != 1:
            raise ValueError(f"{name} must hold one number, got a tensor of shape {list(s.shape)}")
        if not is_readable(s):
            return
        s = s.item()
    check_number(name, s)
    if not -math.inf < s < math.inf:  # traces where torch.compile holds s as a symbol; math.isfinite does not
        raise ValueError(f"{name} must be finite, got {s}")
    if isinstance(s, int):
        try:
            float(s)
        except OverflowError:
            raise ValueError(f"{name} must fit a float, got an integer of {s.bit_length()} bits") from None


def check_index(x: Tensor, adapters: Adapters) -> None:
    index = adapters.adapter_index
    if index is None:
        return
    check_tensor("adapter_index", index)
    if index.dtype not in INDEX_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INDEX_DTYPES)
        raise TypeError(f"adapter_index must have an integer dtype ({names}), got {index.dtype}")
    if index.shape != x.shape[:-1]:
        raise ValueError(
            f"adapter_index must have the leading shape of x, {list(x.shape[:-1])}, got {list(index.shape)}"
        )
    check_device("adapter_index", index, x)
    if is_readable(index) and index.numel():
        least, most = (int(bound) for bound in index.aminmax())
        if least < -1 or most >= len(adapters.A):
            raise ValueError(f"adapter_index must be from -1 to {len(adapters.A) - 1}, got {least} to {most}")


def dora_factors(magnitude: Any, norm: Any, weight: Tensor | FourBit, x: Tensor, wide: torch.dtype) -> list[Tensor]:
    """DoRA's ``c = m / norm`` of each adapter in the dtype ``wide``, once magnitudes and norms fit the weight.

    Raises:
        ValueError: a row's ``c`` is not finite. Else as :func:`check_call`.
    """
    magnitudes, norms = tensors("magnitude", magnitude), tensors("norm", norm)
    *experts, N, _ = weight.shape
    for name, values in (("magnitude", magnitudes), ("norm", norms)):
        for i, value in enumerate(values):
            at = f"[{i}]" if len(values) > 1 else ""
            if not value.is_floating_point():
                raise TypeError(f"{name}{at} must have a floating dtype, got {value.dtype}")
            if value.shape != (*experts, N):
                raise ValueError(f"{name}{at} must have shape [{_stack(experts)}N={N}], got {list(value.shape)}")
            check_device(f"{name}{at}", value, x)
            if name == "norm" and is_readable(value) and value.isinf().any():
                raise ValueError(f"norm{at} must be finite, and is infinite in {_row(_first(value.isinf()))}")
    factors = []
    for i, (m, n) in enumerate(zip(magnitudes, norms, strict=True)):
        c = (m.to(wide) / n.detach()).to(wide)
        if is_readable(c) and not is_finite(c):
            found = _first(~c.isfinite())
            at = f"[{i}]" if len(norms) > 1 else ""
            raise ValueError(
                f"magnitude{at} / ‖W + s B A‖ must be finite, and is {c[found].item()} in {_row(found)}: "
                f"magnitude {m[found].item()}, norm {n[found].item()}"
            )
        factors.append(c)
    return factors


def _first(flags: Tensor) -> tuple[int, ...]:
    """Where the first one is that is true."""
    return tuple(flags.nonzero()[0].tolist())


def _row(index: tuple[int, ...]) -> str:
    *experts, row = index
    return f"row {row}" + "".join(f" of expert {e}" for e in experts)


def check_count(name: str, values: Any, count: int) -> None:
    """Of a list, or one tensor, that goes with ``count`` adapters."""
    found = len(values) if isinstance(values, (list, tuple)) else 1
    if found != count:
        raise ValueError(f"{name} must have one entry for each of the {count} adapters in A, got {found}")


def tensors(name: str, value: Any) -> list[Tensor]:
    """One tensor, or a list of them, as a list."""
    if isinstance(value, (list, tuple)):
        for i, element in enumerate(value):
            check_tensor(f"{name}[{i}]", element)
        return list(value)
    check_tensor(name, value)
    return [value]


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_device(name: str, tensor: Tensor | FourBit, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def is_readable(tensor: Tensor) -> bool:
    """Whether reading values neither waits for a device nor breaks a graph."""
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or ops.is_transformed())


def is_finite(tensor: Tensor) -> bool:
    """Whether all its values are; looks at their sum first, which one operation gives."""
    values = tensor.detach()
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def is_autocast(x: Tensor) -> bool:
    """Whether autocast casts this input."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
