"""What libraries print about themselves, off: a command's own words are what its user wants to read."""

from __future__ import annotations

import logging
import os
import warnings

_WARNINGS = (
    "Unsupported layer type .*LayerNorm",  # PEFT of each norm that its LN tuning trains
    "Could not find a config file in",  # PEFT where it saves an adapter of a model that was no folder
)
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "KINETO_LOG_LEVEL": "99",  # torch's profiler, which counts the memory
    "TRANSFORMERS_VERBOSITY": "error",
}


def quieten_libraries() -> None:
    """Before transformers is imported, which reads these once."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, module="peft")
