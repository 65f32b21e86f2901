"""What the commands' options take that click has no type for."""

from __future__ import annotations

import math
from typing import Any

import click


class Probability(click.FloatRange):
    """At least 0 and below 1. Click's ranges let nan through: it is neither below nor above anything."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is no number: it must be at least 0 and below 1.", param, ctx)
        return number
