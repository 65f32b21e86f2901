"""What fastpeft compare makes of its rows: tables, pictures, the page."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_rows import FUSED, LANGUAGE, ODD, TASK, TRAINING, comparison, failed, row
from PIL import Image
from rich.console import Console

from fastpeft.experiments.compare import figures, plots, readme, tables, words
from fastpeft.experiments.compare.literature import load_literature
from fastpeft.experiments.compare.page import render_page
from fastpeft.experiments.compare.report import write_report
from fastpeft.experiments.compare.rows import Rows
from fastpeft.experiments.compare.style import DARK, FAMILIES, LIGHT, drawing, family
from fastpeft.experiments.compare.summary import Summary, summaries, usual, without_plain

SEEDS = 3


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """A whole comparison: a run that failed, a method that never ran, a grid around LoRA."""
    whole = comparison(SEEDS)
    for i, each in enumerate(whole):
        if each["method"] == "vera" or (each["method"], each["seed"]) == ("bitfit", 2):
            whole[i] = failed(each["method"], each["seed"], ODD, engine=each["engine"])
    grid = [row("lora", settings={"rank": rank, "targets": "all-linear"}) for rank in (2, 4, 64)]
    grid += [row("lora", settings={"rank": 16, "targets": targets}) for targets in ("attention", "default")]
    return whole + grid


@pytest.fixture(scope="module")
def every(rows: list[dict[str, Any]]) -> list[Summary]:
    return summaries(rows)


@pytest.fixture(scope="module")
def folder(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of ``rows``, drawn without a warning."""
    made = tmp_path_factory.mktemp("report")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(rows, made)
    return made


def by_label(every: list[Summary]) -> dict[str, Summary]:
    return {own.label: own for own in every}


def test_variants_have_labels_of_their_own(every: list[Summary]) -> None:
    labels = [own.label for own in every]
    assert len(set(labels)) == len(labels)
    assert {"LoRA, r = 16", "lora: rank = 2", "lora: targets = attention", "LoRA, r = 16 in plain PEFT"} <= set(labels)
    assert labels.index("LoRA, r = 16 in plain PEFT") == labels.index("LoRA, r = 16") + 1
    assert "(IA)³" in labels  # PEFT alone runs it: there is nothing to tell it from


def test_pictures_take_the_usual_variant(every: list[Summary]) -> None:
    lora = [own for own in usual(without_plain(every)) if own.method == "lora"]
    assert [own.label for own in lora] == ["LoRA, r = 16"]


# Tables


def test_csv_reads_back(folder: Path, every: list[Summary]) -> None:
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [own.label for own in every]
    for line, own in zip(lines, every, strict=True):
        assert line["score"] == ("" if own.score is None else repr(own.score.mean))
        assert line["failures"] == words.failures(own)
        assert line["trainable"] == ("" if own.trainable is None else str(own.trainable))


def test_markdown_has_a_cell_for_each_column(folder: Path, every: list[Summary]) -> None:
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    columns = len(tables.shown(every))
    assert len(lines) == len(every) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {columns + 1}
    text = (folder / "table.md").read_text()
    assert "50% of a\\_b & {c} #1 $2 ~ ^ \\\\ \\<d\\> \\| 12 GiB" in text


def test_latex_is_whole(folder: Path, every: list[Summary]) -> None:
    text = (folder / "table.tex").read_text()
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == len(every) + 1
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(tables.shown(every)) - 1}
    assert len(re.findall(r"(?<!\\)\{", text)) == len(re.findall(r"(?<!\\)\}", text))
    assert not re.search(r"(?<!\\)[%#$~]", text)
    assert not re.search(r"(?<!\\)_", text)
    assert r"50\% of a\_b \& \{c\} \#1 \$2 \textasciitilde{} \^{} \textbackslash{}" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1


def test_the_terminal_s_table_is_narrow_and_whole(rows: list[dict[str, Any]], every: list[Summary]) -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(tables.terminal_table(summaries(rows)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert text.count("in plain PEFT") == len(FUSED) + 1  # and once more for what failed
    assert "failed" in text
    shown = next(line for line in text.splitlines() if line.lstrip().startswith("DoRA, r = 16"))
    own = by_label(every)["DoRA, r = 16"]
    for part in (words.count(own.trainable), words.spread(own.score, 0.01), words.percent(own.retention), "1.60×"):
        assert part in shown


def test_comparisons_of_two_machines_have_titles_of_their_own(tmp_path: Path) -> None:
    alone, other = row("full"), row("full", threads=8)
    assert words.scopes([summaries([alone])]) == ["movie reviews · MiniLM-L6, a BERT encoder"]
    titles = [f"movie reviews · MiniLM-L6, a BERT encoder · a-machine, {threads} threads" for threads in (2, 8)]
    write_report([alone, other], tmp_path)
    for name in ("table.md", "table.tex", "page.html"):
        assert all(title in (tmp_path / name).read_text() for title in titles)
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(tables.terminal_table(summaries([alone, other])))
    assert all(f"{threads} threads" in console.export_text(clear=False) for threads in (2, 8))


def test_metrics_beside_the_score_have_a_column(tmp_path: Path) -> None:
    write_report([row("full", scores={"accuracy": 0.9, "f1": 0.8}), row("full", 1, scores={"f1": 0.9})], tmp_path)
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [line["scores"] for line in csv.DictReader(file)] == ["f1 0.850"]
    write_report([row("full", scores={"accuracy": 0.9})], tmp_path)
    assert "other metrics" not in (tmp_path / "table.md").read_text()


def test_settings_of_a_grid_are_written_as_a_reader_would() -> None:
    rates = [row("lora"), row("lora", training={**TRAINING, "learning_rate": 3 * 0.1})]
    assert [own.label for own in summaries(rates)] == ["LoRA, r = 16", "lora: learning_rate = 0.3"]


def test_columns_without_a_number_are_left_out() -> None:
    shown = {column.key for column in tables.shown(summaries([row("ia3")]))}
    assert not {"retention", "gap_points", "speed_up_over_peft", "forgetting"} & shown
    assert {"method", "score", "runs"} <= shown


@pytest.mark.parametrize(
    ("show", "number", "text"),
    [
        (words.count, 999_600, "1.00M"), (words.count, 295_682, "296k"), (words.count, 12, "12"),
        (words.size, 2**20, "1.00 MiB"), (words.size, 12.3 * 2**30, "12.3 GiB"), (words.size, 512, "512 B"),
        (words.duration, 0.0123, "12.3 ms"), (words.duration, 2.5, "2.50 s"), (words.duration, 150, "2.5 min"),
        (words.share, 0.000541, "0.0541 %"), (words.share, 1.0, "100 %"), (words.percent, 0.987, "98.7 %"),
        (words.points, -1.234, "-1.23"), (words.times, None, "–"),
    ],
)  # fmt: skip
def test_numbers_in_words(show: Any, number: float | None, text: str) -> None:
    assert show(number) == text


# Pictures


def test_every_picture_is_drawn_in_both_variants(folder: Path) -> None:
    for picture in plots.PICTURES:
        for style in (LIGHT, DARK):
            with Image.open(folder / plots.file_name("reviews-minilm", picture, style)) as image:
                paper = image.convert("RGB").getpixel((1, 1))
            assert paper == tuple(int(style.paper[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("draw", [figures.score_by_parameters, figures.score_by_time], ids=["parameters", "time"])
def test_no_label_hides_another(every: list[Summary], draw: Any) -> None:
    with drawing(LIGHT):
        figure = draw([own for own in every if own.score is not None], LIGHT)
        figure.draw_without_rendering()
        axes = figure.axes[0]
        labels = [text for text in axes.texts if text.get_text()]
        boxes = {text.get_text(): text.get_window_extent() for text in labels}
        inside = axes.get_window_extent()
    trained = {own.label for own in usual(without_plain(every)) if own.method not in ("none", "vera")}
    assert set(boxes) == trained
    assert len(trained) >= 20
    for (first, box), (second, other) in combinations(boxes.items(), 2):
        assert not box.overlaps(other), f"{first} and {second}"
    for label, box in boxes.items():
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, label
        assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, label


@pytest.mark.parametrize("name", [picture.name for picture in plots.PICTURES])
def test_nothing_sticks_out_of_the_picture(every: list[Summary], name: str) -> None:
    picture = next(picture for picture in plots.PICTURES if picture.name == name)
    with drawing(DARK):
        figure = picture.figure([own for own in every if own.score is not None], DARK)
        assert figure is not None
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()


@pytest.mark.parametrize("draw", [figures.score_by_rank, figures.score_by_targets])
def test_joined_points_lie_within_the_axes_beside_each_other(every: list[Summary], draw: Any) -> None:
    with drawing(LIGHT):
        figure = draw(without_plain(every), LIGHT)
        (axes,) = figure.axes
        figure.canvas.draw()
        lines = [line.get_xydata() for line in axes.lines if line.get_marker() not in ("_", "|", "None")]
    points = np.concatenate(lines)
    assert len({tuple(point) for point in points}) == len(points) > 2
    for values, (low, high) in zip(points.T, (axes.get_xlim(), axes.get_ylim()), strict=True):
        assert low < values.min() and values.max() < high


def test_pictures_without_rows_are_not_drawn(tmp_path: Path) -> None:
    drawn = {path.stem for path in plots.draw(summaries([row("ia3"), row("bitfit")]), tmp_path)}
    names = ("score-by-parameters", "score-by-time", "time-and-memory", "curves")
    assert drawn == {f"reviews-minilm-{name}" for name in names}
    assert plots.draw(summaries([failed("lora", 0, ODD)]), tmp_path) == []


def test_svg_is_the_same_each_time(every: list[Summary]) -> None:
    picture = plots.PICTURES[1]
    first, second = (plots.render(picture, every, form="svg") for _ in range(2))
    assert first is not None
    assert first == second
    assert first.startswith(b"<?xml")
    assert b"http" not in re.sub(
        rb'xmlns(:\w+)?="[^"]*"|rdf:about="[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>', b"", first, flags=re.S
    )


def test_comparisons_of_one_name_have_files_of_their_own() -> None:
    rows = [row("ia3"), row("ia3", threads=4), row("ia3", task={**TASK, "name": "Other & more"})]
    names = [name for name, _ in plots.named_comparisons(summaries(rows))]
    assert names == ["reviews-minilm", "reviews-minilm-2", "other-more-minilm"]


def test_families_have_colours_that_stay_apart() -> None:
    """No two are closer than the closest pair of the palette that Okabe and Ito (2008) made for all kinds of eyes."""
    okabe_ito = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
    for style in (LIGHT, DARK):
        assert len(style.families) == len(FAMILIES)
        assert _closest(style.families) >= _closest(okabe_ito), style.name


def _closest(colors: Sequence[str]) -> float:
    """The least difference of two colours for eyes with all cones and without those for red or for green.

    Viénot, Brettel and Mollon, 1999, on linear light.
    """
    kinds = (
        np.eye(3),
        np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
        np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]),
    )
    seen = [[np.clip(kind @ (_rgb(color) ** 2.2), 0, 1) ** (1 / 2.2) for color in colors] for kind in kinds]
    return min(np.abs(first - second).max() for each in seen for first, second in combinations(each, 2))


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def test_methods_have_their_families(every: list[Summary]) -> None:
    found = {own.method: family(own) for own in every}
    assert found["lora-bitfit"] == found["rslora"] == "LoRA"
    assert found["p-tuning"] == found["prefix"] == "prompts"
    assert found["qdora"] == "4-bit base"
    assert found["loreft"] == "others"


# The page


class Page(HTMLParser):
    """Tags that are open, what the page loads, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source", "br", "link"):
            self.open.append(tag)
        given = {name: value or "" for name, value in attrs}
        self.links += [given["href"]] if tag == "a" else []
        self.ids += [given["id"]] if "id" in given else []
        names = ("src", "srcset", "data", "poster", "action", *(("href",) if tag != "a" else ()))
        self.loads += [given[name] for name in names if name in given]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "page.html").read_text(encoding="utf-8"))


def test_the_page_is_whole_and_loads_nothing(folder: Path, page: Page) -> None:
    assert page.open == []
    assert len(page.loads) == 2 * len(plots.PICTURES)
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    text = (folder / "page.html").read_text(encoding="utf-8")
    styles = "".join(re.findall(r"<style>.*?</style>|<script>.*?</script>", text, flags=re.S))
    assert not re.search(r"url\(|@import|https?:|fetch\(|import ", styles)
    assert len(text) < 3_000_000
    assert {link for link in page.links if link.startswith("http")} == {finding.url for finding in load_literature()}
    assert {link for link in page.links if link.startswith("#")} <= {f"#{own}" for own in page.ids}


def test_the_page_tells_what_was_run(page: Page, every: list[Summary]) -> None:
    text = " ".join(page.words)
    for part in ("movie reviews", "MiniLM-L6", "8,000 examples", "a processor", "torch 2.13.0", "0123abc", "0, 1, 2"):
        assert part in text
    for own in every:
        assert own.label in text
    assert text.count(ODD) == 3
    for picture in plots.PICTURES:
        assert picture.title.format(metric="accuracy", Metric="Accuracy") in text


def test_the_page_without_rows_or_literature() -> None:
    with pytest.raises(ValueError, match="rows: there are none"):
        render_page([], [], {})
    rows = [failed("lora", 0, ODD)]
    text = " ".join(Page(render_page(rows, summaries(rows), {})).words)
    assert "No run of a trained method ended" in text
    assert "What papers report" not in text


def test_a_report_of_several_tasks(tmp_path: Path) -> None:
    curve: list[Any] = []  # which spares the slowest picture
    rows = [row(method, task=task, curve=curve) for task in (TASK, LANGUAGE) for method in ("full", "bitfit")]
    write_report(rows, tmp_path)
    assert (tmp_path / "table.tex").read_text().count(r"\begin{tabular}") == 2
    text = " ".join(Page((tmp_path / "page.html").read_text(encoding="utf-8")).words)
    assert "lower is better" in text
    assert "higher is better" in text
    assert {"reviews-minilm-retention.png", "prose-minilm-retention-dark.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


# What papers report


def test_literature_names_its_sources() -> None:
    findings = load_literature()
    for finding in findings:
        assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", finding.url)
        assert re.match(r"Table \d", finding.table)
        assert finding.results
        assert all(0 < result.score <= 100 for result in finding.results)


def test_readmes_table_sets_fastpeft_beside_plain_peft(tmp_path: Path) -> None:
    assert readme.block(tmp_path) == "No rows recorded yet."
    found = comparison(SEEDS)
    for each in found:
        each["engines"] = [own["engine"] for own in found if own["key"] == each["key"]]
    Rows(tmp_path).add(found)
    lines = readme.block(tmp_path).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:-2]}
    assert list(cells) == [
        "untrained", "full fine-tuning", "LoRA, r = 16", "DoRA, r = 16", "QLoRA, r = 16", "Houlsby adapters", "BitFit",
        "LoReFT, r = 4", "prefix tuning",
    ]  # fmt: skip
    every = by_label(summaries(found))
    for label, (score, retained, *_, step) in cells.items():
        own = every[label]
        assert score == words.spread(own.score, own.unit) and retained == words.percent(own.retention)
        if label in ("LoRA, r = 16", "DoRA, r = 16", "QLoRA, r = 16"):
            plain = every[f"{label} in plain PEFT"]
            assert own.against_full is not None and plain.against_full is not None
            assert step == f"**{own.against_full.median:.2f}×**, PEFT {plain.against_full.median:.2f}×"
    assert f"over {SEEDS} seeds" in lines[-1] and "movie reviews" in lines[-1]
