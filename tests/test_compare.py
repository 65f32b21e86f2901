"""fastpeft compare: what there is to do, what is on record, and one job after the other on a tiny BERT."""

from __future__ import annotations

import gc
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import compare_rows
import pytest
import torch
from test_demo import LENGTH, WORDS
from transformers import BertConfig, BertForSequenceClassification, MPNetConfig, MPNetForSequenceClassification

from fastpeft.experiments.compare import jobs as plans
from fastpeft.experiments.compare import methods, runs
from fastpeft.experiments.compare.jobs import Job, Training
from fastpeft.experiments.compare.laboratory import Laboratory
from fastpeft.experiments.compare.rows import FIELDS, Rows, key_of
from fastpeft.experiments.encoding import Encoded, Examples
from fastpeft.experiments.four_bit import four_bit_bytes
from fastpeft.experiments.tasks import Task
from fastpeft.experiments.training import accelerator_on_cpu

LAYERS, WIDTH, WIDE = 2, 64, 128  # bitsandbytes evaluates no smaller layers on some processors
TRAINING = Training(steps=4, evaluations=2, batch_size=4, length=LENGTH, dtype="float32")


def examples(count: int, seed: int) -> Encoded:
    """Sentences of random words; the class says whether the first one is of the first half."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 5 + len(WORDS), (count, LENGTH), generator=generator)
    return Encoded(ids, torch.ones_like(ids), (ids[:, 0] < 5 + len(WORDS) // 2).long())


def tiny(seed: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=WIDE,
        max_position_embeddings=LENGTH + 32,  # a prompt stands before the text
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    return BertForSequenceClassification(config)


@pytest.fixture
def laboratory() -> Laboratory:
    empty = Examples([])
    task = Task("own", "own", "classification", ("accuracy", "f1"), ("late", "early"), empty, empty, empty)
    data = {"train": examples(40, 0), "valid": examples(20, 1), "test": examples(24, 2)}
    parameters = sum(p.numel() for p in tiny(0).parameters())
    return Laboratory(task, data, tiny, parameters, accelerator_on_cpu(), lambda run: None)


def job(name: str, **changes: Any) -> Job:
    method = methods.METHODS[name]
    return replace(Job(name, method, method.learning_rate, 0, TRAINING), **changes)


def quiet(run: Any) -> None:
    """Nobody watches the steps."""


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_trains_and_says_what_it_cost(laboratory: Laboratory, name: str) -> None:
    found = runs.execute(job(name), laboratory, quiet)
    assert [row["engine"] for row in found] in (["fastpeft", "peft"], ["peft"], ["torch"], ["fastpeft.methods"])
    if "lora" in name or "dora" in name or name == "vera":
        assert found[0]["engine"] == "fastpeft"
    for row in found:
        assert set(row) == set(FIELDS)
        assert math.isfinite(row["loss"]) and 0.0 <= row["score"] <= 1.0
        assert row["latency"]["before"] > 0.0
        if name == "none":
            assert row["trainable"] == 0 and row["seconds"]["step"] is None
            continue
        assert row["trainable"] > 0 and row["memory"]["adapter_file"] > 0
        assert row["memory"]["peak"] > row["memory"]["kept"] >= 0
        assert [point["step"] for point in row["curve"]] == [2, 4]
        assert row["valid_score"] == max(point["valid_score"] for point in row["curve"])
        others = {"full"} if name != "full" else set()
        assert set(row["against"]) == (others | {"peft"} if row["engine"] == "fastpeft" else others)


@pytest.mark.parametrize("name", ["lora", "qlora", "houlsby", "prefix"])
def test_what_is_not_measured_has_the_scores_of_what_is(laboratory: Laboratory, name: str) -> None:
    measured, *plain = runs.execute(job(name), laboratory, quiet)
    (scored,) = runs.execute(job(name, measured=False), laboratory, quiet)
    assert len(plain) == (name in ("lora", "qlora"))
    costs = {"seconds", "samples_per_second", "against", "latency", "memory"}
    assert {key: value for key, value in scored.items() if key not in costs} == {
        key: value for key, value in measured.items() if key not in costs
    }
    assert scored["against"] == {} and scored["samples_per_second"] is None
    for cost in ("seconds", "latency", "memory"):
        assert set(scored[cost]) == set(measured[cost]) and set(scored[cost].values()) == {None}


def test_trained_parameters_are_those_of_the_formulas(laboratory: Laboratory) -> None:
    """Two classes; all of BERT's linear layers, the pooler among them."""
    hidden, wide, layers, head = WIDTH, WIDE, LAYERS, 2 * WIDTH + 2
    pooler = hidden + hidden
    square, up = 2 * hidden, hidden + wide
    lora = layers * (4 * square + 2 * up) + pooler
    norms = layers * 2 * 2 * hidden + 2 * hidden
    expected = {
        "full": sum(p.numel() for p in tiny(0).parameters()),
        "head": head,
        "lora": 16 * lora + head,
        "lora-r8": 8 * lora + head,
        "lora-attention": 16 * layers * 4 * square + head,
        "lora-default": 16 * layers * 2 * square + head,
        "dora": 16 * lora + layers * (4 * hidden + wide + hidden) + hidden + head,
        "ln-tuning": norms + head,
        "houlsby": layers * 2 * (2 * hidden * 32 + 32 + hidden) + head,
        "pfeiffer": layers * (2 * hidden * 64 + 64 + hidden) + head,
        "loreft": layers * (2 * 4 * hidden + 4) + head,
    }
    for name, count in expected.items():
        model = runs.adapt(job(name), laboratory).model
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count, name


def test_the_best_of_the_evaluations_is_what_remains(laboratory: Laboratory) -> None:
    done = job("head", learning_rate=0.5, training=replace(TRAINING, steps=12, evaluations=6))
    run = laboratory.run("torch", runs.adapt(done, laboratory).model, done.learning_rate, done.training)
    curve = runs.train(done, laboratory, [run], quiet)["torch"]
    best = max(point["valid_score"] for point in curve)
    assert len({point["valid_score"] for point in curve}) > 1  # or else there is nothing to choose
    _, found = runs.judge(run, laboratory.task, laboratory.data["valid"])
    assert found["accuracy"] == best


def test_a_run_repeats_itself(laboratory: Laboratory) -> None:
    first, second = (runs.execute(job("lora"), laboratory, quiet) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one["curve"] == other["curve"] and one["score"] == other["score"]


def test_nothing_of_a_run_remains_in_memory(laboratory: Laboratory) -> None:
    seen: dict[str, weakref.ref[torch.nn.Module]] = {}
    runs.execute(job("lora"), laboratory, lambda run: seen.setdefault(run.name, weakref.ref(run.model)))
    gc.collect()
    assert set(seen) == {"fastpeft", "peft"}
    assert [reference() for reference in seen.values()] == [None, None]


def test_a_loss_that_is_no_number_ends_the_run_alone(laboratory: Laboratory) -> None:
    with pytest.raises(runs.Failed, match=r"the loss of step \d is (nan|inf)"):
        runs.execute(job("full", learning_rate=1e30, training=replace(TRAINING, steps=8)), laboratory, quiet)
    assert runs.execute(job("head"), laboratory, quiet)


@pytest.mark.parametrize(("processes", "raised"), [(1, runs.Failed), (2, torch.OutOfMemoryError)])
def test_out_of_memory_ends_a_run_or_of_several_processes_all(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, processes: int, raised: type[Exception]
) -> None:
    def out_of_memory(run: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(type(laboratory.accelerator), "num_processes", processes)
    with pytest.raises(raised, match="no memory is left"):
        runs.execute(job("head", measured=False), laboratory, out_of_memory)


def test_what_cannot_be_put_on_a_model_fails_with_a_reason(laboratory: Laboratory) -> None:
    silent = replace(laboratory, load=lambda seed: without_biases(tiny(seed)))
    with pytest.raises(runs.Failed, match="bias"):
        runs.execute(job("bitfit"), silent, quiet)


def test_prefix_tuning_of_a_model_without_past_keys_fails_with_a_reason(laboratory: Laboratory) -> None:
    shape = {"hidden_size": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = MPNetConfig(vocab_size=5 + len(WORDS), max_position_embeddings=LENGTH + 32, **shape)
    mpnet = replace(laboratory, load=lambda seed: MPNetForSequenceClassification(config))
    with pytest.raises(runs.Failed, match="does not support past key values"):
        runs.execute(job("prefix"), mpnet, quiet)


def without_biases(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    return model


def test_in_bfloat16_what_is_trained_is_float32(laboratory: Laboratory) -> None:
    training = replace(TRAINING, dtype="bfloat16")
    for name in ("lora", "bitfit", "full", "houlsby", "qlora"):
        model = runs.adapt(job(name, training=training), laboratory).model
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, name
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.dim() > 1}
        assert frozen <= {torch.bfloat16, torch.uint8}, name
    for name in ("bitfit", "qlora", "lora-bitfit"):
        found = runs.execute(job(name, training=training), laboratory, quiet)
        assert (found[0]["engine"] == "fastpeft") == ("lora" in name)


def test_four_bits_of_a_model_take_as_many_bytes_as_bitsandbytes_takes() -> None:
    from fastpeft.experiments.four_bit import DENSE, to_four_bit

    model = tiny(0)
    expected = 0
    quantized = to_four_bit(tiny(0), lambda name: name not in DENSE)
    for parameter in quantized.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            expected += parameter.bfloat16().nbytes
        else:  # a byte a block, and for each 256 of these a number in float32
            expected += parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert four_bit_bytes(model) == expected


def test_jobs_go_seed_by_seed_and_a_grid_varies_one_setting_at_a_time() -> None:
    plain = list(plans.jobs(["none", "lora"], 2, TRAINING, {"lora": 0.5}))
    assert [(each.name, each.seed, each.learning_rate, each.measured) for each in plain] == [
        ("none", 0, 0.0, True),
        ("lora", 0, 0.5, True),
        ("none", 1, 0.0, False),
        ("lora", 1, 0.5, False),
    ]
    grid = list(plans.jobs(["none", "lora"], 2, TRAINING, {}, plans.GRID))
    own = methods.METHODS["lora"]
    around = [each for each in grid if each not in list(plans.jobs(["none", "lora"], 2, TRAINING, {}))]
    for each in around:
        assert not each.measured
        changed = [
            each.learning_rate != own.learning_rate,
            each.training != TRAINING,
            each.method.settings != own.settings,
        ]
        assert sum(changed) == 1
        assert each.seed == 0 and each.name == "lora"
    ranks = {each.method.settings["rank"] for each in around}
    assert ranks == set(methods.RANKS)
    assert len({each.key({}) for each in grid}) == len(grid)
    alone = [each.learning_rate for each in plans.jobs(["lora"], 1, TRAINING, {}, ["learning_rate"])]
    assert alone == [own.learning_rate, own.learning_rate / 3, own.learning_rate * 3]


def test_the_untrained_model_and_full_fine_tuning_come_first() -> None:
    assert plans.first(["lora", "full", "lora", "none"]) == ["none", "full", "lora"]
    assert plans.first(["lora", "dora"]) == ["lora", "dora"]


def test_presets_hold_known_methods() -> None:
    for preset in plans.PRESETS.values():
        assert set(preset.methods) <= set(methods.METHODS)
    assert len(plans.PRESETS["quick"].methods) >= 8 and set(plans.PRESETS["full"].methods) == set(methods.METHODS)


def row(key: str, engine: str, engines: list[str], **more: Any) -> dict[str, Any]:
    return compare_rows.row("lora", engine=engine, key=key, engines=engines, **more)


def recorded(folder: Path) -> Rows:
    rows = Rows(folder)
    rows.add([row("a", "torch", ["torch"], score=0.5)])
    rows.add([row("b", engine, ["fastpeft", "peft"], loss=math.nan) for engine in ("fastpeft", "peft")])
    return rows


def test_rows_are_read_back(tmp_path: Path) -> None:
    recorded(tmp_path)
    again = Rows(tmp_path)
    assert [each["key"] for each in again.rows] == ["a", "b", "b"]
    assert again.has("a") and again.has("b") and not again.has("c")
    assert again.rows[1]["loss"] is None  # JSON has no word for it


@pytest.mark.parametrize("kept", [1, 30, 0.5, 0.999])
def test_what_a_stop_tore_is_cut_off_with_its_run(tmp_path: Path, kept: float) -> None:
    """When rows are added: who only reads changes nothing, since the run may be being written."""
    path = recorded(tmp_path).path
    lines = path.read_bytes().splitlines(keepends=True)
    last = lines[-1]
    torn = b"".join(lines[:-1]) + last[: int(kept) if kept >= 1 else int(kept * len(last))]
    path.write_bytes(torn)
    rows = Rows(tmp_path)
    assert [each["key"] for each in rows.rows] == ["a"]
    assert path.read_bytes() == torn
    rows.add([row("b", engine, ["fastpeft", "peft"]) for engine in ("fastpeft", "peft")])
    assert [each["key"] for each in Rows(tmp_path).rows] == ["a", "b", "b"]
    assert path.read_bytes().startswith(lines[0])


def test_rows_that_stand_there_twice_stay(tmp_path: Path) -> None:
    path = recorded(tmp_path).path
    path.write_bytes(2 * path.read_bytes() + b"\n")
    rows = Rows(tmp_path)
    assert [each["key"] for each in rows.rows] == ["a", "b", "b", "a", "b", "b"]
    rows.add([row("c", "torch", ["torch"])])
    assert len(Rows(tmp_path).rows) == 7


def test_a_last_line_without_its_end_is_a_row(tmp_path: Path) -> None:
    path = recorded(tmp_path).path
    path.write_bytes(path.read_bytes().rstrip())
    Rows(tmp_path).add([row("c", "torch", ["torch"])])
    assert [each["key"] for each in Rows(tmp_path).rows] == ["a", "b", "b", "c"]


def test_what_another_process_adds_stays(tmp_path: Path) -> None:
    path = recorded(tmp_path).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    rows = Rows(tmp_path)
    path.write_bytes(whole)  # the other process ends its line
    rows.add([row("c", "torch", ["torch"])])
    assert [each["key"] for each in Rows(tmp_path).rows] == ["a", "b", "b", "c"]


NO_ROWS = {
    "no json": "it is no JSON",
    "[1]": "it is no object with fields",
    '{"engine": "torch"}': "it lacks key, engines, machine",
    "7": "it is no object",
    "\udcff": "it is no text in UTF-8",
}


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = recorded(tmp_path).path
    content = path.read_text().splitlines()
    text = "\n".join([content[0], line, *content[1:]]) + "\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 2 is no row: {NO_ROWS[line]}"):
        Rows(tmp_path)


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"my": "precious notes"}')
    with pytest.raises(ValueError, match="line 1 is no row: it lacks key"):
        Rows(tmp_path)
    assert path.read_text() == '{"my": "precious notes"}'


def test_a_key_is_that_of_what_was_asked_for() -> None:
    assert key_of({"a": 1, "b": (2, 3)}) == key_of({"b": [2, 3], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_a_row_can_be_written_as_json(laboratory: Laboratory) -> None:
    for found in runs.execute(job("adalora"), laboratory, quiet):
        assert json.loads(json.dumps(found, allow_nan=False)) == found
