"""Methods of fine-tuning that Hugging Face PEFT lacks: Houlsby's and Pfeiffer's adapters, BitFit, LoReFT."""

from __future__ import annotations

from .adapters import Houlsby, Pfeiffer
from .applied import Applied, apply, load
from .bitfit import BitFit
from .files import METHODS
from .loreft import LoReFT

__all__ = ["METHODS", "Applied", "BitFit", "Houlsby", "LoReFT", "Pfeiffer", "apply", "load"]
