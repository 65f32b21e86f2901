"""Layers that read the same x, one after the other: q, k and v of an attention, gate and up of an MLP. The call of the
first computes them all in one pass over x each way; each later one takes its result.

Which they are, calls show: what was called next with the same tensor every time. A result is taken by the layer that it
was computed for, if it is called with that tensor and the parameters that it was computed from, all unchanged; else the
layer computes by itself, as all of them do at first.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks

from .. import extension, usual
from ..four_bit import FourBit
from .operands import Operands


class _Waiting(NamedTuple):
    """A result, and what it was computed from."""

    y: Tensor
    key: tuple[Any, ...]
    operands: Operands  # so that the key's addresses stay theirs


class _Calls:
    """Those of one thread with the same x, and the results that wait for those to come."""

    def __init__(self, first: nn.Module, x: Tensor) -> None:
        self.x, self.version = ref(x), x._version
        self.layers = [ref(first)]
        self.waiting: dict[nn.Module, _Waiting] = {}

    def take(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether a call of ``layer`` is one of them."""
        known = self.x() is x and self.version == x._version and ref(layer) not in self.layers
        if known:
            self.layers.append(ref(layer))
        return known


_thread = threading.local()
_followers: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], ...]] = WeakKeyDictionary()


def shared_linear(layer: Any, operands: Operands, x: Tensor) -> Tensor | None:
    """``layer``'s result if it is computed together with others'; None where it has to compute by itself."""
    y, note = _computed(layer, operands, x)
    layer.__dict__["_fastpeft_note"] = note
    return y


def note_on(layer: Any) -> str:
    """What became of sharing in its last call, in words."""
    note: str = layer.__dict__.get("_fastpeft_note", "whether other layers read the same x, no call has shown yet")
    return note


def _computed(layer: Any, operands: Operands, x: Tensor) -> tuple[Tensor | None, str]:
    if extension.C is None:
        return None, "it reads x alone: the C++ extension is not built"
    if torch.is_grad_enabled() and _top_saved_tensors_default_hooks(True) is not None:
        # What is computed again for the backward pass has to keep the same tensors, whoever else reads x by then.
        return None, "it reads x alone: saved tensors go through hooks, as where activations are checkpointed"
    if x.is_inference():
        return None, "it reads x alone: tensors of inference mode do not tell whether they were changed"
    calls = getattr(_thread, "calls", None)
    if calls is None or not calls.take(layer, x):
        if calls is not None:
            _learn(calls)
        _thread.calls = calls = _Calls(layer, x)
        return _compute_all(calls, layer, operands, x)
    waiting = calls.waiting.pop(layer, None)
    if waiting is None:
        return None, "it reads x alone: it was not called next to the others each time"
    if waiting.key != _key(operands):
        return None, "it reads x alone: its parameters changed since the first of the layers was called"
    return waiting.y, "it reads x together with the layer that was called before it"


def _learn(calls: _Calls) -> None:
    """Followers of a layer are those that came every time."""
    first, seen = calls.layers[0](), tuple(calls.layers[1:])
    if first is None:
        return
    known = _followers.get(first)
    if known is not None and known != seen:
        same = (i for i, (a, b) in enumerate(zip(known, seen, strict=False)) if a != b)
        seen = known[: next(same, min(len(known), len(seen)))]
    _followers[first] = seen


def _compute_all(calls: _Calls, layer: Any, operands: Operands, x: Tensor) -> tuple[Tensor | None, str]:
    others = [follower() for follower in _followers.get(layer, ())]
    if not others:
        return None, "it reads x alone: no other fused layer is called next with the same tensor"
    found = [layer_operands(other, layer, x) for other in others]
    every = [operands, *(each for each in found if each is not None)]
    if len(every) <= len(found) or not all(_are_own(each) for each in every):
        return None, "it reads x alone: PEFT has to run one of the others, or its A and B are made anew in each call"
    results = usual.lora_shared_linear(x, every, layer.fastpeft_backend)
    if results is None:
        return None, (
            "it reads x alone: the call has few tokens, autocast is on, something watches it, or one of the layers has "
            "DoRA, several adapters, a trained weight or a scaling that is a tensor"
        )
    for other, its, y in zip(others, every[1:], results[1:], strict=True):
        assert other is not None
        calls.waiting[other] = _Waiting(y, _key(its), its)
    after = "layer that is" if len(others) == 1 else f"{len(others)} layers that are"
    return results[0], f"it reads x together with the {after} called after it"


def layer_operands(other: Any, layer: Any, x: Tensor) -> Operands | None:
    """Those of a call of another layer with the same x, if the two can be computed together."""
    if other is None or not getattr(other, "fastpeft_shares_input", False):
        return None
    if other.fastpeft_backend != layer.fastpeft_backend:
        return None
    operands: Operands | None = other.fused_operands(x)
    return operands


def _are_own(operands: Operands) -> bool:
    adapters = operands.adapters
    return all(isinstance(factor, nn.Parameter) for factor in (*adapters.A, *adapters.B))


def _key(operands: Operands) -> tuple[Any, ...]:
    """Equal for operands of the same tensors, which nobody wrote to, in the same mode."""
    assert extension.C is not None
    weight, bias, adapters = operands
    tensors = [*adapters.A, *adapters.B]
    if isinstance(weight, FourBit):
        tensors += weight.packed, *weight.quant
    elif weight is not None:
        tensors.append(weight)
    if bias is not None:
        tensors.append(bias)
    needs = [t.requires_grad for t in tensors]
    return extension.C.identity(tensors), needs, adapters.scaling, adapters.dropout_p, torch.is_grad_enabled()
