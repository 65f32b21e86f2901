"""Measures one case: whether fastpeft computes what PEFT computes, then times and kept bytes, as rows (rows.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from fastpeft import dispatch, extension
from fastpeft.call import Weight
from fastpeft.experiments import provenance
from fastpeft.experiments.memory import kept_bytes
from fastpeft.experiments.timing import Samples, interleave, ratios, summary

from . import parity, rows
from .cases import DTYPES, Case
from .contestants import BASE, BASE_FLOAT32, FASTPEFT, FASTPEFT_COMPILED, FASTPEFT_SHARED, PEFT, Contestant, Runner
from .rows import Row


@dataclass(frozen=True)
class Run:
    """What all rows of one ``fastpeft bench`` share."""

    start: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None

    @classmethod
    def begin(cls, device: str = "cpu") -> Run:
        return cls(_now(), provenance.machine(device), provenance.versions(), *provenance.commit())

    def facts(self) -> dict[str, Any]:
        """What a row of the kernels starts with."""
        instruction_set = None if extension.C is None else extension.C.isa()
        return {
            "run": self.start,
            "machine": self.machine,
            "versions": self.versions,
            "commit": self.commit,
            "dirty": self.dirty,
            "threads": torch.get_num_threads(),
            "instruction_set": instruction_set,
        }


def record_kernels(
    name: str,
    measure: Callable[[Run], Iterable[dict[str, Any]]],
    markdown: Callable[..., str],
    out: Path,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Measures a device's kernels and shows their table. Each row is added to ``out/<machine>-<name>.jsonl`` as soon as
    it is measured, and the table beside it drawn anew: what is ended early leaves behind what it found."""
    reason = extension.missing() if device == "cpu" else None
    if device == "cuda" and not torch.cuda.is_available():
        reason = "torch finds no NVIDIA GPU"
    if reason is not None:
        raise click.ClickException(reason)
    run = Run.begin(device)
    found: list[dict[str, Any]] = []
    for row in measure(run):
        found.append(row)
        rows.write(out / f"{run.machine['name']}-{name}.jsonl", row, markdown(found))
    click.echo(markdown(found))
    return found


def measure(case: Case, contestants: Sequence[Contestant], rounds: int, run: Run) -> Iterator[Row]:
    """Checks parity, then times every phase of ``case``; yields a row for each contestant in each phase.

    Args:
        contestants: the base and PEFT, which the others are compared with, among them.
        rounds: at most so many, see :func:`.timing.interleave`.
    """
    verdict = parity.check(case)
    torch.compiler.reset()
    runners: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    kept: dict[str, int] = {}
    for contestant in contestants:
        name = contestant.name
        reason = contestant.refuses(case)
        if reason is None:
            runner = contestant.setup(case)
            reason = _compile_failure(runner, case) if contestant.compiled else None
        if reason is None:
            runners[name] = runner
            runner.phase("forward")
            if not contestant.shares:
                kept[name] = kept_bytes(runner.model, runner.forward)
        else:
            refused[name] = reason
    backend = _backend(runners[FASTPEFT.name]) if FASTPEFT.name in runners else None

    for phase in case.phases:
        phases = {name: runner.phase(phase) for name, runner in runners.items()}
        samples = interleave(phases, rounds, torch.cuda.synchronize if case.device == "cuda" else lambda: None)
        for contestant in contestants:
            name = contestant.name
            timed = samples.get(name)
            ours = contestant in (FASTPEFT, FASTPEFT_COMPILED, FASTPEFT_SHARED)
            to_be_trusted = not ours or verdict["passed"]
            yield Row(
                run=run.start,
                date=_now(),
                machine=run.machine,
                versions=run.versions,
                commit=run.commit,
                dirty=run.dirty,
                threads=torch.get_num_threads(),
                case={"kind": case.kind, "shape": case.shape, **asdict(case)},  # type: ignore[call-overload]
                phase=phase,
                contestant=name,
                backend=backend if ours else None,
                rounds=len(samples[BASE.name].wall),
                seconds=None if timed is None else summary(timed.wall),
                cpu_seconds=None if timed is None else summary(timed.cpu),
                against=_against(timed, samples) if timed is not None and to_be_trusted else None,
                kept_bytes=kept.get(name) if phase != "generate" else None,
                parity=verdict,
                refused=refused.get(name),
            )


def _against(timed: Samples, samples: dict[str, Samples]) -> dict[str, dict[str, float]]:
    rivals = [rival.name for rival in (BASE, PEFT, BASE_FLOAT32) if rival.name in samples]
    return {rival: summary(ratios(timed.wall, samples[rival].wall)) for rival in rivals}


def _compile_failure(runner: Runner, case: Case) -> str | None:
    """Runs every phase once, so that all is compiled; the reason where the compiler gave up."""
    try:
        for phase in case.phases:
            runner.phase(phase)()
    except Exception as error:  # whatever the compiler raises is a result of the measurement
        return f"torch.compile failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def _backend(runner: Runner) -> str:
    """What runs the first fused layer; the CPU's backend with its instruction set."""
    from fastpeft.peft.layers import operands_or_reason, peft_layers
    from fastpeft.peft.operands import Operands

    operands = next(operands_or_reason(layer) for layer in peft_layers(runner.model).values())
    assert isinstance(operands, Operands)
    weight, _, (A, B, *_) = operands
    assert weight is not None
    x = torch.empty(1, weight.shape[1], dtype=DTYPES[runner.case.dtype], device=weight.device)
    backend = dispatch.choose("lora_linear", x, Weight.of(weight).data, (*A, *B), None)
    return f"{backend.name}, {extension.built().isa()}" if backend.name == "cpu" else backend.name


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
