"""One processor in the part of a lesser one: stock torch, oneDNN, MKL and fastpeft with its instruction set alone.

Each library reads its limit from the environment when it is loaded, so that a process has to start anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import torch

from fastpeft import extension

LIMITS: Mapping[str, Mapping[str, str]] = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}


class CannotPlay(RuntimeError):
    """The processor, or a library, does not take the part."""


def isa_option(module: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option ``--isa`` of a command that ``python -m module`` runs: it plays before the command begins."""

    def play_first(context: click.Context, parameter: click.Parameter, isa: str | None) -> None:
        if isa is None:
            return
        try:
            play(isa, sys.argv[1:], module)
        except CannotPlay as reason:
            raise click.BadParameter(str(reason)) from reason

    return click.option(
        "--isa",
        type=click.Choice(list(LIMITS)),
        callback=play_first,
        expose_value=False,
        help="Play a processor that has these instructions and no more.",
    )


def play(isa: str, arguments: Sequence[str], module: str) -> None:
    """Goes on with fastpeft's kernels of ``isa`` and everything else held to it. Where the limits are not set yet, this
    process becomes another: ``python -m module`` with the arguments.

    Raises:
        CannotPlay: the processor lacks the instructions, torch did not obey, or there is no extension.
    """
    if (reason := extension.missing()) is not None:
        raise CannotPlay(reason)
    C = extension.built()
    if isa not in C.isas():
        raise CannotPlay(f"this processor has {', '.join(C.isas())}, not {isa}")
    limits = LIMITS[isa]
    if any(os.environ.get(name) != value for name, value in limits.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], {**os.environ, **limits})
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.lower() != limits["ATEN_CPU_CAPABILITY"]:
        raise CannotPlay(f"torch runs its {capability} kernels in spite of ATEN_CPU_CAPABILITY")
    C.set_isa(isa)
