"""What an option of the command line says when it cannot be met."""

from __future__ import annotations


class BadOption(ValueError):
    """What was asked for cannot be had: the option that asked, and the problem in one line."""

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}")
        self.option = option
        self.problem = problem
