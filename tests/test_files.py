"""A user's own tables and GLUE's: read from files that the test writes, refused where nothing can be learnt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from fastpeft.experiments import files, packages, tasks
from fastpeft.experiments.encoding import Examples
from fastpeft.experiments.files import Columns, Learnable, read
from fastpeft.experiments.glue import GLUE
from fastpeft.experiments.packages import MissingPackage
from fastpeft.experiments.refusals import BadOption
from fastpeft.experiments.tasks import Sizes, load_task

TEXTS = ["good film", "NA", 'a "quoted", text', "naïve\nlines"]


def write(path: Path, columns: dict[str, Sequence[Any]]) -> Path:
    """A file of these columns, of the type that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix in (".csv", ".tsv"):
        frame = table.to_pandas()
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        path.write_text(json.dumps(table.to_pylist()))
    return path


def test_a_text_may_be_the_word_nan_and_a_label_may_not(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\nnan,a\nNaN,b\nNone,a\n")
    assert read(str(path), Columns()).splits["train"].texts == ["nan", "NaN", "None"]
    for nothing in ("", "nan", "NaN"):
        path.write_text(f"text,label\nnan,a\nNaN,{nothing}\nNone,b\n")
        with pytest.raises(BadOption, match="--label: row 2 of the split train has no label"):
            read(str(path), Columns())
    path.write_text('text,label\ngood,a\n"",b\n')
    with pytest.raises(BadOption, match="--text: row 2 of the split train has no text"):
        read(str(path), Columns())


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.json", "x.JSONL", "x.parquet", "x[1] *.csv"])
def test_every_type_of_file_is_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name.lower(), {"body": TEXTS, "stars": [3, 1, 1, 2]}).rename(tmp_path / name)
    found = read(str(path), Columns("body", label="stars"))
    assert found == Learnable("classification", ("1", "2", "3"), {"train": Examples(TEXTS, labels=[2, 0, 0, 1])})


def test_a_folder_says_its_splits_by_the_files_names(tmp_path: Path) -> None:
    for i, split in enumerate(("train", "validation", "test")):
        write(
            tmp_path / f"{split}.csv", {"text": [f"{split} {word}" for word in TEXTS], "label": [i, (i + 1) % 3, i, 1]}
        )
    found = read(str(tmp_path), Columns())
    assert found.classes == ("0", "1", "2")
    assert {split: part.texts[1] for split, part in found.splits.items()} == {
        split: f"{split} NA" for split in ("train", "validation", "test")
    }
    assert found.splits["test"].labels == [2, 0, 2, 1]
    task = load_task(str(tmp_path), sizes=Sizes(test=2))
    assert (len(task.train), len(task.valid), len(task.test)) == (4, 4, 2)
    assert set(task.test.texts) < {f"test {word}" for word in TEXTS}


@pytest.mark.parametrize("single", [False, True])
def test_a_saved_data_set_is_read(tmp_path: Path, single: bool) -> None:
    table = datasets.Dataset.from_dict({"text": TEXTS, "label": ["no", "yes", "no", "no"]})
    saved = table if single else datasets.DatasetDict({"train": table, "test": table.select([0, 1])})
    saved.save_to_disk(tmp_path / "saved")
    found = read(str(tmp_path / "saved"), Columns())
    assert found.splits["train"] == Examples(TEXTS, labels=[0, 1, 0, 0])
    assert list(found.splits) == (["train"] if single else ["train", "test"])
    table.select([]).save_to_disk(tmp_path / "nothing")
    with pytest.raises(BadOption, match=r"--data: no examples can be read from .*nothing"):
        read(str(tmp_path / "nothing"), Columns())


def test_a_missing_split_is_cut_from_those_to_train_on(tmp_path: Path) -> None:
    count = 40
    path = write(
        tmp_path / "x.csv", {"text": [f"text {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
    )
    task = load_task(str(path), seed=1)
    assert [len(part) for part in (task.train, task.valid, task.test)] == [32, 4, 4]
    assert sorted([*task.train.texts, *task.valid.texts, *task.test.texts]) == sorted(f"text {i}" for i in range(count))
    assert load_task(str(path), seed=1) == task
    assert load_task(str(path), seed=2).test != task.test
    task = load_task(str(path), sizes=Sizes(train=5, valid=6, test=7), seed=1)
    assert [len(part) for part in (task.train, task.valid, task.test)] == [5, 6, 7]


@pytest.mark.parametrize(
    ("labels", "kind", "found", "classes", "expected"),
    [
        (["b", "a", "b", "10"], None, "classification", ("10", "a", "b"), [2, 1, 2, 0]),
        ([10, 9, 10, -1], None, "classification", ("-1", "9", "10"), [2, 1, 2, 0]),
        ([True, False, True, True], None, "classification", ("False", "True"), [1, 0, 1, 1]),
        ([1.0, 0.5, 1.0, 1.0], None, "regression", None, [1.0, 0.5, 1.0, 1.0]),
        ([1.0, 0.0, 1.0, 1.0], "classification", "classification", ("0.0", "1.0"), [1, 0, 1, 1]),
        ([1.5, 0.0, 1.5, 0.0], "classification", "classification", ("0.0", "1.5"), [1, 0, 1, 0]),
        ([3, 1, 2, 1], "regression", "regression", None, [3.0, 1.0, 2.0, 1.0]),
    ],
)
def test_the_kind_follows_from_the_labels(
    tmp_path: Path, labels: list[Any], kind: str | None, found: str, classes: Any, expected: list[Any]
) -> None:
    for name in ("x.csv", "x.parquet"):
        learnt = read(str(write(tmp_path / name, {"text": TEXTS, "label": labels})), Columns(), kind)
        assert learnt == Learnable(found, classes, {"train": Examples(TEXTS, labels=expected)})
        assert [type(label) for label in learnt.splits["train"].labels] == [type(label) for label in expected]


def test_a_second_text_makes_pairs(tmp_path: Path) -> None:
    columns = {"a": TEXTS, "b": TEXTS[::-1], "same": [0, 1, 0, 1], "alike": [0.5, 1.0, 2.0, 3.0]}
    path = str(write(tmp_path / "x.jsonl", columns))
    pairs = read(path, Columns("a", "b", "same"))
    assert pairs == Learnable("pair", ("0", "1"), {"train": Examples(TEXTS, TEXTS[::-1], [0, 1, 0, 1])})
    numbers = read(path, Columns("a", "b", "alike"))
    assert numbers == Learnable("regression", None, {"train": Examples(TEXTS, TEXTS[::-1], [0.5, 1.0, 2.0, 3.0])})
    assert read(path, Columns("b"), "language") == Learnable("language", None, {"train": Examples(TEXTS[::-1])})


def test_metrics_follow_from_the_kind(tmp_path: Path) -> None:
    columns = {
        "text": [f"text {i}" for i in range(30)],
        "three": [i % 3 for i in range(30)],
        "x": [i / 2 for i in range(30)],
    }
    path = str(write(tmp_path / "x.parquet", columns))
    assert load_task(path, label="three").metrics == ("accuracy", "macro_f1")
    assert load_task(path, label="x").metrics == ("pearson", "spearman")
    language = load_task(path, kind="language", sizes=Sizes(train=9))
    assert (language.metrics, language.train.blocks, len(language.train)) == (("perplexity",), 9, 24)


LABELS = [0, 1, 0, 1]
NAN = float("nan")


@pytest.mark.parametrize(
    ("columns", "options", "option", "problem"),
    [
        (
            {"text": TEXTS, "label": LABELS},
            {"text": "body"},
            "--text",
            "no column 'body'; the columns are: text, label",
        ),
        (
            {"text": TEXTS, "label": LABELS},
            {"text_pair": "b"},
            "--text-pair",
            "no column 'b'; the columns are: text, lab",
        ),
        ({"text": TEXTS, "label": LABELS}, {"label": "y"}, "--label", "no column 'y'; the columns are: text, label"),
        ({"text": TEXTS, "label": [1] * 4}, {}, "--label", "'label' holds the class 1 alone"),
        ({"text": TEXTS, "label": [1.0] * 4}, {}, "--label", "'label' holds 1.0 alone"),
        ({"text": TEXTS, "label": ["a", "b", "a", None]}, {}, "--label", "row 4 of the split train has no label"),
        ({"text": TEXTS, "label": [0.5, NAN, 1.0, 2.0]}, {}, "--label", "row 2 of the split train has no label"),
        ({"text": TEXTS, "label": [0.5, 1.0, float("inf"), 2.0]}, {}, "--label", "finite numbers; .* holds inf"),
        ({"text": TEXTS, "label": list("abcd")}, {"kind": "regression"}, "--label", "finite numbers; .* holds 'a'"),
        ({"text": ["a", "b", " ", "d"], "label": LABELS}, {}, "--text", "row 3 of the split train has no text"),
        ({"text": ["a", None, "c", "d"], "label": LABELS}, {}, "--text", "row 2 of the split train has no text"),
        ({"text": [1, 2, 3, 4], "label": LABELS}, {}, "--text", "'text' holds no texts: row 1 of the split train is 1"),
        (
            {"text": TEXTS, "b": [2] * 4, "label": LABELS},
            {"text_pair": "b"},
            "--text-pair",
            "'b' holds no texts: row 1",
        ),
        ({"text": TEXTS, "label": LABELS}, {"label": "text"}, "--label", "the column 'text' holds the texts"),
        (
            {"text": TEXTS, "label": LABELS},
            {"text_pair": "text"},
            "--text-pair",
            "'text' holds the first texts already",
        ),
        ({"text": TEXTS, "b": TEXTS, "label": LABELS}, {"text_pair": "b", "label": "b"}, "--label", "holds the texts"),
        ({"text": TEXTS, "label": [0.0, 1.0, 1.0, 2.0]}, {}, "--kind", "holds 0.0, 1.0, 2.0: say classification or"),
        ({"text": TEXTS * 3, "label": [*range(11), 0]}, {}, "--label", "11 different values in 12 examples: hardly"),
        ({"text": TEXTS, "label": LABELS}, {}, "--data", "4 examples are too few to hold some out of them for a test"),
    ],
)
@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_what_cannot_be_learnt_is_refused(
    tmp_path: Path, name: str, columns: dict[str, Any], options: dict[str, str], option: str, problem: str
) -> None:
    path = write(tmp_path / name, columns)
    with pytest.raises(BadOption, match=f"^{option}: .*{problem}") as raised:
        load_task(str(path), **options)
    assert "\n" not in str(raised.value)


def test_an_id_is_no_class(tmp_path: Path) -> None:
    count = files.MOST_CLASSES + 1
    path = write(tmp_path / "x.parquet", {"text": ["text"] * count, "label": list(range(count))})
    with pytest.raises(BadOption, match=r"holds 1001 different values.*id.*--kind regression"):
        read(str(path), Columns())


def test_labels_that_are_lists_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"text": TEXTS, "label": [[1], [2], [1], [2]]})
    with pytest.raises(
        BadOption, match=r"--label: the column 'label' holds neither classes nor numbers: row 1 is \[1\]"
    ):
        read(str(path), Columns())


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.csv", b"text,label\nHello, you,1\nBye, you,0\n", "3 fields in its first row and 2 names of columns"),
        ("x.tsv", b"text\tlabel\na\tb\t1\n", "3 fields in its first row and 2 names of columns"),
        ("x.csv", b"text,text,label\na,b,1\n", "2 columns with the name 'text'"),
        ("x.csv", b"", "x.csv is empty"),
        ("x.parquet", None, "no examples can be read from .*x.parquet: "),
        ("x.csv", b"text,label\n", "no examples can be read from .*x.csv: "),
        ("x.txt", b"text", r"x.txt has a type that is not known; known are .csv, .tsv, .json, .jsonl, .parquet"),
        ("x.parquet", b"no parquet", "no examples can be read from .*x.parquet: .*[Pp]arquet"),
        ("x.jsonl", b"{no json", "no examples can be read from .*x.jsonl: "),
        ("x.csv", b"text,label\na,1\nb,2,3\n", "no examples can be read from .*x.csv: "),
        ("x.csv", b"text,label\n\xff\xfe,1\n", "no examples can be read from .*x.csv: "),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes | None, problem: str
) -> None:
    write(tmp_path / name, {"text": [], "label": []})
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadOption, match=f"^--data: .*{problem}") as raised:
        read(str(tmp_path / name), Columns())
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_folders_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"--data: .*empty is empty"):
        (tmp_path / "empty").mkdir()
        read(str(tmp_path / "empty"), Columns())
    write(tmp_path / "other" / "test.csv", {"text": TEXTS, "label": LABELS})
    write(tmp_path / "other" / "validation.csv", {"text": TEXTS, "label": LABELS})
    with pytest.raises(BadOption, match=r"--data: .*other has no split train; there are: "):
        read(str(tmp_path / "other"), Columns())


def test_without_a_network_the_hub_is_refused_with_what_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nobody/nothing:config", "sst2"):
        with pytest.raises(BadOption, match=r"^--data: .* did not come from the hub \(.*--data with a file") as raised:
            load_task(name)
        assert "\n" not in str(raised.value)


def test_the_library_datasets_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="package datasets is missing; bring it with: pip install datasets"):
        load_task(str(write(tmp_path / "x.csv", {"text": TEXTS, "label": LABELS})))


@pytest.fixture
def glue_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder laid out as GLUE's repository, with 40 examples to train on, 6 to validate on and 5 without labels."""
    configs = []
    for name, task in GLUE.items():
        configs += [f"- config_name: {name}", "  data_files:"]
        label: Any = (
            datasets.ClassLabel(names=["no", "maybe", "yes"])
            if task.kind != "regression"
            else datasets.Value("float32")
        )
        features = datasets.Features({**{column: datasets.Value("string") for column in task.columns}, "label": label})
        for split, count in (("train", 40), (task.test, 6), ("test", 5)):
            labels = [-1] * count if split == "test" else [i % 3 for i in range(count)]
            columns = {column: [f"{name} {split} {column} {i}" for i in range(count)] for column in task.columns}
            path = tmp_path / name / f"{split}.parquet"
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(columns | {"label": labels}, features).to_parquet(path)
            configs += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (tmp_path / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", ""]))
    monkeypatch.setattr(tasks, "REPOSITORY", str(tmp_path))


@pytest.mark.parametrize("name", GLUE)
def test_glue_is_tested_on_what_it_validates_on(glue_folder: None, name: str) -> None:
    task, known = load_task(name), GLUE[name]
    assert (task.kind, task.metrics) == (known.kind, known.metrics)
    assert [len(part) for part in (task.train, task.valid, task.test)] == [36, 4, 6]
    number = float if task.kind == "regression" else int
    assert task.test.labels == [number(i % 3) for i in range(6)]
    assert {type(label) for label in task.test.labels} == {number}
    assert task.test.texts == [f"{name} {known.test} {known.columns[0]} {i}" for i in range(6)]
    assert task.classes == (None if task.kind == "regression" else ("no", "maybe", "yes"))
    if len(known.columns) == 2:
        assert task.train.pairs is not None
        assert all(text.startswith(f"{name} train {known.columns[1]} ") for text in task.train.pairs)


def test_a_split_without_labels_is_left_out(glue_folder: None, tmp_path: Path) -> None:
    assert list(read(str(tmp_path), Columns("sentence"), config="sst2").splits) == ["train", "validation"]
