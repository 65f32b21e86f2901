"""Rows as a table: for the terminal and, the same, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastpeft.experiments.models import METHODS

from .bounds import STATED_FOR, Finding
from .contestants import BASE, BASE_FLOAT32, CONTESTANTS, FASTPEFT, FASTPEFT_COMPILED, FASTPEFT_SHARED
from .rows import Row

_NOTHING = "–"
_COLUMNS = {contestant.name: contestant.label for contestant in (*CONTESTANTS, FASTPEFT_SHARED, BASE_FLOAT32)}
_WHERE_MEASURED = (BASE_FLOAT32.name, FASTPEFT_COMPILED.name, FASTPEFT_SHARED.name)  # a column where a section has one
CAPTION = (
    "Wall time as a multiple of the frozen base layer's in the same round: median [quartiles]. Less is better; "
    "1.00 would be an adapter for free. Kept: what autograd holds from forward to backward."
)


@dataclass(frozen=True)
class Section:
    """The cases of one method, dtype and dropout: for each shape, a line for each phase and one for the kept bytes.

    ``columns``: the contestants' labels by their names.
    """

    method: str
    title: str
    columns: Mapping[str, str]
    lines: list[list[str]]


def sections(rows: Sequence[Row]) -> list[Section]:
    """The table's cells as text; rows of one section stand in the order in which they came."""
    by_section: dict[tuple[str, str], dict[str, dict[str, dict[str, Row]]]] = {}
    for row in rows:
        case = row.case
        title = f"{METHODS[case['method']]}, {case['dtype']}, dropout {case['dropout']:g}, rank {case['rank']}"
        phases = by_section.setdefault((case["method"], title), {}).setdefault(case["shape"], {})
        phases.setdefault(row.phase, {})[row.contestant] = row
    found = []
    for (method, title), shapes in by_section.items():
        lines = []
        measured = {name for phases in shapes.values() for contestants in phases.values() for name in contestants}
        columns = {name: text for name, text in _COLUMNS.items() if name in measured or name not in _WHERE_MEASURED}
        for shape, phases in shapes.items():
            label = shape
            for phase, contestants in phases.items():
                lines.append([label, phase, *(time_cell(contestants.get(name)) for name in columns)])
                label = ""
            kept = phases.get("step", {})
            lines.append([label, "kept, MiB", *(kept_cell(kept.get(name)) for name in columns)])
        found.append(Section(method, title, columns, lines))
    return found


def time_cell(row: Row | None) -> str:
    """The base's time; the others' as a multiple of it, median and quartiles."""
    if row is None or row.seconds is None:
        return _NOTHING
    if row.contestant == BASE.name:
        return _duration(row.seconds["median"])
    if row.against is None:
        return "parity fails"
    return spread(row.against[BASE.name])


def spread(ratio: Mapping[str, float]) -> str:
    """Median and quartiles."""
    return f"{multiple(ratio['median'])} [{multiple(ratio['q1'])}, {multiple(ratio['q3'])}]"


def multiple(ratio: float) -> str:
    """Three digits, where a ratio has as many before its point or fewer."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def _duration(seconds: float) -> str:
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.2f} s"


def kept_cell(row: Row | None) -> str:
    """MiB that autograd keeps for the backward pass."""
    return _NOTHING if row is None or row.kept_bytes is None else f"{row.kept_bytes / 2**20:.2f}"


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know beside the numbers: where they come from, and what has no number and why."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.refused is not None:
            reasons.setdefault(f"{_COLUMNS[row.contestant]}: {row.refused}", []).append(row.title)
        if row.contestant == FASTPEFT.name and not row.parity["passed"]:
            wrong = ", ".join(row.parity["failed"])
            reasons.setdefault(f"No speed-up while parity fails ({wrong})", []).append(row.title)
    return [origin(rows), *(f"{reason}. At {_listed(cases)}" for reason, cases in reasons.items())]


def _listed(cases: Sequence[str]) -> str:
    different = list(dict.fromkeys(cases))
    return "; ".join(different) if len(different) <= 2 else f"{len(different)} cases"


def origin(rows: Sequence[Row]) -> str:
    """Machine, versions, dates and the newest commit of ``rows`` in a sentence; all rows stand in the file of rows."""
    last = max(rows, key=lambda row: row.date)
    dates = sorted({row.date[:10] for row in rows})
    parts = [
        last.where if "gpu" in last.machine else f"{last.where}, {last.threads} threads",
        ", ".join(f"{name} {number}" for name, number in last.versions.items()),
        f"backend {', '.join(sorted({row.backend for row in rows if row.backend}))}",
        f"newest commit {(last.commit or 'unknown')[:8]}{' with changes' if last.dirty else ''}",
        " to ".join(dict.fromkeys((dates[0], dates[-1]))),
    ]
    return "; ".join(parts)


_WIDTH_WITH_QUARTILES = 120


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table; in a narrow terminal medians alone, so that every contestant is seen."""
    narrow = console.width < _WIDTH_WITH_QUARTILES
    for section in sections(rows):
        table = Table(title=section.title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
        table.collapse_padding, table.pad_edge = narrow, not narrow
        table.add_column("M×K×N", min_width=13, max_width=13 if narrow else 14)
        table.add_column("phase", min_width=8 if narrow else 9)
        for name, label in section.columns.items():
            longest = max(map(len, label.split()))
            width = 7 if name == BASE.name else max(5, longest) if narrow else 17
            style = "bold green" if name == FASTPEFT.name else ""
            table.add_column(label, justify="right", min_width=width, max_width=width, style=style)
        for i, line in enumerate(section.lines):
            last_of_shape = i + 1 == len(section.lines) or bool(section.lines[i + 1][0])
            texts = [line[0], line[1].replace(",", ""), *(cell.partition(" [")[0] for cell in line[2:])]
            texts = texts if narrow else line
            cells = [Text(cell, style="bold red") if cell == "parity fails" else cell for cell in texts]
            table.add_row(*cells, end_section=last_of_shape)
        console.print(table)
    for note in (CAPTION, *notes(rows)):
        console.print(note, style="dim", markup=False, highlight=False)


def markdown(rows: Sequence[Row], pictures: Mapping[str, str]) -> str:
    """The table as Markdown, with the picture of each method, by its file name, before the first of its sections."""
    parts = [f"# fastpeft bench: {rows[-1].where}", CAPTION]
    undrawn = dict(pictures)
    for section in sections(rows):
        if section.method in undrawn:
            name = METHODS[section.method]
            parts.append(f"![{name}: time over the frozen base's]({undrawn.pop(section.method)})")
        parts.append(f"## {section.title}")
        parts.append(markdown_table(["M×K×N", "phase"], list(section.columns.values()), section.lines))
    parts.append("\n".join(f"- {note}" for note in notes(rows)))
    return "\n\n".join(parts) + "\n"


def markdown_table(labels: Sequence[str], numbers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """``lines`` under columns of text and, aligned to the right, of numbers."""
    rule = ["---"] * len(labels) + ["---:"] * len(numbers)
    return "\n".join("| " + " | ".join(line) + " |" for line in ([*labels, *numbers], rule, *lines))


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Prints each bound, what was measured, and whether it holds."""
    machines = " and ".join(STATED_FOR[device] for device in sorted({finding.bound.device for finding in findings}))
    table = Table(title=f"Bounds, stated for {machines}", title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("bound", "where"):
        table.add_column(name)
    for name in ("at most", "measured"):
        table.add_column(name, justify="right")
    table.add_column("")
    for finding in findings:
        measured = _NOTHING if finding.measured is None else f"{finding.measured:.3f}"
        style = "red" if finding.missed else "green" if finding.verdict == "pass" else "dim"
        table.add_row(
            finding.bound.text,
            finding.where,
            f"{finding.bound.limit:.2f}",
            measured,
            Text(finding.verdict, style=style),
        )
    console.print(table)
    passed = sum(finding.verdict == "pass" for finding in findings)
    missed = sum(finding.missed for finding in findings)
    console.print(f"{passed} pass, {missed} missed, {len(findings) - passed - missed} not measured")
