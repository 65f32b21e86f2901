"""Models and data come in packages from the Python package index; nothing here downloads them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


class MissingPackage(RuntimeError):
    """Something the experiment needs is not there; the message names it and the command that brings it."""

    def __init__(self, what: str, command: str) -> None:
        super().__init__(f"{what} is missing; bring it with: {command}")


def require_package(module: str, command: str) -> Path:
    """The folder of the package ``module``, found without importing it.

    Raises:
        MissingPackage: it is not installed; ``command`` is what installs it.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"the package {module}", command)
    return Path(spec.submodule_search_locations[0])
