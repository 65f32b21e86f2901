"""PEFT's layers for 4-bit weights, fused. Imported where such a layer is met: they need bitsandbytes."""

from __future__ import annotations

from peft.tuners.adalora.bnb import SVDLinear4bit as PeftSVDLinear4bit
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

from .layers import FusedForward


class FusedLinear4bit(FusedForward, PeftLinear4bit):
    """``peft.tuners.lora.bnb.Linear4bit``, fused."""

    peft_class = PeftLinear4bit


class FusedSVDLinear4bit(FusedForward, PeftSVDLinear4bit):
    """``peft.tuners.adalora.bnb.SVDLinear4bit``, fused."""

    peft_class = PeftSVDLinear4bit
    mixes_batches = False
