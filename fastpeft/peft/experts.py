"""Mixtures of experts of transformers whose stacks of weights PEFT adapts (``target_parameters``): what one call
computes with, read from PEFT's wrappers and the module inside them, or the reason why PEFT has to run it.

Such a module has, in one parameter each, the matrices of all experts: ``gate_up_proj`` (``up_proj`` where there is no
gate) and ``down_proj``. PEFT puts a ``ParamWrapper`` around it for each that is adapted, one around the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
    use_experts_implementation,
)

from ..checks import BASE_DTYPES
from ..dispatch import BackendRefusal, refusals
from ..functional import compute_dtype, lora_grouped_linear
from .base_layers import class_name, is_hooked, is_plain
from .fused import Fused
from .operands import state_reason
from .readers import is_constant


class Projection(NamedTuple):
    """One matrix of every expert and the adapters on it, if any; ``name`` is its parameter's.

    ``weight [E, N, K]``, ``bias [E, N]`` or None, and of each adapter ``A [E, r, K]``, ``B [E, N, r]`` and a scaling:
    views of what transformers and PEFT hold.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    A: Sequence[Tensor] = ()
    B: Sequence[Tensor] = ()
    scaling: Sequence[float | Tensor] = ()


class Experts(NamedTuple):
    """What a call computes with.

    Attributes:
        module: transformers' own, for its activation and gate.
        up, down: the projections before and after the activation; one at least is adapted.
        as_grouped: whether the module would run transformers' grouped products, which compute in the weight's dtype,
            autocast or not.
    """

    module: Any
    up: Projection
    down: Projection
    as_grouped: bool

    @property
    def adapted(self) -> list[Projection]:
        """Those with adapters."""
        return [projection for projection in (self.up, self.down) if projection.A]

    def refusal(self, backend: str) -> str | None:
        """Why the backend of this name cannot run it: what it says to a call without tokens."""
        for _, weight, bias, A, B, scaling in self.adapted:
            x = weight.new_empty(0, weight.shape[2])
            offsets = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
            try:
                with torch.no_grad():
                    lora_grouped_linear(x, offsets, weight, bias, A, B, scaling, backend=backend)
            except BackendRefusal as refusal:
                return str(refusal)
        return None

    def verdict(self, backend: str | None) -> str:
        """What runs it, in words."""
        who = "the fastest backend that accepts the call" if backend is None else f"{backend}, asked for by name,"
        names = " and ".join(projection.name for projection in self.adapted)
        return f"{who} runs {names} of {len(self.up.weight)} experts, each in one step over sorted tokens"


class _Kind(NamedTuple):
    """A class of experts: its forward chooses an implementation by name; ``own`` is the class's, called eager."""

    forward: Callable[..., Any]
    own: Callable[..., Any]


@use_experts_implementation
class _Example(nn.Module):
    def forward(self) -> None: ...


_CHOOSING = _Example.forward.__code__  # the same code in every class that transformers' decorator was put on
_kinds: dict[type[Any], _Kind | None] = {}


def wrappers_inside(layer: object) -> Iterator[ParamWrapper]:
    """Those that a wrapper wraps, from the outermost; none of any other layer."""
    while isinstance(layer, ParamWrapper):
        layer = layer._modules["base_layer"]
        if isinstance(layer, ParamWrapper):
            yield layer


def read_experts(wrapper: Any) -> Experts | str:
    """What a call of the outermost wrapper computes with, or why PEFT has to run it."""
    wrappers: list[Any] = [wrapper, *wrappers_inside(wrapper)]
    module: Any = wrappers[-1]._modules["base_layer"]
    kind = _kind(type(module))
    if kind is None:
        return f"its base layer is a {class_name(module)}, no experts of transformers'"
    run = ALL_EXPERTS_FUNCTIONS.get(module.config._experts_implementation, kind.own)
    reason = _wrappers_reason(wrappers) or _module_reason(module, kind, run)
    if reason is not None:
        return reason
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    found: dict[str, Projection | str] = {name: _read_base(module, name) for name in (first, "down_proj")}
    for each in wrappers:
        name = each.parameter_name
        projection = found.get(name, "")
        if isinstance(projection, str):
            return projection or f"it adapts {name}, which is no stack of matrices"
        found[name] = _with_adapters(each, projection, module.is_transposed)
    up, down = found[first], found["down_proj"]
    if isinstance(up, str) or isinstance(down, str):
        return up if isinstance(up, str) else str(down)
    if not up.A and not down.A:
        return "none of the active adapters is in this layer"
    for projection in (up, down):
        if not projection.A and projection.weight.dtype == torch.float64:
            return f"its experts' {projection.name} has no adapter, and torch no grouped products in float64"
    experts = Experts(module, up, down, run is grouped_mm_experts_forward)
    return _kernels_reason(experts) or experts


def _kernels_reason(experts: Experts) -> str | None:
    """On a GPU the reference would go expert by expert and wait for the offsets, which PEFT does not."""
    for name, weight, _, A, B, _ in experts.adapted:
        if not _is_waited_for(weight):
            continue
        x = weight.new_empty(0, weight.shape[2], dtype=weight.dtype if experts.as_grouped else compute_dtype(weight))
        refused = refusals(x, weight, [*A, *B])
        if all(reason for backend, reason in refused.items() if backend != "reference"):
            return f"its experts' {name} has no kernels on a GPU ({refused['triton']})"  # who takes the most
    return None


def _is_waited_for(weight: Tensor) -> bool:
    return weight.device.type == "cuda"


def _wrappers_reason(wrappers: Sequence[Any]) -> str | None:
    for wrapper in wrappers:
        reason = state_reason(wrapper)
        if reason is not None:
            return reason
        if wrapper.num_experts == 1:
            return "there is one expert alone, which PEFT computes as a layer"
    for wrapper in wrappers[1:]:  # which are not called
        if type(wrapper) is not ParamWrapper and not isinstance(wrapper, Fused):
            return f"a wrapper inside it is a {class_name(wrapper)}"
        if is_hooked(wrapper):
            return "a wrapper inside it has a hook or a forward of its own"
    names = [wrapper.parameter_name for wrapper in wrappers]
    return None if len(set(names)) == len(names) else "two wrappers adapt the same parameter"


def _module_reason(module: Any, kind: _Kind, run: object) -> str | None:
    if is_hooked(module):
        return "its experts have a hook or a forward of their own"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    if getattr(module, "has_post_expert_norm", False):
        return "its experts have a norm at their end"
    if run in (grouped_mm_experts_forward, batched_mm_experts_forward):
        return None
    name = module.config._experts_implementation
    if run is not kind.own:
        return f"its experts run as {name!r}, not as one of 'eager', 'grouped_mm' and 'batched_mm'"
    if not type(module).__module__.startswith("transformers.models."):
        return f"its experts run {class_name(module)}'s own forward"
    if "float" in kind.own.__code__.co_names:
        return f"{class_name(module)}'s own forward computes in float32"
    return None


def _kind(kind: type[Any]) -> _Kind | None:
    """None where the class's forward is not exactly what transformers' decorator makes."""
    forward = kind.__dict__.get("forward")
    known = _kinds.get(kind)
    if known is not None and known.forward is forward:
        return known
    _kinds[kind] = found = _read_kind(forward)
    return found


def _read_kind(forward: Any) -> _Kind | None:
    if getattr(forward, "__code__", None) is not _CHOOSING:
        return None
    cells = zip(_CHOOSING.co_freevars, forward.__closure__, strict=True)
    free = {name: cell.cell_contents for name, cell in cells}
    chosen_from = free.get("experts_interface", ALL_EXPERTS_FUNCTIONS)  # transformers 5.0 knows no other
    return _Kind(forward, free["original_forward"]) if chosen_from is ALL_EXPERTS_FUNCTIONS else None


def _read_base(module: Any, name: str) -> Projection | str:
    weight = module._parameters.get(name)
    bias = module._parameters.get(f"{name}_bias") if module.has_bias else None
    if weight is None or (module.has_bias and bias is None):
        return f"its experts' {name} is no Parameter: it is parametrized, a replica or a shard"
    for each in (weight, bias):
        if each is None:
            continue
        if not is_plain(each):
            return f"its experts' {name} is a {type(each).__qualname__}"
        if each.is_meta:
            return f"its experts' {name} is on the meta device, where nothing is computed"
        if each.dtype not in BASE_DTYPES or each.dtype != weight.dtype:
            return f"its experts' {name} is {each.dtype}"
        if each.requires_grad:
            return f"its experts' {name} is trained itself"
    return Projection(name, weight.transpose(1, 2) if module.is_transposed else weight, bias)


def _with_adapters(wrapper: Any, projection: Projection, is_transposed: bool) -> Projection | str:
    """PEFT's factors of one parameter, ``lora_A [E r, a]`` and ``lora_B [b, r E]``, ``a`` and ``b`` being its two
    dimensions in the order that PEFT took them in."""
    modules = wrapper._modules
    lora_A, lora_B = modules["lora_A"], modules["lora_B"]
    if not type(lora_A) is type(lora_B) is nn.ModuleDict:
        return "its adapters lie in containers that are wrapped"
    E = len(projection.weight)
    As, Bs, scalings = [], [], []
    for name in wrapper.active_adapters:
        if name not in lora_A._modules:
            continue
        A: Any = lora_A._modules[name]._parameters.get("weight")
        B: Any = lora_B._modules[name]._parameters.get("weight")
        if not is_plain(A) or not is_plain(B):
            return f"its adapter {name!r} has weights of {type(A).__qualname__} and {type(B).__qualname__}"
        if A.dtype != B.dtype:
            return f"its adapter {name!r} has weights of {A.dtype} and {B.dtype}"
        scaling = wrapper.scaling[name]
        if not is_constant(scaling):
            return f"its adapter {name!r} has a scaling that is not one constant number"
        a, b = A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)
        if getattr(wrapper, "_did_swap_in_out_features", False) == is_transposed:  # a belongs to N, b to K
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        As.append(a)
        Bs.append(b)
        scalings.append(scaling)
    return projection._replace(A=As, B=Bs, scaling=scalings)
