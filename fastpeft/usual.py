"""The call that nearly every layer makes, told apart and computed in one step in C++ (csrc/usual.h): the way through
checks, functional, ops and dispatch takes as long as a small layer, and twice as long when a large weight has just gone
through the caches. What is not usual goes that way, which knows what is wrong or what else is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import dispatch, dropout, extension, ops
from .backends.compiled import ON_THE_CPU, CompiledBackend
from .call import Adapters
from .four_bit import FourBit


def is_usual(x: Any, weight: Any, bias: Any, adapters: Adapters, training: Any) -> bool:
    """Whether the arguments of a call with one adapter are right beyond doubt."""
    C = _extension()
    return C is not None and C.is_usual(*_arguments(x, weight, bias, adapters, training))


def lora_linear(x: Any, weight: Any, bias: Any, adapters: Adapters, training: Any, backend: Any) -> Tensor | None:
    """``y`` of a usual call, differentiable; None where the call is another one."""
    C = _extension()
    if C is None or ops.is_transformed():
        return None
    where = _where(x, weight, backend)
    return None if where is None else C.usual_lora_linear(*_arguments(x, weight, bias, adapters, training), where)


def lora_shared_linear(x: Tensor, calls: Sequence[tuple[Any, Any, Adapters]], backend: Any) -> list[Tensor] | None:
    """``y`` of usual calls on the same ``x``, each of a weight, a bias and one LoRA adapter, in training; computed
    together, differentiable. None where one of them is another call, or there is nothing to gain."""
    C = _extension()
    if C is None or ops.is_transformed():
        return None
    where = _where(x, calls[0][0], backend)
    if where is None:
        return None
    return C.usual_lora_shared_linear([_arguments(x, *call, True) for call in calls], where) or None


def _where(x: Any, weight: Any, backend: Any) -> tuple[int, int, int] | None:
    """Where a compiled backend runs a call whose dtypes are usual; None where none takes it."""
    if backend in (None, "cpu") and isinstance(x, Tensor) and x.is_cpu:
        return ON_THE_CPU
    if backend not in (None, "cuda") or type(x) is not Tensor:
        return None
    run = dispatch.named("cuda")
    assert isinstance(run, CompiledBackend)
    data = weight.packed if isinstance(weight, FourBit) else weight
    return run.where(x) if isinstance(data, Tensor) and run.refuses(x, data, ()) is None else None


def _extension() -> ModuleType | None:
    """None, too, where a compiler could not look into it."""
    return None if torch.compiler.is_compiling() else extension.C


def _arguments(x: Any, weight: Any, bias: Any, adapters: Adapters, training: Any) -> tuple[Any, ...]:
    rest = bias, adapters, training, dropout.dropout_seeds
    if isinstance(weight, FourBit) and len(weight.shape) == 2:
        return x, weight.packed, weight.quant, weight.blocksize, weight.shape, *rest
    return x, weight, [], 0, None, *rest
