"""The bench of experts records what it says. No speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fastpeft.bench import experts

from fastpeft.experiments.models import METHODS


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
    assert "NF4" not in table
    assert table in result.output and table.count("\n| fp32 | ") == 4
    for row in found:
        row["parity"]["passed"] = False
    assert experts.markdown(found).count("| parity fails | parity fails |") == 4


def test_experts_in_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(experts.SHAPES, "small", experts.Shape(experts=4, chosen=2, hidden=64, intermediate=64))
    options = ["--rounds", "2", "--tokens", "5", "--dtype", "bf16", "--method", "qlora", "--out", str(tmp_path)]
    result = CliRunner().invoke(experts.command, options)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*-experts-qlora.jsonl")
    for row in map(json.loads, path.read_text().splitlines()):
        peak = {name: each["peak"] for name, each in row["bytes"].items()}
        assert row["method"] == "qlora" and peak["fastpeft"] < peak["peft"]
    assert "; QLoRA of rank 16 on both stacks" in result.output
    assert "base and fastpeft hold the weights in NF4." in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("method", experts.DORA_METHODS)
def test_dora_against_the_frozen_experts(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(experts.SHAPES, "small", experts.Shape(experts=4, chosen=2, hidden=64, intermediate=64))
    options = ["--method", method, "--rounds", "2", "--tokens", "5", "--dtype", "fp32", "--out", str(tmp_path)]
    result = CliRunner().invoke(experts.command, options)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob(f"*-experts-{method}.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["phase"] for row in found] == list(experts.PHASES)
    for row in found:
        assert set(row["seconds"]) == set(row["bytes"]) == {"base", "fastpeft"}
        assert row["over_base"]["q1"] <= row["over_base"]["q3"] and "over_peft" not in row
    assert f"; {METHODS[method]} of rank 16 on both stacks" in result.output
    assert "| base | fastpeft | / base | kept | peak |" in path.with_suffix(".md").read_text()
