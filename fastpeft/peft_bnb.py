"""PEFT's layer for 4-bit weights, fused. Imported where such a layer is met: it needs bitsandbytes."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

from .peft import FusedForward


class FusedLinear4bit(FusedForward, PeftLinear4bit):
    """``peft.tuners.lora.bnb.Linear4bit``, fused."""

    peft_class = PeftLinear4bit
