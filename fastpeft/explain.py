"""Which backend a layer would run on and why the others would not, for a layer or a whole model."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn

from .call import Adapters
from .nn import DoRALinear, LoRALinear
from .verdicts import backend_verdict, grouped


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print`` it. ``verdicts`` holds the text for each layer's name."""

    verdicts: dict[str, str]

    def __str__(self) -> str:
        return grouped(self.verdicts)


def explain(layer_or_model: nn.Module) -> Explanation:
    """For every LoRA layer: the backend that would run it and why each other one would not, or why PEFT runs it.

    The answer is for an input on the device of the layer's weight and in its dtype (in autocast's where that is on).

    Args:
        layer_or_model: a :class:`fastpeft.nn.LoRALinear`, a PEFT layer, or any module that holds some.

    Raises:
        TypeError: it is no module. ValueError: it holds no LoRA layer.
    """
    if not isinstance(layer_or_model, nn.Module):
        raise TypeError(f"layer_or_model must be a torch.nn.Module, got {type(layer_or_model).__name__}")
    modules = {name or type(module).__name__: module for name, module in layer_or_model.named_modules()}
    verdicts = {name: _verdict_on(module) for name, module in modules.items() if isinstance(module, LoRALinear)}
    verdicts |= _verdicts_on_peft(layer_or_model)
    verdicts = {name: verdicts[name] for name in modules if name in verdicts}
    if not verdicts:
        raise ValueError(
            "layer_or_model must be or hold a fastpeft.nn.LoRALinear or a PEFT layer, "
            f"got a {type(layer_or_model).__name__} without any"
        )
    return Explanation(verdicts)


def _verdict_on(layer: LoRALinear) -> str:
    scales = [layer.lora_magnitude_vector] if isinstance(layer, DoRALinear) else []
    adapters = Adapters([layer.lora_A], [layer.lora_B], scales, [layer.scaling], [layer.dropout])
    return backend_verdict(layer.matrix(), adapters, layer.backend)


def _verdicts_on_peft(model: nn.Module) -> dict[str, str]:
    if "peft" not in sys.modules:  # then no module can be PEFT's
        return {}
    from .peft.layers import peft_layers, verdict_on

    return {name: verdict_on(layer) for name, layer in peft_layers(model).items()}
