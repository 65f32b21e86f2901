"""The command line: ``fastpeft`` and ``python -m fastpeft``. A subcommand is imported when it is called."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from . import __version__

COMMANDS = {
    "bench": ("fastpeft.bench.cli", "Measure fastpeft beside the frozen base and PEFT."),
    "compare": ("fastpeft.experiments.compare.command", "Compare fine-tuning methods on real data."),
    "demo": ("fastpeft.experiments.demo", "Fine-tune a real model by PEFT and by fastpeft, side by side."),
    "info": ("fastpeft.info", "Show versions, processor and backends, and check the results."),
}


class LazyGroup(click.Group):
    """Adds the subcommands of ``COMMANDS``: each the ``command`` of its module, which may need optional packages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        return import_module(COMMANDS[cmd_name][0]).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        built_in = {name: command.get_short_help_str(100) for name, command in self.commands.items()}
        helps = built_in | {name: text for name, (_, text) in COMMANDS.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(helps.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if not package or find_spec(package) is not None:
                raise
            raise click.ClickException(f"the package {package} is missing: pip install {package}") from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastpeft")
def main() -> None:
    """Fused low-rank adapters: a faster, leaner drop-in for Hugging Face PEFT."""


@main.command()
def build() -> None:
    """Build the C++ extension beside the package."""
    from .build import BuildError, build_in_place

    try:
        build_in_place()
    except BuildError as error:
        raise click.ClickException(str(error)) from error
