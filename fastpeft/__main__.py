"""Makes ``python -m fastpeft`` do what the command ``fastpeft`` does."""

from .cli import main

main(prog_name="fastpeft")
