"""A report's files: written together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.experiments.output import try_out, write_together


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_trying_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    try_out(tmp_path / "a" / "b", ["report"])
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_trying_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("old")
    try_out(tmp_path, ["report"])
    assert contents(tmp_path) == {"report": "old"}


def test_trying_finds_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    with pytest.raises(IsADirectoryError, match=r"report"):
        try_out(tmp_path, ["report"])


def test_all_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    write_together(tmp_path, {"a": lambda path: path.write_text("new a"), "b": lambda path: path.write_text("new b")})
    assert contents(tmp_path) == {"a": "new a", "b": "new b"}


def test_a_stop_while_writing_leaves_the_old_files(tmp_path: Path) -> None:
    def stopped(path: Path) -> None:
        path.write_text("ha")
        raise KeyboardInterrupt

    (tmp_path / "a").write_text("old a")
    (tmp_path / "b").write_text("old b")
    with pytest.raises(KeyboardInterrupt):
        write_together(tmp_path, {"a": lambda path: path.write_text("new a"), "b": stopped})
    assert contents(tmp_path) == {"a": "old a", "b": "old b"}


def test_a_stop_while_replacing_never_leaves_old_beside_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def only_the_first(self: Path, target: Path) -> Path:
        if target.name == "b":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", only_the_first)
    (tmp_path / "a").write_text("old a")
    (tmp_path / "b").write_text("old b")
    with pytest.raises(KeyboardInterrupt):
        write_together(tmp_path, {name: lambda path: path.write_text("new") for name in ("a", "b")})
    assert contents(tmp_path) == {"a": "new"}
