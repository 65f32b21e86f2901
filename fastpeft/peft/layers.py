"""The classes that PEFT's layers are given: their forward is one call of :mod:`fastpeft.functional`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..call import Adapters
from ..four_bit import FourBit
from ..functional import adapted_linear, update
from ..verdicts import backend_verdict
from .base_layers import class_name, is_plain
from .embeddings import FusedEmbedding, Lookup
from .experts import Experts, wrappers_inside
from .experts_dora import GuardedParamWrapper
from .fused import Fused, is_plain_input
from .fused_experts import FusedParamWrapper
from .methods import METHODS, Method, method_of, stock_of
from .operands import Operands, read_operands, tokens_of
from .plain import plain_layers, read_plain
from .shared import note_on, shared_linear

if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as _Layer
else:
    _Layer = object  # which of PEFT's classes it is, each fused class says

KEPT_BY_LAYERS = (
    "fastpeft_backend",
    "fastpeft_dropout",
    "fastpeft_shares_input",
    "_fastpeft_note",
    "_fastpeft_norms",
    "_fastpeft_four_bit",
)


class FusedForward(Fused, _Layer):
    """The forward of every linear layer's class: one call of :mod:`fastpeft.functional` in the place of PEFT's."""

    fastpeft_shares_input = False
    method: Method
    plain_layers: Any  # see plain.py; None of a method whose layers are never plain

    @classmethod
    def read(cls, layer: Any) -> Operands | str:
        """The operands of a call with the active adapters, or why PEFT has to run it."""
        return read_operands(layer, layer.active_adapters, cls.method, 1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's result, ``[..., K]`` to ``[..., N]``; from PEFT's own ``forward`` where the call cannot be fused."""
        adapter_names = kwargs.get("adapter_names")
        if args or len(kwargs) > (self.method.mixes_batches and adapter_names is not None):
            return self._by_peft(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed_batch(x, adapter_names)
        operands = self.fused_operands(x)
        return self._by_peft(x) if operands is None else self._run(operands, x)

    def fused_operands(self, x: Any) -> Operands | None:
        """The operands of a call with the active adapters; None where PEFT has to run it."""
        operands = read_plain(self, x) or read_layer(self, self.active_adapters, x)
        if (
            isinstance(operands, str)
            or not is_plain_input(x, operands.weight)
            or (operands.adapters.c and x.dim() < 2)  # PEFT makes [1, N] of it
        ):
            return None
        return operands

    def _run(self, operands: Operands, x: Tensor) -> Tensor:
        weight, bias, adapters = operands
        if weight is None:
            return self._run_beside_base(bias, adapters, x)
        if not isinstance(weight, FourBit):
            return self._multiply(operands, x)
        base: Any = self._modules["base_layer"]
        if not base.compute_type_is_set:  # as the first forward of bitsandbytes' layer does
            base.set_compute_type(x)
            base.compute_type_is_set = True
        if base.compute_dtype in (None, x.dtype):
            return self._multiply(operands, x)
        return self._multiply(operands, x.to(base.compute_dtype)).to(x.dtype)

    def _multiply(self, operands: Operands, x: Tensor) -> Tensor:
        weight, bias, adapters = operands
        assert weight is not None
        if self.fastpeft_shares_input and not torch.compiler.is_compiling():
            y = shared_linear(self, operands, x)
            if y is not None:
                return y
        return adapted_linear(x, weight, bias, adapters, backend=self.fastpeft_backend)

    def _run_beside_base(self, bias: Tensor | None, adapters: Adapters, x: Tensor) -> Tensor:
        """The base layer's own result and the adapters' part, added up in PEFT's dtype."""
        base: Any = self._modules.get("quant_linear_module") or self._modules["base_layer"]
        y, at = base(x), self.method.features
        c, adapters = adapters.c, adapters._replace(c=[])
        if c:
            return self._scaled_beside_base(y, base.bias, c[0], adapters, x)
        added = update(x.movedim(at, -1), bias, adapters, backend=self.fastpeft_backend).movedim(-1, at)
        return _sum(y, added if torch.is_autocast_enabled(x.device.type) else added.to(y.dtype))

    def _scaled_beside_base(self, y: Tensor, bias: Tensor | None, c: Tensor, adapters: Adapters, x: Tensor) -> Tensor:
        """DoRA's ``c (x Wᵀ + s u Bᵀ) + b`` of the base layer's own ``y = x Wᵀ + b``."""
        added = update(x, None if bias is None else -bias, adapters, backend=self.fastpeft_backend)
        z = _sum(y, added.to(y.dtype))
        scaled = c * z if bias is None else torch.addcmul(bias.to(c.dtype), c, z)
        # PEFT's layers of other libraries answer in the wider dtype under autocast, and ask for a GPU's alone.
        widens = torch.is_autocast_enabled() and not issubclass(self.peft_class, Linear)
        return scaled.to(torch.promote_types(y.dtype, adapters.A[0].dtype) if widens else y.dtype)

    def _forward_mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """``adapter_names`` has a name for each sample of ``x [samples, ..., K]``; ``"__base__"`` is no adapter."""
        self._check_forward_args(x, adapter_names=adapter_names)
        served = [name for name in dict.fromkeys(adapter_names) if name in self.lora_A and name != "__base__"]
        operands = read_layer(self, served, x)
        if (
            isinstance(operands, str)
            or x.dim() < 2
            or operands.adapters.c  # then each token has factors of its own
            or not is_plain_input(x, operands.weight)
        ):
            return self._by_peft(x, adapter_names=adapter_names)
        position = {name: i for i, name in enumerate(served)}
        samples = torch.tensor([position.get(name, -1) for name in adapter_names], device=x.device)
        index = samples.view(-1, *(1,) * (x.dim() - 2)).expand(x.shape[:-1])
        operands = operands._replace(adapters=operands.adapters._replace(adapter_index=index))
        if not any(self.lora_bias[name] for name in served):
            return self._run(operands, x)
        base: Any = self._modules["base_layer"]
        y = self._run(operands._replace(bias=None if operands.weight is None else base.bias), x)
        return y + self._biases(served, y)[index + 1].to(y.dtype)

    def _biases(self, adapters: Sequence[str], y: Tensor) -> Tensor:
        """What each adapter's own bias adds to ``y [..., N]``, ``[1 + adapters, N]``; the first row is no adapter's."""
        nothing = torch.zeros(y.shape[-1], device=y.device)
        own = [self.lora_B[name].bias * self.scaling[name] if self.lora_bias[name] else nothing for name in adapters]
        return torch.stack([nothing, *own])


@lru_cache
def _fused_class(method: Method) -> type[Any]:
    peft_class = method.peft_class()
    members = {
        "__module__": __name__,
        "__doc__": f"``{method.module}.{method.qualname}``, fused.",
        "method": method,
        "peft_class": peft_class,
        "stock": stock_of(method),
        "plain_layers": plain_layers(stock_of(method)) if method.may_be_plain else None,
    }
    assert peft_class is not None
    return type(method.fused_name, (FusedForward, peft_class), members)


def __getattr__(name: str) -> Any:
    """The fused classes, each made when it is first asked for: some of PEFT's need bitsandbytes."""
    method = next((method for method in METHODS if method.fused_name == name), None)
    if method is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(method.module)
    return _fused_class(method)


def read_layer(layer: Any, adapters: Sequence[str], x: Any) -> Operands | str:
    """The operands of a call of a fused layer with these adapters, or why PEFT has to run it."""
    replaced = layer.stock.replaced()
    if replaced is not None:
        return replaced
    return read_operands(layer, adapters, layer.method, tokens_of(x))


def operands_or_reason(layer: BaseTunerLayer) -> Operands | Experts | Lookup | str:
    """The operands of a call with the active adapters, or why PEFT runs it and would even if ``layer`` were patched."""
    fused = type(layer) if isinstance(layer, Fused) else fused_class(type(layer))
    if fused is None:
        return f"{class_name(layer)} is no class that fastpeft fuses"
    found: Operands | Experts | Lookup | str = fused.operands_or_reason(layer)
    return found


def verdict_on(layer: BaseTunerLayer) -> str:
    """What ``explain`` says of a layer of PEFT's."""
    operands = operands_or_reason(layer)
    if isinstance(operands, str):
        return f"PEFT: {operands}"
    if not isinstance(layer, Fused):
        return "PEFT: the layer is not patched; fastpeft.patch(model) would fuse it"
    if not isinstance(operands, Operands):
        return operands.verdict(layer.fastpeft_backend)
    verdict = backend_verdict(operands.weight, operands.adapters, layer.fastpeft_backend)
    shares = isinstance(layer, FusedForward) and layer.fastpeft_shares_input
    return f"{verdict}; {note_on(layer)}" if shares else verdict


def peft_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that PEFT made, of any method, by name; of wrappers around one another the outermost, which runs for
    those inside it."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = {id(wrapper) for layer in found.values() for wrapper in wrappers_inside(layer)}
    return {name or type(layer).__name__: layer for name, layer in found.items() if id(layer) not in inside}


def fused_class(peft_class: type[Any]) -> type[Any] | None:
    """What a layer of PEFT's class becomes; None where fastpeft has nothing for it."""
    for fused in (FusedParamWrapper, FusedEmbedding):
        if peft_class is fused.peft_class:
            return fused
    method = method_of(peft_class)
    return None if method is None else _fused_class(method)


def fuse(layer: nn.Module, backend: str | None) -> None:
    """Gives ``layer`` its fused class, if there is one; of wrappers around one another it has to be the outermost."""
    fused = fused_class(type(layer))
    if fused is not None:
        _give_class(layer, fused)
    if isinstance(layer, Fused):
        layer.fastpeft_backend = backend
    for wrapper in wrappers_inside(layer):
        if isinstance(wrapper, Fused):
            unfuse(wrapper)
        if wrapper.lora_magnitude_vector and type(wrapper) is GuardedParamWrapper.peft_class:
            _give_class(wrapper, GuardedParamWrapper)


def unfuse(layer: Any) -> None:
    """Gives ``layer``, which is fused or guarded, PEFT's class back."""
    _give_class(layer, layer.peft_class)
    for name in KEPT_BY_LAYERS:
        layer.__dict__.pop(name, None)


def _sum(y: Tensor, added: Tensor) -> Tensor:
    """Of a base layer's result and what is added to it: in place where that fits, as nobody else has seen ``added``."""
    fits = added.dtype == y.dtype and added.stride() == y.stride() and is_plain(y)
    return added.add_(y) if fits else y + added


def _give_class(layer: Any, new: Any) -> None:
    for name in ("forward", "_old_forward"):  # put there by hand, or by accelerate's hook, which calls the latter
        own = layer.__dict__.get(name)
        if isinstance(own, MethodType) and own.__func__ is type(layer).forward:
            layer.__dict__[name] = MethodType(new.forward, layer)
    layer.__class__ = new
