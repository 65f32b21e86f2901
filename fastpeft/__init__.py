"""fastpeft: a frozen linear layer plus its low-rank adapter in one step, a drop-in for Hugging Face PEFT."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import functional, nn
from .dispatch import BackendRefusal
from .explain import explain

if TYPE_CHECKING:
    from .peft import Report, disable, enable, enabled, get_peft_model, patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "BackendRefusal",
    "Report",
    "disable",
    "enable",
    "enabled",
    "explain",
    "functional",
    "get_peft_model",
    "nn",
    "patch",
    "unpatch",
]

_NEEDS_PEFT = frozenset(("Report", "disable", "enable", "enabled", "get_peft_model", "patch", "unpatch"))


def __getattr__(name: str) -> Any:
    """Hugging Face PEFT takes seconds to import and is optional: these names load it when first used."""
    if name in _NEEDS_PEFT:
        return getattr(import_module(".peft", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
