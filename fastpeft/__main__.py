"""``python -m fastpeft`` is the command ``fastpeft``."""

from .cli import main

main(prog_name="fastpeft")
