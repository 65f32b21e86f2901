"""A method on a model: put there, switched off and on, merged, taken away, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import files
from .method import Addition, Method, Plan

HEADS = ("classifier", "score")
"""A task's own layers, as transformers names them: they are trained whole, whatever the method."""
_MARK = "fastpeft_method"  # an attribute of a model that has a method on it


def apply(model: nn.Module, config: Method) -> Applied:
    """Puts a method on ``model``, in place: freezes every parameter but those that ``config`` trains.

    Names of the model's own parameters stay as they are. New parameters are float32 (float64 in a float64 model) on the
    device of the layer that they stand beside.

    Raises:
        TypeError: an argument is of another class.
        ValueError: a method is on the model already, or the model lacks what this one needs; it is unchanged then.
    """
    return Applied(model, config, _checked_plan(model, config))


def load(model: nn.Module, folder: Path | str) -> Applied:
    """Puts the method on ``model`` that :meth:`Applied.save` wrote to ``folder``, with its trained parameters.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is broken, or its parameters are not those that the method has on this model. ``model`` is
            unchanged then.
    """
    config, tensors = files.read(Path(folder))
    plan = _checked_plan(model, config)
    _check_fit(_shapes(model, plan), tensors, Path(folder))
    applied = Applied(model, config, plan)
    with torch.no_grad():
        for name, parameter in applied.named_parameters():
            parameter.copy_(tensors[name])
    return applied


class Applied:
    """A method on a model, made by :func:`apply` or :func:`load`; ``config`` has its settings.

    A copied or pickled model has the method on it; ``copy.deepcopy((model, applied))`` brings a handle along.
    """

    def __init__(self, model: nn.Module, config: Method, plan: Plan) -> None:
        self.config = config
        self._model = model
        self._enabled = True
        self._ended: str | None = None
        self._learned_before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        self._additions: list[Addition] = list(plan.additions)
        self._hooks = [register() for register in plan.hooks]
        for addition in self._additions:
            addition.parent.add_module(addition.name, addition.module)
            self._hooks.append(addition.parent.register_forward_hook(addition.module.hook, prepend=True))
        self._swaps = _swaps(model, plan.parameters)
        for swap in self._swaps:
            swap.swap()
        setattr(model, _MARK, config.name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by its full name in the model: also while the method is disabled."""
        for addition in self._additions:
            yield from addition.module.named_parameters(addition.full_name)
        seen: set[int] = set()
        for swap in self._swaps:
            parameter = swap.inside if self._enabled else swap.outside
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield swap.name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: what an optimizer takes."""
        yield from (parameter for _, parameter in self.named_parameters())

    def enable(self) -> None:
        """Switches the method on, as it is after :func:`apply`."""
        self._set_enabled(True)

    def disable(self) -> None:
        """Switches the method off: the model computes what it did before, with its own biases and its own head."""
        self._set_enabled(False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switches the method off for a block."""
        before = self._enabled
        self.disable()
        try:
            yield
        finally:
            self._set_enabled(before)

    def merge(self) -> None:
        """Makes what was trained part of the model; the model is then a plain one, and this handle has done its work.

        Raises:
            ValueError: the method cannot be merged; the message says why.
        """
        if self.config.no_merge is not None:
            raise ValueError(f"{self.config.name} cannot be merged: {self.config.no_merge}")
        self.enable()
        self._end("merged")

    def remove(self) -> None:
        """Takes the method away: the model is what it was before, the same parameters among it."""
        self.disable()
        for hook in self._hooks:
            hook.remove()
        for addition in self._additions:
            delattr(addition.parent, addition.name)
        self._end("removed")

    def save(self, folder: Path | str) -> None:
        """Writes the settings and what was trained, for :func:`load`: whole, or not at all."""
        self._check_alive()
        files.write(Path(folder), self.config, dict(self.named_parameters()))

    def _set_enabled(self, enabled: bool) -> None:
        self._check_alive()
        if enabled == self._enabled:
            return
        self._enabled = enabled
        for addition in self._additions:
            addition.module.enabled = enabled
        for swap in self._swaps:
            swap.swap()

    def _end(self, how: str) -> None:
        self._ended = how
        self._model.requires_grad_(False)
        for name in self._learned_before:
            self._model.get_parameter(name).requires_grad_(True)
        delattr(self._model, _MARK)

    def _check_alive(self) -> None:
        if self._ended is not None:
            raise RuntimeError(f"{self.config.name} was {self._ended}: this handle is of no more use")


@dataclass
class _Swap:
    """A place in the model with two parameters for it, one of which is ``outside`` at a time: the model's or ours.

    Whole parameters change places, so that a backward pass that is still to come finds the one that it was recorded
    with.
    """

    name: str
    module: nn.Module
    attribute: str
    outside: nn.Parameter

    @property
    def inside(self) -> nn.Parameter:
        return self.module.get_parameter(self.attribute)

    def swap(self) -> None:
        inside = self.inside
        self.outside.data = self.outside.data.to(inside)  # the model may have been moved since
        setattr(self.module, self.attribute, self.outside)
        self.outside = inside


def _swaps(model: nn.Module, names: Sequence[str]) -> list[_Swap]:
    """A trainable copy beside each parameter of ``names``; one for all the places that share a parameter."""
    copies = {id(own): nn.Parameter(own.detach().clone()) for own in map(model.get_parameter, names)}
    places = [
        (name, *_split(model, name), copies[id(own)])
        for name, own in model.named_parameters(remove_duplicate=False)
        if id(own) in copies
    ]
    return [_Swap(*place) for place in places]


def _split(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _checked_plan(model: nn.Module, config: Method) -> Plan:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, Method):
        raise TypeError(f"config must be the settings of a method, such as Houlsby(), got {type(config).__name__}")
    for module in model.modules():
        if (present := getattr(module, _MARK, None)) is not None:
            raise ValueError(f"{present} is on the model already: remove or merge it before {config.name} is applied")
    plan = config.plan(model)
    names = list(dict.fromkeys([*plan.parameters, *_head_parameters(model, config.modules_to_save)]))
    for name in names:
        parameter = model.get_parameter(name)
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            kind = f"{type(parameter).__name__} of {parameter.dtype}"
            raise ValueError(f"{name} is a {kind} and cannot be trained: keep it unquantized, or choose others")
    return Plan(plan.additions, plan.hooks, names)


def _head_parameters(model: nn.Module, modules_to_save: tuple[str, ...] | None) -> list[str]:
    """Names of the parameters of the modules that are trained as a whole."""
    modules = [name for name, _ in model.named_modules() if name]
    found = []
    for wanted in HEADS if modules_to_save is None else modules_to_save:
        paths = [name for name in modules if f".{name}".endswith(f".{wanted}")]
        if not paths and modules_to_save is not None:
            raise ValueError(f"modules_to_save names {wanted!r}, but the model has no module of that name")
        found += paths
    inside = tuple(f"{path}." for path in found)
    return [name for name, _ in model.named_parameters() if name.startswith(inside)]


def _shapes(model: nn.Module, plan: Plan) -> dict[str, torch.Size]:
    """Name and shape of each parameter that is trained once ``plan`` is carried out."""
    added = {
        name: parameter.shape
        for addition in plan.additions
        for name, parameter in addition.module.named_parameters(addition.full_name)
    }
    return added | {name: model.get_parameter(name).shape for name in plan.parameters}


def _check_fit(expected: dict[str, torch.Size], tensors: dict[str, Tensor], folder: Path) -> None:
    for what, names in (("lacks", expected.keys() - tensors), ("has a foreign", tensors.keys() - expected)):
        if names:
            raise ValueError(
                f"{folder / files.TENSORS} does not fit this model: it {what} parameter {min(names)}"
                + (f", and {len(names) - 1} more" if len(names) > 1 else "")
            )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{folder / files.TENSORS} does not fit this model: {name} must have shape {list(shape)}, got "
                f"{list(tensors[name].shape)}"
            )
