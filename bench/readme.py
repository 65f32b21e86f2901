"""README's numbers, drawn from the recorded rows: ``python -m fastpeft.bench.readme`` in a checkout rewrites them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from fastpeft.experiments.models import METHODS

from . import rows, table
from .cases import RANK
from .contestants import BASE, CONTESTANTS, FASTPEFT, PEFT
from .rows import Row

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
RESULTS = Path("bench", "results")
KERNELS = ("*-kernels.jsonl", "*-plans.jsonl")  # rows of roofline.py and plans.py, beside those of layers and models
NO_ROWS = "No rows recorded yet: `make bench` records them."
_PHASES = {"step": "training step", "generate": "one token"}
_DTYPE = "bf16"
_EXCERPT = ("1×4096×4096", "512×2048×2048", "4096×4096×4096")  # the layers that methods besides LoRA are shown at


@click.command()
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path())
def command(root: Path) -> None:
    """Rewrite the numbers in ROOT/README.md, ROOT being a checkout of fastpeft (default: here)."""
    readme = root / "README.md"
    readme.write_text(rewritten(readme.read_text(encoding="utf-8"), block(root)), encoding="utf-8")


def rewritten(text: str, new: str) -> str:
    """``text`` with ``new`` between the two marks. Raises ValueError unless each stands there once, in this order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"README.md must hold {BEGIN} and then {END}, each once")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def block(root: Path) -> str:
    """Markdown for the newest rows of each machine in ``root/bench/results``; links are relative to ``root``."""
    paths = sorted(path for path in (root / RESULTS).glob("*.jsonl") if not any(map(path.match, KERNELS)))
    recorded = {path.relative_to(root): rows.latest(rows.load(path)) for path in paths}
    parts = [_machine(path, found) for path, found in recorded.items() if found]
    return "\n\n".join([table.CAPTION, *parts]) if parts else NO_ROWS


def _machine(path: Path, found: Sequence[Row]) -> str:
    timed = [
        contestant
        for contestant in CONTESTANTS
        if contestant is not BASE and any(row.contestant == contestant.name and row.seconds for row in found)
    ]
    places: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found:
        if row.phase in _PHASES and _is_shown(row):
            places.setdefault((_label(row), _PHASES[row.phase]), {})[row.contestant] = row
    lines = [
        [
            label,
            phase,
            *(table.time_cell(place.get(contestant.name)) for contestant in timed),
            *(table.kept_cell(place.get(contestant.name)) for contestant in (PEFT, FASTPEFT)),
        ]
        for (label, phase), place in places.items()
    ]
    numbers = [*(contestant.label for contestant in timed), "PEFT keeps, MiB", "fastpeft keeps, MiB"]
    return "\n\n".join(
        [
            table.markdown_table(["layer M×K×N, or model", "phase"], numbers, lines),
            "\n".join(f"- {note}" for note in table.notes(found)),
            f"An excerpt; all shapes, the other dtypes, the forward pass alone and the seconds: "
            f"[{path.stem}.md]({path.with_suffix('.md').as_posix()}); every row: [{path.name}]({path.as_posix()}).",
            f"![Wall time over the frozen base]({path.with_suffix('.png').as_posix()})",
        ]
    )


def _is_shown(row: Row) -> bool:
    case = row.case
    return case["dtype"] == _DTYPE and (
        case["method"] == "lora" or case["kind"] == "model" or case["shape"] in _EXCERPT
    )


def _label(row: Row) -> str:
    case = row.case
    label = f"{METHODS[case['method']]} {case['shape']}, {case['dtype']}"
    label += f", dropout {case['dropout']:g}" if case["dropout"] else ""
    return label + (f", rank {case['rank']}" if case["rank"] != RANK else "")


if __name__ == "__main__":
    command()
