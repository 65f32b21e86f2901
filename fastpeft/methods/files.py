"""A method in a folder: its settings as JSON, its trained parameters as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..experiments.output import write_together
from .adapters import Houlsby, Pfeiffer
from .bitfit import BitFit
from .loreft import LoReFT
from .method import Method

METHODS: dict[str, type[Method]] = {method.name: method for method in (Houlsby, Pfeiffer, BitFit, LoReFT)}
SETTINGS, TENSORS = "method.json", "method.safetensors"


def write(folder: Path, config: Method, parameters: Mapping[str, Tensor]) -> None:
    """Writes both files; see :func:`fastpeft.experiments.output.write_together` for what a stop leaves."""
    from safetensors.torch import save_file

    tensors = {name: parameter.detach().contiguous() for name, parameter in parameters.items()}
    text = json.dumps({"method": config.name} | asdict(config), indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_together(
        folder,
        {
            SETTINGS: lambda path: path.write_text(text, encoding="utf-8"),
            TENSORS: lambda path: save_file(tensors, path),
        },
    )


def read(folder: Path) -> tuple[Method, dict[str, Tensor]]:
    """The method with its settings, and its trained parameters by their names.

    Raises:
        FileNotFoundError: a file is not there. ValueError: a file does not hold what it should.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (SETTINGS, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: no method was saved there, or not all of it")
    config = _config(folder / SETTINGS)
    try:
        return config, load_file(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} cannot be read: {error}") from error


def _config(path: Path) -> Method:
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    name = settings.pop("method", None) if isinstance(settings, dict) else None
    if name not in list(METHODS):  # whatever JSON holds, also what cannot be hashed
        raise ValueError(f"{path} must name a method, one of {', '.join(METHODS)}, got {name!r}")
    try:
        return METHODS[name](**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the settings of {name}: {error}") from error
