"""DoRA on experts, which PEFT does not have: magnitudes ``m [E, N]``, one for each expert and output row, in the place
and under the name of PEFT's own (``lora_magnitude_vector.<adapter>.weight``).

An adapter's configuration says ``use_dora`` then: PEFT by itself refuses it together with ``target_parameters``, so
that no file is read without its magnitudes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..checks import is_finite, is_readable
from ..functional import dora_grouped_norm
from ..reference import wide_dtype
from .experts import Projection, read_factors, read_magnitude, read_stack, wrappers_inside
from .experts_four_bit import holds_four_bits

_CONTAINER = "lora_magnitude_vector"


class GuardedParamWrapper(ParamWrapper):
    """``ParamWrapper`` whose adapters may have magnitudes: PEFT's own code, which looks for none here, raises where it
    would compute without them; merging takes them into the weight."""

    peft_class = ParamWrapper

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's, of an adapter without magnitudes.

        Raises:
            RuntimeError: it has them: what it adds to the weight is no product of its factors.
        """
        self._check_has_no_magnitude(adapter_name)
        delta: Tensor = super().get_delta_weight(adapter_name, *args, **kwargs)
        return delta

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Any]:
        """As :meth:`get_delta_weight`."""
        self._check_has_no_magnitude(adapter_name)
        factors: tuple[Tensor, Tensor, Any] = super().get_delta_factors(adapter_name)
        return factors

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts ``m (W + s B A) / ‖W + s B A‖`` in the place of ``W``.

        Raises:
            RuntimeError: other adapters are merged, too, on which the norm would depend; the weight is in 4 bits, of
                which PEFT would add to a decoded copy, and lose what it added. ValueError: a row's norm is 0, or a
                magnitude is not finite.
        """
        self._check_is_dense()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not any(name in self.lora_magnitude_vector for name in (*names, *self.merged_adapters)):
            super().merge(safe_merge, adapter_names)
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise RuntimeError(
                "an adapter with experts_dora is merged by itself: its norm is that of the base weight with it alone, "
                f"and here are {[*self.merged_adapters, *names]}"
            )
        for name in names:
            self._merge(name, safe_merge)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes what :meth:`merge` did back.

        Raises:
            RuntimeError: a row's magnitude was 0 when it was merged: nothing of it is left; the weight was packed into
                4 bits since.
        """
        if self.merged:
            self._check_is_dense()
        if not any(name in self.lora_magnitude_vector for name in self.merged_adapters):
            super().unmerge()
            return
        (name,) = self.merged_adapters
        stack, (A, B, s) = _stack_and_factors(self, name)
        c = self._fastpeft_merged_by.to(stack.weight.device)
        if not c.all():
            raise RuntimeError(f"adapter {name!r} with experts_dora cannot be unmerged: a magnitude is 0")
        assert isinstance(stack.weight, Tensor)
        for weight, a, b, factor in zip(stack.weight.data, A, B, c, strict=True):
            weight.copy_((weight / factor.unsqueeze(1)).sub_(s * b.to(c.dtype) @ a.to(c.dtype)))
        self.merged_adapters.clear()
        del self._fastpeft_merged_by

    @torch.no_grad()
    def _merge(self, name: str, safe_merge: bool) -> None:
        stack, (A, B, s) = _stack_and_factors(self, name)
        magnitude = read_magnitude(self, name, stack.weight.device)
        if isinstance(magnitude, str):
            raise RuntimeError(f"adapter {name!r} with experts_dora cannot be merged: it {magnitude}")
        norm = dora_grouped_norm(stack.weight, A, B, s)
        c = magnitude.to(norm.dtype) / norm
        if not is_finite(c):
            raise ValueError(
                f"adapter {name!r} with experts_dora cannot be merged: it has a row whose norm is 0, or a magnitude "
                "that is not finite"
            )
        assert isinstance(stack.weight, Tensor)
        before = self.get_param().data.clone() if safe_merge else None
        for weight, a, b, factor in zip(stack.weight.data, A, B, c, strict=True):
            merged = torch.addmm(weight.to(c.dtype), b.to(c.dtype), a.to(c.dtype), alpha=float(s))
            weight.copy_(merged.mul_(factor.unsqueeze(1)))
        if before is not None and not is_finite(self.get_param()):
            self.get_param().data.copy_(before)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.merged_adapters.append(name)
        self._fastpeft_merged_by = c

    def _check_is_dense(self) -> None:
        if holds_four_bits(self.get_base_layer()):
            raise RuntimeError("LoRA is neither merged into experts in 4 bits nor taken out: do so on the dense model")

    def _check_has_no_magnitude(self, name: str) -> None:
        if name in self.lora_magnitude_vector:
            raise RuntimeError(
                f"adapter {name!r} has experts_dora: PEFT would compute {self.parameter_name} without its magnitudes. "
                "fastpeft.patch(model) fuses the layer, merge() takes them into the weight"
            )


# As with FusedParamWrapper: PEFT finds its wrappers by this name.
GuardedParamWrapper.__name__ = ParamWrapper.__name__


class _New(NamedTuple):
    """A magnitude that an adapter of a wrapper is to have."""

    wrapper: Any
    adapter: str
    magnitude: Tensor

    def add(self) -> None:
        wrapper, name = self.wrapper, self.adapter
        if _CONTAINER not in wrapper.adapter_layer_names:  # what PEFT trains, moves and deletes
            wrapper.adapter_layer_names = (*wrapper.adapter_layer_names, _CONTAINER)
        module = DoraLinearLayer(fan_in_fan_out=False).train(wrapper.training)
        module.weight = nn.Parameter(self.magnitude, requires_grad=wrapper.lora_A[name].weight.requires_grad)
        wrapper.lora_magnitude_vector[name] = module
        wrapper.use_dora[name] = True
        if type(wrapper) is ParamWrapper:  # one inside a fused one
            wrapper.__class__ = GuardedParamWrapper


def active_magnitudes(wrapper: ParamWrapper) -> bool:
    """Whether an active adapter has some."""
    return any(name in wrapper.lora_magnitude_vector for name in wrapper.active_adapters)


def has_magnitudes(module: nn.Module) -> bool:
    """Whether it wraps experts with DoRA."""
    return isinstance(module, ParamWrapper) and len(module.lora_magnitude_vector) > 0


def new_magnitudes(model: nn.Module, experts: Sequence[nn.Module], left: dict[str, str]) -> list[_New]:
    """One for each adapter of each wrapper of ``experts``, the outermost ones, that has none yet.

    Args:
        left: the layers of experts that PEFT has to run, each with its reason.

    Raises:
        ValueError: ``model`` has experts that PEFT has to run, or none; it does not hold its adapters' configurations;
            an adapter has layers without DoRA besides, which its file could not tell apart; a row's norm is 0.
    """
    for name, reason in left.items():
        raise ValueError(f"experts_dora cannot be: PEFT has to run {name}, as {reason}")
    if not experts:
        raise ValueError("experts_dora must be False for a model without experts that are fused")
    found = [new for layer in experts for wrapper in _all(layer) for new in _missing(wrapper)]
    configs = getattr(model, "peft_config", None)
    for name in dict.fromkeys(new.adapter for new in found):
        if configs is None or name not in configs:
            raise ValueError(
                f"experts_dora needs the configuration of adapter {name!r}, which has to say so in its file: model "
                f"must be the one that PEFT made, got a {type(model).__name__} without peft_config"
            )
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) and _is_lora(layer, name):
                raise ValueError(
                    f"experts_dora cannot be for adapter {name!r}, whose {path} has LoRA without DoRA: its file says "
                    "use_dora of all its layers or of none. Make the model under "
                    "fastpeft.enabled(experts_dora=True) with LoraConfig(use_dora=True), or give the experts an "
                    "adapter of their own"
                )
    return found


def add_magnitudes(model: Any, found: Sequence[_New]) -> None:
    """Adds what :func:`new_magnitudes` found; configurations say ``use_dora`` from then on."""
    for new in found:
        new.add()
        model.peft_config[new.adapter].use_dora = True


class WithMagnitudes:
    """Stands for PEFT's ``LoraModel._create_and_replace``, through which every wrapper comes to each of its adapters,
    and takes configurations with DoRA on parameters while it is wanted."""

    def __init__(self, create: Callable[..., None], is_wanted: Callable[[], bool]) -> None:
        self.create, self.is_wanted = create, is_wanted

    def __get__(self, tuner: Any, kind: object = None) -> Any:
        return self if tuner is None else MethodType(self, tuner)

    def __call__(
        self, tuner: Any, config: Any, name: str, *place: Any, parameter_name: str | None = None, **others: Any
    ) -> None:
        dora = parameter_name is not None and config.use_dora and self.is_wanted()
        if dora:
            config = copy.copy(config)
            config.use_dora = False
        self.create(tuner, config, name, *place, parameter_name=parameter_name, **others)
        target, target_name, parent, *_ = place
        for wrapper in (target, getattr(parent, target_name)) if dora else ():  # one that was there, or a new one
            if isinstance(wrapper, ParamWrapper) and wrapper.parameter_name == parameter_name:
                for new in _missing(wrapper, [name]):
                    new.add()


def _all(layer: Any) -> Iterator[Any]:
    yield layer
    yield from wrappers_inside(layer)


def _is_lora(layer: Any, name: str) -> bool:
    return (name in layer.lora_A or name in layer.lora_embedding_A) and not layer.use_dora.get(name, False)


def _missing(wrapper: Any, names: Sequence[str] | None = None) -> Iterator[_New]:
    """Of these adapters, or of all: ``‖W + s B A‖``, with which nothing changes."""
    for name in wrapper.lora_A if names is None else names:
        if name in wrapper.lora_magnitude_vector:
            continue
        stack, (A, B, s) = _stack_and_factors(wrapper, name)
        shape, dtype = stack.weight.shape[:2], wide_dtype(stack.dtype)
        if A.is_meta:  # what is loaded gives it numbers
            yield _New(wrapper, name, torch.empty(shape, dtype=dtype, device="meta"))
            continue
        norm = dora_grouped_norm(stack.weight, A, B, s)
        if is_readable(norm) and not norm.all():
            raise ValueError(f"experts_dora cannot be: adapter {name!r} has a row of {stack.name} whose norm is 0")
        yield _New(wrapper, name, norm)


def _stack_and_factors(wrapper: Any, name: str) -> tuple[Projection, tuple[Tensor, Tensor, float | Tensor]]:
    stack = read_stack(wrapper)
    factors = stack if isinstance(stack, str) else read_factors(wrapper, name, stack.weight.shape[0])
    if isinstance(stack, str) or isinstance(factors, str):
        reason = stack if isinstance(stack, str) else f"its adapter {name!r} {factors}"
        raise ValueError(f"experts_dora cannot be on {wrapper.parameter_name}: {reason}")
    return stack, factors
