"""What users call: :func:`patch` and its report, :func:`unpatch`, and the switch for layers that PEFT makes later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.model import LoraModel
from torch import nn

from ..checks import check_dropout_p, check_flag
from ..dispatch import BackendRefusal, check_backend_name, named
from ..verdicts import backend_refusals, grouped
from .embeddings import Lookup
from .experts import Experts, is_matrix
from .experts_dora import GuardedParamWrapper, WithMagnitudes, add_magnitudes, has_magnitudes, new_magnitudes
from .fused import Fused
from .fused_experts import FusedParamWrapper
from .layers import FusedForward, fuse, operands_or_reason, peft_layers, unfuse
from .methods import METHODS
from .operands import Operands


@dataclass(frozen=True)
class Report:
    """What :func:`patch` found: the names of the fused layers, and those left to PEFT, each with its reason."""

    fused: list[str]
    left_to_peft: dict[str, str]

    def __str__(self) -> str:
        counts = f"fused: {len(self.fused)}, left to PEFT: {len(self.left_to_peft)}"
        return f"{counts}\n{grouped(self.left_to_peft)}" if self.left_to_peft else counts


def patch(
    model: nn.Module,
    *,
    backend: str | None = None,
    experts_dropout: float = 0.0,
    experts_dora: bool = False,
    share_inputs: bool = False,
) -> Report:
    """Fuses the layers of LoRA and its like in ``model``, and LoRA on its experts, in place; parameters, names and
    state_dict keys stay.

    Patching twice is harmless; the arguments of the last call count. A layer whose present state stands
    in the way (merged, disabled, hooked, another variant of LoRA) is reported as left to PEFT and is fused once the
    state allows it.

    Args:
        model: a PEFT model, or any module that holds PEFT layers.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` for all its layers; None takes, at each
            call, the fastest that accepts it.
        experts_dropout: of what goes into LoRA on experts, in training; PEFT has none there. No adapter's file tells
            it: a model that is loaded has to be patched with it again. Training experts that are left to PEFT raises
            RuntimeError then.
        experts_dora: makes LoRA on experts DoRA, which PEFT does not have there: each adapter is given magnitudes, one
            for each expert and output row, ``‖W + s B A‖`` at first, so that nothing changes; those that it has stay,
            also without this. Its configuration says ``use_dora`` from then on: PEFT by itself refuses to load its
            file, ``fastpeft.enabled(experts_dora=True)`` loads it. Experts that are left to PEFT raise RuntimeError.
        share_inputs: layers that are called one after the other with the same tensor (q, k and v; gate and up) compute
            their low-rank parts, and the gradient of that tensor, together; each keeps its own adapter and dropout.
            Calls show which they are, ``fastpeft.explain(model)`` what became of it. Layers that read their input
            alone, as in compiled graphs, under autocast or activation checkpointing, compute as they do otherwise.
            Their gradients come in one step: a backward pass through one of them alone frees what the others keep.

    Raises:
        TypeError: ``model`` is no module, or ``experts_dora`` or ``share_inputs`` no bool. ValueError: it holds no PEFT
            layer, ``backend`` is unknown, ``experts_dropout`` is not in [0, 1), or the model has no experts that are
            fused; ``experts_dora`` cannot be: some are not, or an adapter has LoRA on other layers, too.
        fastpeft.BackendRefusal: ``backend`` was asked for by name and cannot run one of the layers.
    """
    check_backend_name(backend)
    check_flag("experts_dora", experts_dora)
    check_flag("share_inputs", share_inputs)
    _check_model(model)
    layers = peft_layers(model)
    if not layers:
        raise ValueError(
            f"model must hold at least one PEFT layer, got a {type(model).__name__} without any; "
            "peft.get_peft_model(model, config) adds them"
        )
    report = Report([], {})
    for name, layer in layers.items():
        operands = operands_or_reason(layer)
        if isinstance(operands, str):
            report.left_to_peft[name] = operands
        else:
            _check_backend(name, operands, backend)
            report.fused.append(name)
    experts = [layers[name] for name in report.fused if isinstance(layers[name], ParamWrapper)]
    _check_experts_dropout(experts_dropout, experts)
    left = {name: why for name, why in report.left_to_peft.items() if isinstance(layers[name], ParamWrapper)}
    magnitudes = new_magnitudes(model, experts, left) if experts_dora else []
    for layer in layers.values():
        fuse(layer, backend)
        if isinstance(layer, FusedParamWrapper):
            layer.fastpeft_dropout = 0.0 if is_matrix(layer) else float(experts_dropout)
        if isinstance(layer, FusedForward):
            layer.fastpeft_shares_input = share_inputs
    add_magnitudes(model, magnitudes)
    return report


def unpatch(model: nn.Module) -> None:
    """Gives every fused layer of ``model`` PEFT's class back.

    Raises:
        TypeError: ``model`` is no module. ValueError: it has DoRA on experts, which PEFT cannot run.
    """
    _check_model(model)
    for name, module in model.named_modules():
        if has_magnitudes(module):
            raise ValueError(
                f"model must have no DoRA on experts (experts_dora), which PEFT cannot run, and {name} has: merge its "
                "adapters (merge_and_unload) or delete them before"
            )
    for module in model.modules():
        if isinstance(module, (Fused, GuardedParamWrapper)):
            unfuse(module)


def get_peft_model(
    model: nn.Module, peft_config: peft.PeftConfig, *, backend: str | None = None, **kwargs: Any
) -> nn.Module:
    """``peft.get_peft_model(model, peft_config, **kwargs)``, then :func:`patch`.

    Raises:
        TypeError: ``peft_config`` is of a method that fastpeft does not fuse. Else what the two functions raise.
    """
    if PEFT_TYPE_TO_TUNER_MAPPING.get(getattr(peft_config, "peft_type", None)) not in _MODELS:
        methods = ", ".join(model.__name__.removesuffix("Model") for model in _MODELS)
        raise TypeError(
            f"peft_config must be the configuration of one of {methods} of PEFT, got {type(peft_config).__name__}"
        )
    check_backend_name(backend)
    peft_model = peft.get_peft_model(model, peft_config, **kwargs)
    patch(peft_model, backend=backend)
    return peft_model


_switch_lock = threading.Lock()
_wanted_by: dict[object, bool] = {}  # and whether with DoRA on experts
_PROCESS = object()
_MODELS = tuple(dict.fromkeys(method.model for method in METHODS))


class _Fusing:
    """Stands for a tuner's ``_create_new_module``, through which all its layers come into being. Another library may
    put a function of its own around it: then it stays where it is, and fuses nothing while nobody wants it."""

    def __init__(self, create: Callable[..., nn.Module]) -> None:
        self.create = create

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        layer = self.create(*args, **kwargs)
        if _wanted_by:
            fuse(layer, None)
        return layer


def _wants_experts_dora() -> bool:
    return any(_wanted_by.values())


def _want(who: object, experts_dora: bool) -> None:
    _switch(lambda: _wanted_by.update({who: experts_dora}))


def _want_no_more(who: object) -> None:
    _switch(lambda: _wanted_by.pop(who, None))


def _switch(change: Callable[[], object]) -> None:
    with _switch_lock:
        change()
        for model in _MODELS:
            create = model._create_new_module
            if _wanted_by and not isinstance(create, _Fusing):
                model._create_new_module = staticmethod(_Fusing(create))
            elif not _wanted_by and isinstance(create, _Fusing):
                model._create_new_module = staticmethod(create.create)
        create = LoraModel._create_and_replace
        if _wants_experts_dora() and not isinstance(create, WithMagnitudes):
            LoraModel._create_and_replace = WithMagnitudes(create, _wants_experts_dora)
        elif not _wants_experts_dora() and isinstance(create, WithMagnitudes):
            LoraModel._create_and_replace = create.create


def enable(*, experts_dora: bool = False) -> None:
    """From now on every layer of LoRA and its like that PEFT makes in this process is fused, whoever asks for it.

    Args:
        experts_dora: whether configurations with ``use_dora`` and ``target_parameters``, which PEFT refuses, make DoRA
            on experts, and their files are loaded.
    """
    check_flag("experts_dora", experts_dora)
    _want(_PROCESS, experts_dora)


def disable() -> None:
    """Undoes :func:`enable`. Layers made before stay fused."""
    _want_no_more(_PROCESS)


@contextmanager
def enabled(*, experts_dora: bool = False) -> Iterator[None]:
    """:func:`enable` for the length of a ``with`` block; blocks may be nested."""
    check_flag("experts_dora", experts_dora)
    block = object()
    _want(block, experts_dora)
    try:
        yield
    finally:
        _want_no_more(block)


def _check_experts_dropout(p: float, experts: Sequence[nn.Module]) -> None:
    check_dropout_p("experts_dropout", p)
    if p and not experts:
        raise ValueError(f"experts_dropout must be 0 for a model without experts that are fused, got {p}")


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check_backend(name: str, operands: Operands | Experts | Lookup, backend: str | None) -> None:
    if backend is None:
        return
    if isinstance(operands, Operands):
        reason = backend_refusals(operands.weight, operands.adapters)[named(backend).name]
    else:
        reason = operands.refusal(backend)
    if reason is not None:
        raise BackendRefusal(f"backend={backend!r} cannot run {name}: {reason}")
