"""A user's own table, read by the library ``datasets``, made into what is to be learnt."""

from __future__ import annotations

import csv
import glob
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .encoding import Examples
from .packages import require_package
from .refusals import BadOption

if TYPE_CHECKING:
    from datasets import Dataset

CLASSIFICATION, PAIR, REGRESSION, LANGUAGE = KINDS = ("classification", "pair", "regression", "language")
FILE_TYPES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SPLITS = {"train": "train", "validation": "validation", "test": "test"}
MOST_CLASSES = 1000
FEW_CLASSES = 10  # of which hardly one needs to have two examples
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
NO_LABEL = ["", "nan", "NaN"]  # in a CSV file; in a text, and all else, are words


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns: the text, the second text of a pair if any, the label (no use to a language)."""

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"


@dataclass(frozen=True)
class Learnable:
    """What a table teaches: the kind of task, the names of its classes (None: it has none), the examples by split."""

    kind: str
    classes: tuple[str, ...] | None
    splits: dict[str, Examples]


def read(
    source: str,
    columns: Columns,
    kind: str | None = None,
    config: str | None = None,
    splits: Mapping[str, str] = SPLITS,
) -> Learnable:
    """What ``source`` teaches: a file, a folder, or a data set on the hub, ``owner/name`` or ``owner/name:config``.

    Args:
        kind: one of :data:`KINDS`. None: fractions as labels make a regression; else a second text makes pairs.
        config: which of a data set's tables, where its name does not say it.
        splits: train, and validation and test where there are any: what ``source`` calls them.

    Raises:
        BadOption: there is no such source or column, or what stands there cannot be learnt.
        MissingPackage: the library datasets is not installed.
    """
    require_package("datasets", "pip install datasets")
    if columns.text_pair is None and kind == PAIR:
        raise BadOption("--text-pair", "which column holds the second texts of the pairs?")
    if columns.text_pair is not None and kind in (CLASSIFICATION, LANGUAGE):
        raise BadOption("--text-pair", f"--kind {kind} has no second text")
    if columns.text_pair == columns.text:
        raise BadOption("--text-pair", f"the column '{columns.text}' holds the first texts already")
    if kind != LANGUAGE and columns.label in (columns.text, columns.text_pair):
        raise BadOption("--label", f"the column '{columns.label}' holds the texts")
    with tempfile.TemporaryDirectory() as cache, _quiet_library():
        tables = _chosen(source, _load(source, config, cache, columns.label), splits)
        texts = {split: _texts(table, columns.text, "--text", split) for split, table in tables.items()}
        if kind == LANGUAGE:
            return Learnable(kind, None, {split: Examples(texts[split]) for split in tables})
        found = {split: _labels(table, columns.label) for split, table in tables.items()}
        names = getattr(tables["train"].features[columns.label], "names", None)  # of a ClassLabel
        pairs: dict[str, list[str] | None] = dict.fromkeys(tables)
        if columns.text_pair is not None:
            pairs |= {split: _texts(tables[split], columns.text_pair, "--text-pair", split) for split in tables}
    # Competitions publish their test split without labels.
    labels = {split: own for split, own in found.items() if split == "train" or own.count(None) < len(own)}
    values = [value for split in labels for value in _all_there(labels[split], columns.label, split)]
    if kind is None:
        kind = _kind_of(values, columns.label)
    classes: tuple[str, ...] | None = None
    known: Mapping[Any, Any]
    if kind == REGRESSION:
        known = _numbers(values, columns.label)
    else:
        kind = CLASSIFICATION if columns.text_pair is None else PAIR
        classes, known = _classes(values, names, columns.label)
    return Learnable(
        kind,
        classes,
        {split: Examples(texts[split], pairs[split], [known[value] for value in labels[split]]) for split in labels},
    )


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Without its progress bars and its log: what goes wrong reaches the user in one line of ours."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _load(source: str, config: str | None, cache: str, label: str) -> Mapping[str, Dataset]:
    path = Path(source)
    hub = HUB_NAME.fullmatch(source)
    if path.exists():
        return _from_disk(path, config, cache, label)
    if hub is None or path.suffix.lower() in FILE_TYPES:
        raise BadOption("--data", f"there is no file or folder {source}, and it is no name of a data set on the hub")
    import datasets

    try:
        return datasets.load_dataset(hub["name"], hub["config"] or config)
    except Exception as error:  # of the hub, of HTTP, of the sockets: each library has its own
        raise BadOption(
            "--data",
            f"{source} did not come from the hub ({_first_line(error)}); "
            "--data with a file or a folder needs no network, nor do the built-in tasks",
        ) from error


def _from_disk(path: Path, config: str | None, cache: str, label: str) -> Mapping[str, Dataset]:
    import datasets

    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    types = {FILE_TYPES.get(file.suffix.lower()) for file in files}
    if path.is_file() and types == {None}:
        raise BadOption("--data", f"{path} has a type that is not known; known are {', '.join(FILE_TYPES)}")
    if not any(file.stat().st_size for file in files):
        raise BadOption("--data", f"{path} is empty")
    options: dict[str, Any] = {"cache_dir": cache}
    if "csv" in types:
        options |= {"keep_default_na": False, "na_values": {label: NO_LABEL}}
    if path.suffix.lower() == ".tsv":
        options["sep"] = "\t"
    for file in files:
        if FILE_TYPES.get(file.suffix.lower()) == "csv":
            _check_header(file, "\t" if file.suffix.lower() == ".tsv" else ",")
    try:
        if path.is_file():
            return datasets.load_dataset(*types, data_files=glob.escape(str(path)), **options)
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        if (path / "state.json").is_file():
            return {"train": datasets.load_from_disk(str(path))}
        return datasets.load_dataset(str(path), config, **options)
    except (datasets.exceptions.DatasetsError, IndexError, OSError, ValueError) as error:  # IndexError: no rows
        raise BadOption(
            "--data", f"no examples can be read from {path}: {_first_line(error.__cause__ or error)}"
        ) from error


def _check_header(file: Path, separator: str) -> None:
    """Of columns that have one name pandas renames all but the first; a field more than there are names it takes for
    an index, and the text for the field behind it."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        rows = csv.reader(lines, delimiter=separator)
        names, first = next(rows, []), next(rows, None)
    for name in names:
        if names.count(name) > 1:
            raise BadOption("--data", f"{file} has {names.count(name)} columns with the name '{name}'")
    if first is not None and len(first) > len(names):
        raise BadOption(
            "--data",
            f"{file} has {len(first)} fields in its first row and {len(names)} names of columns: a text that holds the "
            "separator stands in quotes",
        )


def _chosen(source: str, tables: Mapping[str, Dataset], splits: Mapping[str, str]) -> dict[str, Dataset]:
    """The splits that are wanted; a table that has a single one, whatever its name, is to be trained on."""
    found = {split: tables[name] for split, name in splits.items() if name in tables}
    if len(tables) == 1:
        found = {"train": next(iter(tables.values()))}
    if "train" not in found:
        raise BadOption("--data", f"{source} has no split {splits['train']}; there are: {', '.join(tables)}")
    return found


def _column(table: Dataset, name: str, option: str) -> list[Any]:
    if name not in table.column_names:
        raise BadOption(option, f"there is no column '{name}'; {_names(table)}")
    return table[name][:]


def _names(table: Dataset) -> str:
    return f"the columns are: {', '.join(table.column_names)}"


def _texts(table: Dataset, name: str, option: str, split: str) -> list[str]:
    values = _column(table, name, option)
    for row, value in enumerate(values, 1):
        if value is None or value == "" or (isinstance(value, str) and not value.strip()):
            raise BadOption(option, f"row {row} of the split {split} has no text in the column '{name}'")
        if not isinstance(value, str):
            raise BadOption(option, f"the column '{name}' holds no texts: row {row} of the split {split} is {value!r}")
    return values


def _labels(table: Dataset, name: str) -> list[Any]:
    """The labels as they stand there, None where there is none; a class that has a name is a number still."""
    values = _column(table, name, "--label")
    named = hasattr(table.features[name], "names")
    return [None if value != value or (named and value == -1) else value for value in values]


def _all_there(values: Sequence[Any], name: str, split: str) -> Sequence[Any]:
    for row, value in enumerate(values, 1):
        if value is None:
            raise BadOption("--label", f"row {row} of the split {split} has no label in the column '{name}'")
        if not isinstance(value, (str, int, float)):
            raise BadOption("--label", f"the column '{name}' holds neither classes nor numbers: row {row} is {value!r}")
    return values


def _kind_of(values: Sequence[Any], name: str) -> str:
    """Fractions are to be approached, all else is a class. Few whole numbers written as fractions may be either: that
    is how classes come out of a program that had one missing."""
    if not any(isinstance(value, float) for value in values):
        return CLASSIFICATION
    few = set(values)
    if 1 < len(few) <= FEW_CLASSES and all(
        isinstance(value, (int, float)) and float(value).is_integer() for value in few
    ):
        shown = ", ".join(map(str, sorted(few)))
        raise BadOption("--kind", f"the column '{name}' holds {shown}: say classification or regression")
    return REGRESSION


def _numbers(values: Sequence[Any], name: str) -> dict[Any, float]:
    for value in values:
        if isinstance(value, str) or not math.isfinite(value):
            raise BadOption("--label", f"a regression learns finite numbers; the column '{name}' holds {value!r}")
    known = {value: float(value) for value in values}
    if len(known) == 1:
        raise BadOption("--label", f"nothing can be learnt: the column '{name}' holds {values[0]!r} alone")
    return known


def _classes(values: Sequence[Any], names: Sequence[str] | None, name: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The names of the classes, and the number of each label: in order of the numbers, or of the alphabet."""
    found = set(values)
    if len(found) == 1:
        raise BadOption("--label", f"nothing can be learnt: the column '{name}' holds the class {values[0]!r} alone")
    if len(found) > MOST_CLASSES:
        raise BadOption(
            "--label",
            f"the column '{name}' holds {len(found)} different values, more than {MOST_CLASSES} classes: is it an id, "
            "or are it numbers, to be learnt with --kind regression?",
        )
    if len(found) > max(FEW_CLASSES, len(values) // 2):
        raise BadOption(
            "--label",
            f"the column '{name}' holds {len(found)} different values in {len(values)} examples: hardly a class has "
            "two; numbers are learnt with --kind regression",
        )
    if names is not None:
        return tuple(names), {number: number for number in range(len(names))}
    ordered = sorted(found, key=str if any(isinstance(value, str) for value in found) else None)
    return tuple(str(value) for value in ordered), {value: number for number, value in enumerate(ordered)}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
