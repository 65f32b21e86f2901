"""Functions of PEFT and torch that a fused layer stands in for: another library may replace one for its whole class,
and then PEFT's path, which calls it, has to run."""

from __future__ import annotations

import sys
from typing import Any


class Stock:
    """The functions at ``places``, pairs of a class and an attribute, as the class's own module defines them."""

    def __init__(self, *places: tuple[type[Any], str]) -> None:
        self._places = places
        self._known: list[object] = [None] * len(places)  # the module's own, once it was seen there

    @property
    def functions(self) -> list[tuple[type[Any], str, object]]:
        """Of each place the class, the attribute and the function, once :meth:`replaced` found none replaced."""
        return [(*place, function) for place, function in zip(self._places, self._known, strict=True)]

    def replaced(self) -> str | None:
        """Which of them is another one now; None when all are what they were."""
        for i, (owner, name) in enumerate(self._places):
            function = getattr(owner, name)
            if function is self._known[i]:
                continue
            if not _is_own(owner, function):
                return f"{owner.__module__}.{owner.__qualname__}.{name} was replaced"
            self._known[i] = function
        return None


def _is_own(owner: type[Any], function: object) -> bool:
    """Whether a module that defines ``owner`` or a class that it inherits from has the function's code."""
    code = getattr(function, "__code__", None)
    files = {getattr(sys.modules[base.__module__], "__file__", None) for base in owner.__mro__}
    return code is not None and code.co_filename in files
