"""``fastpeft info``: what is installed, what this machine can do, which backends run and whether they are right."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__, extension
from .dispatch import BACKENDS
from .selfcheck import Verdict, self_check

PACKAGES = ("torch", "peft", "transformers", "triton", "bitsandbytes")
FEATURES = {"AVX2": "avx2", "AVX-512": "avx512_f", "AVX-512 bfloat16": "avx512_bf16", "AMX bfloat16": "amx_bf16"}
EMULATED = (
    "[yellow]stock torch emulates it here[/]: a frozen bfloat16 layer takes several times what a float32 one takes, "
    "without AVX-512 many times"
)
WIDENED = (
    "The layers that fastpeft fuses are computed in float32 arithmetic by its own product, which widens or decodes W "
    "while it packs it: about as fast as a float32 layer. Whatever else a bfloat16 model has stays slow"
)


@click.command()
def command() -> None:
    """Show versions, processor and backends, and check the results.

    Exits with 1 when a backend that is available computes something wrong.
    """
    console = Console()
    for title, rows in (
        ("Versions", versions()),
        ("Processor", processor()),
        ("GPUs", gpus()),
        ("Backends, in order of preference", backends()),
    ):
        console.print(_table(title, rows))
    verdicts = self_check()
    console.print(
        _table(
            "Self-check of layers and experts against the equations in float64", [_row(verdict) for verdict in verdicts]
        )
    )
    if not all(verdict.passed for verdict in verdicts):
        raise click.ClickException("the self-check failed: a backend computes wrong results on this machine")


def versions() -> list[tuple[str, str]]:
    """Name and version of fastpeft, Python and the packages that matter."""
    own = [("fastpeft", __version__), ("python", platform.python_version())]
    return own + [(name, _version(name)) for name in PACKAGES]


def capabilities() -> Mapping[str, Any]:
    """What torch knows of the processor; older ones say nothing."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def emulates_bfloat16() -> bool:
    """Whether stock torch computes a product of bfloat16 matrices at a part of float32's speed. oneDNN has one where
    there is AVX-512, and says so; but without the instructions for bfloat16 that one is slow, too."""
    found = capabilities()
    if found.get("avx512_f") and not found.get("avx512_bf16"):
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # a torch without oneDNN lacks it
    return supported is None or not supported()


def processor() -> list[tuple[str, str]]:
    """Model, instruction sets and threads, as torch sees them."""
    found = capabilities()
    features = [f"{name} {'yes' if found.get(key) else 'no'}" for name, key in FEATURES.items() if key in found]
    rows = [
        ("model", found.get("cpu_name") or platform.processor() or platform.machine()),
        ("instruction sets", ", ".join(features) or f"those of {platform.machine()}"),
        ("torch's own kernels", torch.backends.cpu.get_cpu_capability()),
        ("threads", str(torch.get_num_threads())),
    ]
    if emulates_bfloat16():
        rows.append(("bfloat16", EMULATED if extension.missing() else f"{EMULATED}. {WIDENED}"))
    return rows


def gpus() -> list[tuple[str, str]]:
    """Each GPU that torch can use, with its memory; one row that says so when there is none."""
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return rows or [("none", "torch sees no GPU; fastpeft runs on the CPU")]


def backends() -> list[tuple[str, str]]:
    """Each backend with what it is about to run, or why it cannot."""
    rows = []
    for backend in BACKENDS:
        reason = backend.unavailable()
        text = "[green]available[/]" if reason is None else f"[yellow]not available[/]: {escape(reason)}"
        detail = backend.detail() if reason is None else ""
        if detail:
            text += f", {detail}"
        rows.append((backend.name, text))
    return rows


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _row(verdict: Verdict) -> tuple[str, str]:
    name = f"{verdict.backend}, {str(verdict.dtype).removeprefix('torch.')}"
    mark = "[green]passed[/]" if verdict.passed else "[red]FAILED[/]"
    found = verdict.failure or f"{verdict.share:.0%} of the error that is allowed"
    without = f"; without experts: {verdict.no_experts}" if verdict.no_experts else ""
    return name, f"{mark}: {escape(found + without)}"


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, min_width=78)
    for row in rows:
        table.add_row(*row)
    return table
