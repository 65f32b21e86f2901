"""Mixtures of experts of transformers whose stacks of weights PEFT adapts (``target_parameters``): what one call
computes with, read from PEFT's wrappers and the module inside them, or the reason why PEFT has to run it.

Such a module has, in one parameter each, the matrices of all experts: ``gate_up_proj`` (``up_proj`` where there is no
gate) and ``down_proj``. PEFT puts a ``ParamWrapper`` around it for each that is adapted, one around the other. Where
bitsandbytes' ``replace_parameter_4bit`` has packed one, its bits are read, and nothing dense is made.
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
from ..four_bit import FourBit
from ..functional import compute_dtype, lora_grouped_linear
from ..verdicts import runner
from .base_layers import class_name, is_hooked, is_plain
from .experts_four_bit import calls_more_than_forward, class_of, packed_stack
from .operands import state_reason
from .readers import is_constant, read_magnitude


class Projection(NamedTuple):
    """One matrix of every expert and the adapters on it, if any; ``name`` is its parameter's.

    ``weight [E, N, K]``, its ``dtype`` (of 4 bits what they stand for), ``bias [E, N]`` or None, and of each adapter
    ``A [E, r, K]``, ``B [E, N, r]``, a scaling and, if it is DoRA, a magnitude ``[E, N]``: views of what transformers
    and PEFT hold.
    """

    name: str
    weight: Tensor | FourBit
    dtype: torch.dtype
    bias: Tensor | None
    A: Sequence[Tensor] = ()
    B: Sequence[Tensor] = ()
    scaling: Sequence[float | Tensor] = ()
    magnitude: Sequence[Tensor] = ()
    adapters: Sequence[str] = ()  # their names

    @property
    def no_tokens(self) -> Tensor:
        """An input without rows."""
        return torch.empty(0, self.weight.shape[2], dtype=self.dtype, device=self.weight.device)


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
        for projection in self.adapted:
            _, weight, _, bias, A, B, scaling, *_ = projection
            offsets = torch.zeros(weight.shape[0] + 1, dtype=torch.int64, device=weight.device)
            try:
                with torch.no_grad():
                    lora_grouped_linear(projection.no_tokens, offsets, weight, bias, A, B, scaling, backend=backend)
            except BackendRefusal as refusal:
                return str(refusal)
        return None

    def verdict(self, backend: str | None) -> str:
        """What runs it, in words."""
        names = " and ".join(projection.name for projection in self.adapted)
        count = self.up.weight.shape[0]
        return f"{runner(backend)} runs {names} of {count} experts, each in one step over sorted tokens"


class _Kind(NamedTuple):
    """A class of experts: its forward chooses an implementation by name; ``own`` is the class's, called eager."""

    forward: Callable[..., Any]
    own: Callable[..., Any]


@use_experts_implementation
class _Example(nn.Module):
    def forward(self) -> None: ...


_CHOOSING = _Example.forward.__code__  # the same code in every class that transformers' decorator was put on
_kinds: dict[type[Any], _Kind | None] = {}
_ONE_EXPERT = "there is one expert alone, which PEFT computes as a layer"
_NO_STACK = "it adapts {}, which is no stack of matrices"


def wrappers_inside(layer: object) -> Iterator[ParamWrapper]:
    """Those that a wrapper wraps, from the outermost; none of any other layer."""
    while isinstance(layer, ParamWrapper):
        layer = layer._modules["base_layer"]
        if isinstance(layer, ParamWrapper):
            yield layer


def is_matrix(wrapper: Any) -> bool:
    """Whether it adapts one matrix, as a router's is; experts have a stack of them."""
    parameter = wrapper.get_param()
    return isinstance(parameter, Tensor) and parameter.dim() == 2


def read_experts(wrapper: Any) -> Experts | str:
    """What a call of the outermost wrapper computes with, or why PEFT has to run it."""
    wrappers: list[Any] = [wrapper, *wrappers_inside(wrapper)]
    module: Any = wrappers[-1]._modules["base_layer"]
    own = class_of(module)
    kind = _kind(own)
    if kind is None:
        return f"its base layer is a {own.__module__}.{own.__qualname__}, no experts of transformers'"
    run = ALL_EXPERTS_FUNCTIONS.get(module.config._experts_implementation, kind.own)
    reason = _wrappers_reason(wrappers) or _module_reason(module, kind, run)
    if reason is not None:
        return reason
    first, _ = names = _stacks(module)
    found: dict[str, Projection | str] = {name: _read_frozen(module, name) for name in names}
    for each in wrappers:
        name = each.parameter_name
        projection = found.get(name, "")
        if isinstance(projection, str):
            return projection or _NO_STACK.format(name)
        found[name] = _with_adapters(each, projection)
    up, down = found[first], found["down_proj"]
    if isinstance(up, str) or isinstance(down, str):
        return up if isinstance(up, str) else str(down)
    if not up.A and not down.A:
        return "none of the active adapters is in this layer"
    for projection in (up, down):
        if not projection.A and projection.dtype == torch.float64:
            return f"its experts' {projection.name} has no adapter, and torch no grouped products in float64"
    experts = Experts(module, _decoded_by_us(up), _decoded_by_us(down), run is grouped_mm_experts_forward)
    return _kernels_reason(experts) or experts


def read_stack(wrapper: Any) -> Projection | str:
    """What one wrapper adapts, without its adapters, or why it is nothing that is fused."""
    module, name = wrapper.get_base_layer(), wrapper.parameter_name
    if _kind(class_of(module)) is None:
        return f"its base layer is a {class_name(module)}, no experts of transformers'"
    if wrapper.num_experts == 1:
        return _ONE_EXPERT
    return _read_base(module, name) if name in _stacks(module) else _NO_STACK.format(name)


def _stacks(module: Any) -> tuple[str, str]:
    """The names of its experts' matrices, before and after the activation."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"


def _decoded_by_us(projection: Projection) -> Projection:
    """In 4 bits without an adapter, with one of zeros: torch's grouped products would want the stack dense."""
    weight = projection.weight
    if projection.A or not isinstance(weight, FourBit):
        return projection
    (E, N, K), zero = weight.shape, projection.no_tokens.new_zeros(())
    return projection._replace(A=[zero.expand(E, 1, K)], B=[zero.expand(E, N, 1)], scaling=[0.0])


def _kernels_reason(experts: Experts) -> str | None:
    """On a GPU the reference would go expert by expert and wait for the offsets, which PEFT does not. In 4 bits, or
    with DoRA, it may: PEFT cannot run these at all."""
    for projection in experts.adapted:
        name, weight, dtype, _, A, B, _, magnitude, _ = projection
        if isinstance(weight, FourBit) or magnitude or not _is_waited_for(weight):
            continue
        x = projection.no_tokens.to(dtype if experts.as_grouped else compute_dtype(weight))
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
            return _ONE_EXPERT
    for wrapper in wrappers[1:]:  # which are not called
        if getattr(type(wrapper), "peft_class", type(wrapper)) is not ParamWrapper:
            return f"a wrapper inside it is a {class_name(wrapper)}"
        if is_hooked(wrapper):
            return "a wrapper inside it has a hook or a forward of its own"
    names = [wrapper.parameter_name for wrapper in wrappers]
    return None if len(set(names)) == len(names) else "two wrappers adapt the same parameter"


def _module_reason(module: Any, kind: _Kind, run: object) -> str | None:
    if calls_more_than_forward(module):
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
    own = class_of(module)
    if not own.__module__.startswith("transformers.models."):
        return f"its experts run {own.__module__}.{own.__qualname__}'s own forward"
    if "float" in kind.own.__code__.co_names:
        return f"{own.__module__}.{own.__qualname__}'s own forward computes in float32"
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


def _read_frozen(module: Any, name: str) -> Projection | str:
    found = _read_base(module, name)
    if isinstance(found, Projection) and any(isinstance(t, Tensor) and t.requires_grad for t in found[1:4]):
        return f"its experts' {name} is trained itself"
    return found


def _read_base(module: Any, name: str) -> Projection | str:
    weight = module._parameters.get(name)
    bias = module._parameters.get(f"{name}_bias") if module.has_bias else None
    packed = packed_stack(module, name)
    if isinstance(packed, str):
        return f"its experts' {name} in 4 bits cannot be read: {packed}"
    if (weight is None and packed is None) or (module.has_bias and bias is None):
        return f"its experts' {name} is no Parameter: it is parametrized, a replica or a shard"
    bits, dtype = packed or (weight, weight.dtype)
    for each in (weight, bias):
        if each is None:
            continue
        if not is_plain(each):
            return f"its experts' {name} is a {type(each).__qualname__}"
        if each.is_meta:
            return f"its experts' {name} is on the meta device, where nothing is computed"
        if each.dtype not in BASE_DTYPES or each.dtype != dtype:
            return f"its experts' {name} is {each.dtype}"
    return Projection(name, bits.mT if module.is_transposed else bits, dtype, bias)


def _with_adapters(wrapper: Any, projection: Projection) -> Projection | str:
    lora_A, lora_B = wrapper._modules["lora_A"], wrapper._modules["lora_B"]
    if not type(lora_A) is type(lora_B) is nn.ModuleDict:
        return "its adapters lie in containers that are wrapped"
    As, Bs, scalings, magnitudes = [], [], [], []
    names = [name for name in wrapper.active_adapters if name in lora_A._modules]
    for name in names:
        factors = read_factors(wrapper, name, projection.weight.shape[0])
        if isinstance(factors, str):
            return f"its adapter {name!r} {factors}"
        A, B, scaling = factors
        As.append(A)
        Bs.append(B)
        scalings.append(scaling)
        if name in wrapper._modules["lora_magnitude_vector"]._modules:
            magnitude = read_magnitude(wrapper, name, projection.weight.device)
            if isinstance(magnitude, str):
                return f"its adapter {name!r} {magnitude}"
            magnitudes.append(magnitude)
    if magnitudes and len(magnitudes) < len(names):
        return "DoRA and LoRA adapters are active together"
    return projection._replace(A=As, B=Bs, scaling=scalings, magnitude=magnitudes, adapters=names)


def read_factors(wrapper: Any, name: str, E: int) -> tuple[Tensor, Tensor, float | Tensor] | str:
    """``A``, ``B`` and ``s`` of one adapter of one parameter, or why PEFT has to run it. PEFT has ``lora_A [E r, a]``
    and ``lora_B [b, r E]``, ``a`` and ``b`` being the parameter's two dimensions in the order that it took them in."""
    A: Any = wrapper.lora_A._modules[name]._parameters.get("weight")
    B: Any = wrapper.lora_B._modules[name]._parameters.get("weight")
    if not is_plain(A) or not is_plain(B):
        return f"has weights of {type(A).__qualname__} and {type(B).__qualname__}"
    if A.dtype != B.dtype:
        return f"has weights of {A.dtype} and {B.dtype}"
    scaling = wrapper.scaling[name]
    if not is_constant(scaling):
        return "has a scaling that is not one constant number"
    a, b = A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)
    is_transposed = wrapper.get_base_layer().is_transposed
    if getattr(wrapper, "_did_swap_in_out_features", False) == is_transposed:  # a belongs to N, b to K
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a, b, scaling
