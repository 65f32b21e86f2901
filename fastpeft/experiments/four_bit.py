"""A model's linear layers in NF4, by bitsandbytes, for QLoRA."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from torch import nn

from ..four_bit import quantize
from ..methods.applied import HEADS

DENSE = (*HEADS, "lm_head")
"""What stays as it is, by the last part of its name."""


def to_four_bit(model: nn.Module, wanted: Callable[[str], bool], *, decoded: bool = False) -> nn.Module:
    """Replaces the ``nn.Linear`` layers of ``model`` by bitsandbytes' in NF4 with nested statistics, as QLoRA has them.

    Args:
        model: changed in place; its layers compute in their weights' present dtype.
        wanted: says by a layer's own name (the last part of its path) whether it is replaced.
        decoded: the layers stay dense, with the weights that the 4 bits stand for.

    Returns:
        ``model``.
    """
    import bitsandbytes

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear) or not wanted(name):
                continue
            if decoded:
                linear.weight.data = quantize(linear.weight).dequantize(linear.weight.dtype)
                continue
            layer = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=linear.weight.dtype,
                quant_type="nf4",
            )
            layer.load_state_dict(linear.state_dict())
            setattr(parent, name, layer.to(linear.weight.device))  # quantizes
    if not decoded:
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT looks at
    return model


def evaluated_as_trained(model: nn.Module) -> nn.Module:
    """``model`` to be evaluated; its 4-bit layers are left in training, which for them means to stay as they are.

    On some processors bitsandbytes (0.50) puts their weights in another order at the first forward pass of an
    evaluation. PEFT's DoRA then decodes them as if they lay as before: its norm, and all outputs, are wrong.
    """
    model.eval()
    for module in model.modules():
        if any(hasattr(parameter, "quant_state") for parameter in module.parameters(recurse=False)):
            module.train()
    return model


def four_bit_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of ``model`` were its linear layers in NF4 with nested statistics, and its heads and all
    else in 16 bits.

    A weight takes half a byte, each block of 64 of them one more, and each 256 of these four (Dettmers et al., 2023).
    """
    heads = {id(p) for name, p in model.named_parameters() if any(part in DENSE for part in name.split("."))}
    packed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - heads
    sizes = 0
    for parameter in model.parameters():
        if id(parameter) not in packed:
            sizes += 2 * parameter.numel()
            continue
        blocks = ceil(parameter.numel() / 64)
        sizes += ceil(parameter.numel() / 2) + blocks + 4 * ceil(blocks / 256)
    return sizes
