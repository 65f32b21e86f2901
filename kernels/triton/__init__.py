"""Triton kernels for NVIDIA GPUs, each with its launcher and its launch config.

Tensors in, tensors out, no autograd and no choices: fastpeft/backends/gpu/triton.py makes those.
"""

from .dora_norm import dora_norm, dora_norm_config
from .dropout import DropoutConfig, dropout
from .experts import row_tiles
from .four_bit import (
    FourBitDecodeConfig,
    four_bit_decode,
)
from .lora_down import lora_down, lora_down_config
from .lora_gradients import DyOutputs, lora_dA, lora_dA_config, lora_dy, lora_dy_config
from .lora_grouped_factors import lora_grouped_down, lora_grouped_gradient, lora_grouped_gradient_config
from .lora_grouped_linear import lora_grouped_linear, lora_grouped_linear_config
from .lora_linear import (
    lora_linear,
    lora_linear_config,
    lora_up,
    lora_up_config,
)
from .lora_linear_persistent import lora_linear_persistent, lora_linear_persistent_config

__all__ = [
    "DropoutConfig",
    "DyOutputs",
    "FourBitDecodeConfig",
    "dora_norm",
    "dora_norm_config",
    "dropout",
    "four_bit_decode",
    "lora_dA",
    "lora_dA_config",
    "lora_down",
    "lora_down_config",
    "lora_dy",
    "lora_dy_config",
    "lora_grouped_down",
    "lora_grouped_gradient",
    "lora_grouped_gradient_config",
    "lora_grouped_linear",
    "lora_grouped_linear_config",
    "lora_linear",
    "lora_linear_config",
    "lora_linear_persistent",
    "lora_linear_persistent_config",
    "lora_up",
    "lora_up_config",
    "row_tiles",
]
