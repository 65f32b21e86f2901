"""What the documentation says is so: its snippets run, its numbers are the recorded ones, what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fastpeft.bench import gains, readme
from fastpeft.bench import page as machine_page
from peft_experts import fused_experts, moe_base
from test_bench_pages import fits_a_page
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("bench", "csrc", "docs", "examples", "fastpeft", "kernels", "tests")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")
FILE = re.compile(r"`([\w./*-]+\.(?:py|md|cpp|h|inl|toml|txt|yaml))(?:::(\w+))?`")


def named_files(pattern: str) -> list[Path]:
    """Files of the repository that a name (its last parts, perhaps with ``*``) stands for."""
    files = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    return [path for path in files if path.is_file() and path.match(pattern)]


def tiny_model() -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))


def test_readmes_numbers_are_the_recorded_ones() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.drawn_anew(text, ROOT) == text, "`make tables` draws them anew"


def test_what_you_gain_is_what_is_recorded() -> None:
    drawn = gains.text(readme.recorded(ROOT))
    assert (ROOT / gains.PAGE).read_text(encoding="utf-8") == drawn, "`make tables` draws it anew"


def test_the_pages_of_the_machines_hold_the_recorded_numbers() -> None:
    for path, rows in readme.recorded(ROOT).items():
        written = (ROOT / path).with_suffix(".md").read_text(encoding="utf-8")
        assert machine_page.text(rows, path) == written, f"`make tables` draws {path.stem}.md anew"


def test_a_stranger_sees_what_it_is_and_gains_on_readmes_first_screen() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 150
    assert "```python" in lines[:40]
    table = [line for line in readme.block(ROOT).splitlines() if line.startswith("|")]
    assert table[0] in lines[:40]
    assert 1 <= len(table) - 2 <= 8  # the names of the columns and the rule under them are no rows
    pictures = re.findall(r"!\[[^]]*\]\((.+?)\)", text)
    assert pictures == [readme.PICTURE.as_posix()]
    assert fits_a_page(ROOT / readme.PICTURE)


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def adapters() -> peft.LoraConfig:
    return peft.LoraConfig(target_modules="all-linear")


def test_readmes_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = snippets(ROOT / "README.md")
    exec(compile(snippet, "README.md", "exec"), {"peft": peft, "base_model": tiny_model(), "config": adapters()})
    assert re.fullmatch(r"fused: [1-9]\d*, left to PEFT: 0\n", capsys.readouterr().out)


def test_the_snippets_of_usage_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, with the names that a reader brings along."""
    monkeypatch.chdir(tmp_path)
    tokens = torch.randint(32, (8,)).tolist()
    names: dict[str, Any] = {
        "peft_model": peft.get_peft_model(tiny_model(), adapters()),
        "base_model": tiny_model(),
        "another_base_model": tiny_model(),
        "mixture_of_experts": moe_base(),
        "another_mixture": moe_base(),
        "dataset": [{"input_ids": tokens, "labels": tokens}] * 2,
    }
    for snippet in snippets(ROOT / "docs/usage.md"):
        exec(compile(snippet, "usage.md", "exec"), names)
    for report in (names["report"], names["experts_report"]):
        assert report.fused and not report.left_to_peft
    packed = names["packed_mixture"]
    assert "left to PEFT" not in repr(packed) and len(fused_experts(packed)) == 2
    assert (tmp_path / "runs/lora/adapter/adapter_model.safetensors").is_file()


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@every_page
def test_files_and_what_they_hold_are_named_right(page: Path) -> None:
    """``file.py`` stands for a file, ``file.py::name`` for one with this name in it."""
    for pattern, name in FILE.findall(page.read_text(encoding="utf-8")):
        files = named_files(pattern)
        assert files, f"{pattern} does not exist"
        if name:
            found = [path for path in files if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))]
            assert found, f"{name} is not in {pattern}"


def test_numbers_stand_between_the_marks_alone() -> None:
    begin, end = "<!-- own -->", "<!-- /own -->"
    assert readme.rewritten(f"a\n{begin}\nold\n{end}\nb", "own", "new") == f"a\n{begin}\nnew\n{end}\nb"
    for text in ("", begin, end, end + begin, f"{begin}{end}{end}"):
        with pytest.raises(ValueError, match="README"):
            readme.rewritten(text, "own", "new")


def test_without_rows_the_block_says_so(tmp_path: Path) -> None:
    assert readme.block(tmp_path) == readme.NO_ROWS
