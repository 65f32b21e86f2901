"""Triton kernels for NVIDIA GPUs, each with its launcher and its launch config.

Tensors in, tensors out, no autograd and no choices: fastpeft/backends/triton.py makes those.
"""

from .dora_norm import DoraNormConfig, dora_norm
from .dropout import DropoutConfig, dropout
from .four_bit import GROUP, FourBitDecodeConfig, FourBitLinearConfig, four_bit_decode, four_bit_linear
from .lora_down import LoraDownConfig, lora_down
from .lora_gradients import DyOutputs, LoraDaConfig, LoraDyConfig, lora_dA, lora_dy
from .lora_linear import MASKED_INPUT, LoraLinearConfig, LoraUpConfig, lora_linear, lora_up

__all__ = [
    "GROUP",
    "MASKED_INPUT",
    "DoraNormConfig",
    "DropoutConfig",
    "DyOutputs",
    "FourBitDecodeConfig",
    "FourBitLinearConfig",
    "LoraDaConfig",
    "LoraDownConfig",
    "LoraDyConfig",
    "LoraLinearConfig",
    "LoraUpConfig",
    "dora_norm",
    "dropout",
    "four_bit_decode",
    "four_bit_linear",
    "lora_dA",
    "lora_down",
    "lora_dy",
    "lora_linear",
    "lora_up",
]
