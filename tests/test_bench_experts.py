"""The bench of experts records what it says. No speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fastpeft.bench import experts


def test_a_row_for_each_size_and_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(experts.SHAPES, "small", experts.Shape(experts=4, chosen=2, hidden=16, intermediate=8))
    options = ["--rounds", "2", "--tokens", "5", "--tokens", "9", "--dtype", "fp32", "--out", str(tmp_path)]
    result = CliRunner().invoke(experts.command, options)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*-experts.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["tokens"], row["phase"]) for row in found] == [(n, p) for n in (5, 9) for p in experts.PHASES]
    for row in found:
        assert row["backend"] == "cpu" and row["parity"]["passed"], row["parity"]
        assert row["parity"]["errors"].keys() == {"y", "dx", "dweights", "dA", "dB"}
        assert set(row["seconds"]) == set(row["bytes"]) == {"base", "peft", "fastpeft"}
        assert row["over_peft"]["q1"] <= row["over_peft"]["median"] <= row["over_peft"]["q3"]
        kept = {name: each["kept"] for name, each in row["bytes"].items()}
        assert kept["fastpeft"] < kept["peft"]  # which keeps the adapted weights of all experts
    table = path.with_suffix(".md").read_text()
    assert table in result.output and table.count("\n| fp32 | ") == 4
    for row in found:
        row["parity"]["passed"] = False
    assert experts.markdown(found).count("| parity fails | parity fails |") == 4
