"""The frozen layer inside a PEFT layer: its weight as ``[N, K]`` and its bias, or why PEFT has to run the call."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from ..checks import BASE_DTYPES, is_autocast
from ..four_bit import FourBit, from_bitsandbytes
from .stock import Stock

_4BIT_CLASSES = ("Linear4bit", "LinearNF4", "LinearFP4")
_LIKE_LINEAR = ("transformers.models.falcon.modeling_falcon.FalconLinear",)  # its forward says the same in other words
_ON_META = "its base layer's weight is on the meta device, where nothing is computed"
STOCK = Stock((nn.Linear, "forward"), (Conv1D, "forward"))
_stocks: dict[type[nn.Module], Stock] = {}  # of such classes


class Base(NamedTuple):
    """What a base layer computes with, in ``dtype``; None where a 4-bit layer has not settled it yet.

    Of a layer that fastpeft calls as it is there is no weight, and ``unread`` says why.
    """

    weight: Tensor | FourBit | None
    bias: Tensor | None
    dtype: torch.dtype | None
    unread: str = ""


def _unread(reason: str) -> Base:
    return Base(None, None, None, reason)


def read_base(layer: Any, multiplies: bool) -> Base | str:
    """The base of a PEFT layer, or why PEFT has to run it; ``multiplies``: it is one to be called as it is."""
    base = layer._modules["base_layer"]
    replaced = STOCK.replaced()
    if replaced is not None:  # the adapters' matrices are such layers, too
        return replaced
    if multiplies:
        return _unread("its weight has a form of another library's")
    four_bit = _is_4bit(base)
    if not four_bit and type(base) is not nn.Linear and type(base) is not Conv1D and not _is_like_linear(base):
        reason = f"its base layer is a {class_name(base)}"
        # Torch's own classes are for something else each: the one in MultiheadAttention is never called.
        return reason if type(base).__module__.startswith("torch.") else _unread(reason)
    if is_hooked(base):
        return _unread("its base layer has a hook or a forward of its own")
    stock = _stocks.get(type(base))
    replaced = None if stock is None else stock.replaced()
    if replaced is not None:
        return _unread(replaced)
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if bias is not None and not is_plain(bias):
        kinds = f"weight is a {type(weight).__qualname__} and its bias a {type(bias).__qualname__}"
        return _unread(f"its base layer's {kinds}")
    if four_bit:
        packed = _four_bit_weight(layer, base)
        return packed if isinstance(packed, str) else Base(packed, bias, base.compute_dtype)
    if weight is None:
        return "its base layer's weight is no Parameter: the layer is parametrized, a replica or a shard"
    if not is_plain(weight):
        return _unread(f"its base layer's weight is a {type(weight).__qualname__}")
    if weight.is_meta:
        return _ON_META
    if weight.dtype not in BASE_DTYPES:
        return _unread(f"its base layer's weight is {weight.dtype}")
    if bias is not None and bias.dtype != weight.dtype and not _autocast_takes(weight, bias):
        return f"its base layer's weight is {weight.dtype} and its bias {bias.dtype}, without autocast"
    return Base(weight.t() if type(base) is Conv1D else weight, bias, weight.dtype)


def unread_weight(layer: Any) -> Tensor | FourBit | str:
    """``W [N, K]`` of a base layer that is called as it is, dense as PEFT's DoRA takes its norm, or what is wrong with
    it. Of a layer that holds another form of it, a new tensor in each call."""
    base = layer._modules["base_layer"]
    bias = getattr(base, "bias", None)
    if bias is not None and not is_plain(bias):
        return f"its base layer's bias is a {type(bias).__qualname__}"
    if _is_4bit(base):
        return _four_bit_weight(layer, base)
    weight = base._parameters.get("weight")
    if not hasattr(base, "W_q"):  # HQQ's layers have that instead
        if weight is None:  # a hook may make it in the base's own call
            return "its base layer's weight is no Parameter"
        if type(weight).__qualname__ == "Int8Params" and (weight.dtype != torch.int8 or _statistics(base) is None):
            return "its 8-bit base weight is not quantized yet, or has lost what describes it"
    try:
        with torch.no_grad():
            dense = _dequantized(base, weight)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        return f"its base layer's weight cannot be dequantized: {error}"
    reason = dense_reason(dense)
    if reason is not None:
        return reason
    return dense.t() if getattr(layer, "fan_in_fan_out", False) else dense


def dense_reason(weight: Any) -> str | None:
    """What is wrong with a weight that is to be read as a dense matrix."""
    if not is_plain(weight):
        return f"its base layer's weight is a {type(weight).__qualname__}"
    if weight.is_meta:
        return _ON_META
    if weight.dtype not in BASE_DTYPES:
        return f"its base layer's weight is {weight.dtype}"
    return None


def _statistics(base: Any) -> Tensor | None:
    """Of a bitsandbytes 8-bit layer."""
    return base.weight.SCB if base.state.SCB is None else base.state.SCB


def _dequantized(base: Any, weight: Tensor | None) -> Any:
    """What PEFT's function gives. That puts a Parameter without its statistics into an 8-bit layer on the CPU, so that
    the layer's next call raises; and no compiler can look into it."""
    if type(weight).__qualname__ == "Int8Params":
        return dequantize_bnb_weight(weight, state=base.state)
    return weight if is_plain(weight) else dequantize_module_weight(base)


def _autocast_takes(weight: Tensor, bias: Tensor) -> bool:
    """Whether autocast casts both to its own dtype."""
    return is_autocast(weight) and is_autocast(bias)


def _is_like_linear(base: nn.Module) -> bool:
    """Whether its class is another one with the forward of torch's Linear; torch's own are for something else each, as
    the one in MultiheadAttention, which is never called."""
    kind = type(base)
    if kind in _stocks:
        return True
    if not issubclass(kind, nn.Linear) or kind.__call__ is not nn.Linear.__call__ or kind.__module__[:6] == "torch.":
        return False
    if class_name(base) in _LIKE_LINEAR:
        _stocks[kind] = Stock((kind, "forward"))
        return True
    return kind.forward is nn.Linear.forward


def _is_4bit(base: nn.Module) -> bool:
    """Whether it is exactly one of bitsandbytes' 4-bit layers."""
    kind = type(base)
    return kind.__module__ == "bitsandbytes.nn.modules" and kind.__qualname__ in _4BIT_CLASSES


class FourBitCache:
    """What was read of a 4-bit weight, which takes as long as a small layer's product; it holds as long as the weight
    consists of the same tensors. Copies and pickles start empty."""

    def __init__(self) -> None:
        self.kept: tuple[tuple[int, int], tuple[Any, ...], FourBit] | None = None

    def __deepcopy__(self, memo: object) -> FourBitCache:
        return FourBitCache()

    def __reduce__(self) -> tuple[type[FourBitCache], tuple[()]]:
        return FourBitCache, ()


def _four_bit_weight(layer: Any, base: Any) -> FourBit | str:
    """The weight of a bitsandbytes 4-bit layer, or what is wrong with it. FSDP hands out a plain Parameter, without the
    ``quant_state`` that the layer then has."""
    weight = base._parameters.get("weight")
    state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
    if weight is None or state is None or not (type(weight).__qualname__ == "Params4bit" or is_plain(weight)):
        return "its 4-bit base weight is not quantized yet, or has lost what describes it"
    if torch.compiler.is_compiling():  # a graph guards what it read by itself
        return _read_four_bit(weight, state)
    memory = weight.data_ptr(), weight.numel()
    parts = (*vars(state).values(), *(vars(state.state2).values() if state.nested else ()))
    cache = layer.__dict__.setdefault("_fastpeft_four_bit", FourBitCache())
    kept = cache.kept
    if (
        kept is not None
        and kept[0] == memory
        and kept[2].packed.data_ptr() == memory[0]  # FSDP gives memory back; then another tensor may have the address
        and len(kept[1]) == len(parts)
        and all(map(is_, kept[1], parts))
    ):
        return kept[2]
    with torch.inference_mode(False):  # training may follow an evaluation, and cannot keep an inference tensor
        found = _read_four_bit(weight, state)
    # Not a copy, which would miss what is written into the weight.
    if isinstance(found, FourBit) and found.packed.data_ptr() == weight.data_ptr():
        cache.kept = memory, parts, found
    return found


def _read_four_bit(weight: Tensor, state: Any) -> FourBit | str:
    try:
        return from_bitsandbytes(weight, state)
    except (TypeError, ValueError) as error:
        return f"its 4-bit base weight cannot be read: {error}"


def is_plain(tensor: object) -> bool:
    """Whether it is a tensor of no subclass, as parameters are, or stands for one where torch traces shapes alone."""
    return type(tensor) is nn.Parameter or type(tensor) is Tensor or type(tensor) is FakeTensor


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state  # put there by accelerate, among others
    )


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
