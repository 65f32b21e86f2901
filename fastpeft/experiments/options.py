"""What the commands' options take that click has no type for."""

from __future__ import annotations

import math
from typing import Any

import click


class Number(click.FloatRange):
    """Click's ranges let nan through: it is neither below nor above anything."""

    wanted = "at least 0"

    def __init__(self) -> None:
        super().__init__(0.0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"nan is no number: it must be {self.wanted}.", param, ctx)
        return number


class Probability(Number):
    """At least 0 and below 1."""

    wanted = "at least 0 and below 1"

    def __init__(self) -> None:
        click.FloatRange.__init__(self, 0.0, 1.0, max_open=True)
