"""The page of a comparison: one HTML file that holds its pictures and asks for nothing else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from . import words
from .literature import Finding
from .plots import DARK, LIGHT, PICTURES, Picture, file_name, named_comparisons
from .recommend import Budget, choose
from .rows import UNTRAINED
from .summary import Row, Summary
from .tables import failures, shown


def render_page(
    rows: Sequence[Row], every: Sequence[Summary], pictures: Mapping[str, bytes], literature: Sequence[Finding] = ()
) -> str:
    """The page as HTML.

    Args:
        every: the summaries of ``rows``.
        pictures: PNG files by :func:`.plots.file_name`, light and dark; those that are missing are left out.
        literature: what papers report, for a section of its own.

    Raises:
        ValueError: there are no rows.
    """
    from jinja2 import Environment, StrictUndefined

    if not rows:
        raise ValueError("rows: there are none to write a page about")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__package__) / "page.html").read_text(encoding="utf-8"))
    named = named_comparisons(every)
    titles = words.scopes(group for _, group in named)
    sections = [_section(name, title, group, pictures) for (name, group), title in zip(named, titles, strict=True)]
    return template.render(facts=_facts(rows), sections=sections, literature=literature)


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    """What holds for the whole page, in words."""
    commits = (f"{row['commit'][:12]}{', changed' if row['dirty'] else ''}" for row in rows if row["commit"])
    dates = sorted(row["date"] for row in rows)
    first, last = dates[0][:10], dates[-1][:10]
    return {
        "machine": _each(_machine(row["machine"]) for row in rows),
        "threads": _each(str(row["threads"]) for row in rows),
        "versions": _each(f"{name} {version}" for row in rows for name, version in row["versions"].items()),
        "commit": _each(commits) or "unknown",
        "preset": _each(row["preset"] for row in rows),
        "runs": f"{len(rows)}, those in plain PEFT among them; {sum(row['failed'] is not None for row in rows)} failed",
        "date": first if first == last else f"{first} to {last}",
    }


def _machine(machine: Mapping[str, Any]) -> str:
    facts = [str(machine.get("gpu") or machine["cpu"])]
    facts += [f"{machine['cores']} cores"] if "cores" in machine else []
    facts += [f"{machine['memory_gib']} GiB of memory", str(machine["system"])]
    return f"{machine['name']} ({', '.join(facts)})"


def _section(name: str, title: str, group: Sequence[Summary], pictures: Mapping[str, bytes]) -> dict[str, Any]:
    first, columns = group[0], shown(group)
    trained = [own for own in group if own.score is not None and own.method != UNTRAINED]
    return {
        "name": name,
        "title": title,
        "facts": _section_facts(group),
        "advice": str(choose(trained, Budget())) if trained else "No run of a trained method ended.",
        "columns": columns,
        "lines": [[(column.value(own), column.show(own)) for column in columns] for own in group],
        "failures": failures(group),
        "pictures": [_picture(name, picture, first, pictures) for picture in _drawn(name, pictures)],
    }


def _section_facts(group: Sequence[Summary]) -> dict[str, str]:
    task, model = group[0].task, group[0].model
    trainings = [own.training for own in group if own.method != UNTRAINED] or [group[0].training]
    seeds = sorted({seed for own in group for seed in (*own.by_seed, *(failure.seed for failure in own.failures))})
    return {
        "task": f"{task['title']} ({task['kind']}): {task['train']:,} examples for training, {task['valid']:,} for "
        f"validation, {task['test']:,} for the test",
        "score": f"{words.metric(group[0])}; {'higher' if group[0].higher_is_better else 'lower'} is better",
        "model": f"{model['title']}, {words.count(model['parameters'])} parameters, {words.size(model['bytes'])}",
        "training": "; ".join(
            f"{title} {_each(str(training[name]) for training in trainings)}"
            for name, title in (("steps", "steps"), ("batch_size", "batch"), ("length", "tokens"), ("dtype", "in"))
        ),
        "seeds": ", ".join(map(str, seeds)),
    }


def _drawn(name: str, pictures: Mapping[str, bytes]) -> list[Picture]:
    return [picture for picture in PICTURES if file_name(name, picture, LIGHT) in pictures]


def _picture(name: str, picture: Picture, of: Summary, pictures: Mapping[str, bytes]) -> dict[str, str]:
    metric = str(of.task["metric"])
    words_for = {"metric": metric, "Metric": metric[:1].upper() + metric[1:]}
    light, dark = (
        f"data:image/png;base64,{b64encode(pictures[file_name(name, picture, style)]).decode()}"
        for style in (LIGHT, DARK)
    )
    title, reading = picture.title.format(**words_for), picture.reading.format(**words_for)
    return {"title": title, "reading": reading, "light": light, "dark": dark}


def _each(values: Iterable[str]) -> str:
    """Those that differ, in the order in which they come."""
    return ", ".join(dict.fromkeys(values))
