"""Hugging Face PEFT's layers through fastpeft, in place: parameters, names and state_dict keys stay PEFT's.

A layer is fused by giving it a class of layers.py, which overrides ``forward``. Each call reads the layer's state anew
(operands.py), since PEFT's users change it at any time. What cannot be fused goes to PEFT's own ``forward``; the reason
is what :func:`patch` reports and ``fastpeft.explain`` shows.
"""

from .patching import Report, disable, enable, enabled, get_peft_model, patch, unpatch

__all__ = ["Report", "disable", "enable", "enabled", "get_peft_model", "patch", "unpatch"]
