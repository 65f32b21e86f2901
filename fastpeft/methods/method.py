"""What every method consists of: its settings, and a plan of what it adds to a model, made before anything changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Hooked(nn.Module, ABC):
    """A module that changes what another module puts out, while it is ``enabled``.

    It acts by ``hook``, a bound method, so that a copied or pickled model has hooks of its own. Where the other module
    gives back a tuple, its first element is changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.enabled:
            return output
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)

    @abstractmethod
    def forward(self, h: Tensor) -> Tensor:
        """What stands in the place of ``h``: same shape, same dtype."""


@dataclass(frozen=True)
class Addition:
    """A new child ``name`` of ``parent`` (with the full name ``path``), whose output it changes."""

    path: str
    parent: nn.Module
    name: str
    module: Hooked

    @property
    def full_name(self) -> str:
        return f"{self.path}.{self.name}"


@dataclass(frozen=True)
class Plan:
    """What a method does to a model: new modules, more hooks, and the parameters of the model that it trains."""

    additions: Sequence[Addition] = ()
    hooks: Sequence[Callable[[], RemovableHandle]] = ()
    parameters: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """What all methods' settings have in common.

    Args:
        layers: the numbers of the blocks that it works on, counted from 0; all when left out.
        modules_to_save: names of modules that are trained as a whole, such as a fresh task head; when left out,
            ``classifier`` and ``score`` where the model has them, as PEFT does for classification.
    """

    layers: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None

    name: ClassVar[str]
    no_merge: ClassVar[str | None]
    """Why it cannot be merged into the model's own parameters, or None where it can."""

    def __post_init__(self) -> None:
        as_tuple(self, "layers", int, "block numbers")
        as_tuple(self, "modules_to_save", str, "names")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"layers must name blocks, counted from 0, got {list(self.layers)}")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers must name each block once, got {list(self.layers)}")

    @abstractmethod
    def plan(self, model: nn.Module) -> Plan:
        """What it adds to ``model``, which stays as it is. ValueError: ``model`` lacks what it needs."""


def check_size(name: str, value: object) -> None:
    """A count of at least 1, or TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def place_beside(new: nn.Module, own: nn.Module) -> None:
    """Moves a ``new`` module to the device of the model's ``own`` layer, as float32, or float64 where that is; as in
    PEFT."""
    weight = own.get_parameter("weight")
    new.to(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)


def to_own_dtype(h: Tensor, parameter: Tensor) -> Tensor:
    """``h`` in the dtype of an added ``parameter``, as PEFT casts an adapter's input; under autocast, as it is."""
    return h if torch.is_autocast_enabled(h.device.type) else h.to(parameter.dtype)


def as_tuple(config: Method, name: str, kind: type, what: str) -> None:
    """Makes a tuple of the setting ``name``, so that it compares equal after a way through JSON."""
    value = getattr(config, name)
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or not all(type(item) is kind for item in value):
        raise TypeError(f"{name} must be a list of {what}, or None, got {value!r}")
    object.__setattr__(config, name, tuple(value))
