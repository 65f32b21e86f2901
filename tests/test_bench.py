"""The harness measures what it says: rounds, ratios, kept bytes, parity before speed. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fastpeft.bench import bounds, cli, contestants, parity, per_call, play, plot, rows, table
from fastpeft.bench.cases import LayerCase, ModelCase
from fastpeft.bench.contestants import BASE, CONTESTANTS, FASTPEFT, PEFT, PEFT_AUTOCAST, PEFT_COMPILED
from fastpeft.bench.measure import Run, measure
from fastpeft.bench.rows import Row
from rich.console import Console
from torch import nn

from fastpeft import extension
from fastpeft.experiments import provenance, timing
from fastpeft.experiments.models import METHODS
from fastpeft.peft.layers import FusedLinear

EAGER = tuple(contestant for contestant in CONTESTANTS if not contestant.compiled)
TINY = LayerCase(M=6, K=32, N=48, dtype="fp32", rank=4)
TINY_MODEL = ModelCase(dtype="bf16", rank=4, dropout=0.05, tokens=8, layers=1, hidden=32, intermediate=48, heads=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Shapes this small gain nothing from a second one and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured(case: Any, contestants: Any = EAGER, rounds: int = 2) -> list[Row]:
    return list(measure(case, contestants, rounds, run=Run.begin()))


def row(contestant: str = "fastpeft", **changes: Any) -> Row:
    """A row as a quiet machine would yield it."""
    flat = {"min": 1.0, "q1": 1.0, "median": 1.0, "q3": 1.0}
    case = LayerCase(512, 2048, 2048, "bf16")
    values: dict[str, Any] = {
        "run": "2026-01-01T00:00:00+00:00",
        "date": "2026-01-01T00:00:01+00:00",
        "machine": {"name": "cpu-2-cores", "cpu": "CPU", "cores": 2, "memory_gib": 8.0, "features": [], "system": "x"},
        "versions": {"python": "3.11", "torch": "2.13"},
        "commit": "0123456789",
        "dirty": False,
        "threads": 2,
        "case": {"kind": "layer", "shape": case.shape, **vars(case)},
        "phase": "step",
        "contestant": contestant,
        "backend": "cpu, amx",
        "rounds": 15,
        "seconds": flat,
        "cpu_seconds": flat,
        "against": {"base": flat, "peft": flat},
        "kept_bytes": 512 * 2048 * 2 + 512 * 16 * 4,
        "parity": {"passed": True, "failed": [], "errors": {}},
        "refused": None,
    }
    return Row(**values | changes)


def test_ratios_are_taken_round_by_round() -> None:
    base, slow = [1.0, 10.0, 2.0, 4.0, 5.0], [2.0, 30.0, 3.0, 4.0, 20.0]
    assert timing.ratios(slow, base) == [2.0, 3.0, 1.5, 1.0, 4.0]
    assert timing.summary(timing.ratios(slow, base)) == {"min": 1.0, "q1": 1.5, "median": 2.0, "q3": 3.0}


def test_contestants_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []

    def run(name: str) -> None:
        calls.append(name)
        time.sleep(1.2 * timing.SHORTEST_SAMPLE)  # so that a sample is a single call

    waits: list[int] = []
    samples = timing.interleave(
        {name: lambda name=name: run(name) for name in "ABC"}, rounds=4, synchronize=lambda: waits.append(len(calls))
    )
    assert "".join(calls) == "A" * timing.WARM_UP + "B" * timing.WARM_UP + "C" * timing.WARM_UP + "ABC" * 4
    assert all(len(s.wall) == len(s.cpu) == 4 and min(s.wall) >= timing.SHORTEST_SAMPLE for s in samples.values())
    assert waits == [count for call in range(len(calls)) for count in (call, call + 1)]  # before and after each call


def test_a_fast_call_is_repeated_within_its_sample_and_counted_once() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        time.sleep(timing.SHORTEST_SAMPLE / 10)

    samples = timing.interleave({"A": run}, rounds=2)
    per_sample, rest = divmod(calls - timing.WARM_UP, 2)
    assert rest == 0
    assert 1 < per_sample <= 10
    assert all(wall >= timing.SHORTEST_SAMPLE / 10 for wall in samples["A"].wall)


def test_slow_calls_are_warm_after_fewer_and_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONGEST_WARM_UP", 0.0)
    monkeypatch.setattr(timing, "LONGEST_ROUNDS", 0.0)
    found = measured(TINY, rounds=4)
    assert {r.rounds for r in found} == {2}
    calls: list[str] = []
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)
    timing.interleave({name: lambda name=name: calls.append(name) for name in "AB"}, rounds=9)
    assert "".join(calls) == "AB" + "ABAB"


def test_processes_that_take_part_agree_on_how_often_all_is_called() -> None:
    said: list[float] = []

    def agree(seconds: float) -> float:
        said.append(seconds)
        return timing.SHORTEST_SAMPLE / 3  # the slowest process's call

    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    timing.interleave({"A": run}, rounds=4, agree=agree)
    assert calls == timing.WARM_UP + 4 * 3
    assert all(0.0 <= seconds < 1.0 for seconds in said)


def test_a_case_yields_a_complete_row_for_each_contestant_and_phase() -> None:
    found = measured(replace(TINY, M=1, dtype="bf16"))
    expected = [(phase, c.name) for phase in ("forward", "step", "generate") for c in EAGER]
    assert [(r.phase, r.contestant) for r in found] == expected
    for r in found:
        assert Row.from_json(r.to_json()) == r
        assert set(json.loads(r.to_json())) == {field.name for field in fields(Row)}
        assert r.machine.keys() == {"name", "played", "cpu", "cores", "memory_gib", "features", "system"}
        assert r.versions.keys() == {"python", "torch", "triton", "peft", "transformers", "fastpeft"}
        assert r.threads == torch.get_num_threads()
        assert r.case["shape"] == "1×32×48"
        assert r.rounds == 2
        assert r.parity["passed"], r.parity
        assert r.refused is None
        assert (r.backend is not None) == (r.contestant == "fastpeft")
        assert (r.kept_bytes is None) == (r.phase == "generate")
        assert r.seconds is not None and r.cpu_seconds is not None and r.against is not None
        assert r.seconds.keys() == r.against["peft"].keys() == {"min", "q1", "median", "q3"}
    assert all(r.against is not None and r.against["base"]["q3"] == 1.0 for r in found if r.contestant == "base")


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_kept_bytes_of_a_layer(dropout: float) -> None:
    case = replace(TINY, dropout=dropout)
    x, u = case.M * case.K * 4, case.M * case.rank * 4
    kept = {r.contestant: r.kept_bytes for r in measured(case) if r.phase == "step"}
    seed, mask = (8, case.M * case.K) if dropout else (0, 0)
    assert kept["base"] == 0
    assert kept["fastpeft"] == x + u + seed
    # PEFT: the input of A (dropped, in a copy of its own) and that of B; torch keeps the mask in bytes or in floats
    assert kept["peft"] in ([x + u + mask, x + u + 4 * mask] if dropout else [x + u])


def test_parity_holds_under_dropout_for_a_model() -> None:
    found = measured(TINY_MODEL)
    assert {r.phase for r in found} == {"step"}
    assert found[0].parity["passed"], found[0].parity
    assert set(found[0].parity["errors"]) == {"y", "dA", "dB"}


def test_a_contestant_without_a_place_says_why() -> None:
    refused = {r.contestant: r for r in measured(TINY) if r.refused is not None}
    assert set(refused) == {PEFT_AUTOCAST.name}
    absent = refused[PEFT_AUTOCAST.name]
    assert absent.refused is not None and "fp32" in absent.refused
    assert absent.seconds is absent.against is absent.kept_bytes is None


def test_a_failed_compile_is_recorded() -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        found = measured(replace(TINY, M=5), (BASE, PEFT, PEFT_COMPILED, FASTPEFT))
    compiled = [r for r in found if r.contestant == PEFT_COMPILED.name]
    assert len(compiled) == 2
    assert all(r.refused is not None and r.refused.startswith("torch.compile failed") for r in compiled)
    assert all(r.seconds is not None for r in found if r.contestant != PEFT_COMPILED.name)
    assert any("torch.compile failed" in note for note in table.notes(found))


def test_no_speed_up_is_shown_while_parity_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = FusedLinear.forward
    monkeypatch.setattr(FusedLinear, "forward", lambda self, x: right(self, x) * 1.01)
    found = measured(replace(TINY, rank=16))  # the bounds are stated for this rank
    ours = [r for r in found if r.contestant == "fastpeft"]
    assert not ours[0].parity["passed"]
    assert ours[0].parity["failed"] == ["y", "dx", "dA", "dB"]
    assert all(r.against is None for r in ours)
    assert all(r.against is not None for r in found if r.contestant == "peft")

    (section,) = table.sections(found)
    assert [line[-1] for line in section.lines[:2]] == ["parity fails"] * 2
    assert any("parity" in note and "dA" in note for note in table.notes(found))
    verdicts = {f.verdict for f in bounds.check(found) if f.bound.text == "never slower than PEFT"}
    assert verdicts == {"miss: parity fails"}
    assert plot.pictures(ours, tmp_path / "rows.jsonl") == {}


def test_fastpeft_is_not_timed_on_layers_that_it_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    with_peft = contestants.with_peft

    def hooked(base: nn.Module, case: Any) -> nn.Module:
        model = with_peft(base, case)
        (A,) = (module for name, module in model.named_modules() if "lora_A." in name)
        A.register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(contestants, "with_peft", hooked)
    with pytest.raises(RuntimeError, match="did not fuse every layer of 6×32×48"):
        FASTPEFT.setup(TINY)


@pytest.mark.parametrize(("error", "passed"), [(2.0, True), (2.2, False), (float("nan"), False)])
def test_parity_allows_twice_the_eager_error_and_the_rounding(error: float, passed: bool) -> None:
    want = torch.zeros(3, 4, dtype=torch.float64)
    eager = {"y": torch.full((3, 4), 1.0)}
    verdict = parity.judge({"y": want}, eager, {"y": torch.full((3, 4), error)})
    assert verdict["passed"] is passed
    assert verdict["failed"] == ([] if passed else ["y"])
    rounded = parity.judge({"y": want + 1}, {"y": torch.ones(3, 4)}, {"y": torch.ones(3, 4, dtype=torch.bfloat16)})
    assert rounded["errors"]["y"]["allowed"] == 2**-8


def test_rows_append_and_load(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    first, second = row("base"), row("peft")
    rows.append(path, [first])
    rows.append(path, [second])
    assert rows.load(path) == [first, second]
    with path.open("a") as file:
        file.write('{"run": "x", "colour": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: .*missing: .*'against'.*unknown: \['colour'\]"):
        rows.load(path)


def test_latest_keeps_the_newest_measurement_of_each_thing() -> None:
    old, new, other_threads = row(commit="old"), row(commit="new"), row(threads=1)
    assert rows.latest([old, row("peft"), new]) == [new, row("peft")]
    assert rows.latest([other_threads, new]) == [new]
    assert rows.latest([]) == []


# On processors with AVX-512 bitsandbytes 0.50 decodes rows wrongly that are no whole blocks of 64.
WHOLE = replace(TINY, K=64)
WHOLE_MODEL = replace(TINY_MODEL, hidden=64, intermediate=128)


@pytest.mark.parametrize("case", [WHOLE, replace(WHOLE, dtype="bf16", dropout=0.05), WHOLE_MODEL], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_what_peft_computes(method: str, case: Any) -> None:
    verdict = parity.check(replace(case, method=method))
    assert verdict["passed"], verdict
    assert ("dm" in verdict["errors"]) == (method in ("dora", "qdora"))


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("Intel(R) Xeon(R) Platinum 8488C", "intel-xeon-platinum-8488c"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "intel-core-i7-8700"),
        ("AMD EPYC 9R14 96-Core Processor", "amd-epyc-9r14-96-core"),
    ],
)
def test_machine_names_fit_a_file(cpu: str, name: str) -> None:
    assert provenance.slug(cpu) == name


def test_table_shows_every_row_in_the_terminal_and_in_markdown() -> None:
    quarter = {"min": 0.9, "q1": 1.25, "median": 1.5, "q3": 12.0}
    found = [row("base"), row("peft", against={"base": quarter, "peft": quarter}), row()]
    text = table.markdown(found, {"lora": "lora.png"})
    assert text.index("(lora.png)") < text.index("## LoRA")
    assert "## LoRA, bf16, dropout 0, rank 16" in text
    assert "| 512×2048×2048 | step | 1.00 s | 1.50 [1.25, 12.0] | – | – | 1.00 [1.00, 1.00] |" in text
    assert "| kept, MiB | 2.03 | 2.03 | – | – | 2.03 |" in text
    assert "newest commit 01234567; 2026-01-01" in text
    console = Console(width=120)
    with console.capture() as capture:
        table.show(found, console)
    shown = capture.get()
    assert "1.50 [1.25, 12.0]" in shown
    assert "median [quartiles]" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_bounds_pass_miss_or_were_not_measured() -> None:
    slow = {"min": 1.1, "q1": 1.1, "median": 1.13, "q3": 1.2}
    findings = bounds.check([row("peft"), row(against={"base": slow, "peft": slow})])
    measured = {f.bound.text: (f.verdict, f.measured) for f in findings if f.verdict != "not measured"}
    assert measured == {
        "LoRA layer: step over the base": ("miss", 1.13),
        "LoRA kept: x, u and the seed alone": ("pass", 1.0),
        "never slower than PEFT": ("miss", 1.13),
    }
    assert [f.missed for f in findings] == [f.verdict == "miss" for f in findings]
    stated = {bound for bound in bounds.BOUNDS if bound.device == "cpu" and "amx" in (bound.isas or ["amx"])}
    assert {f.bound for f in findings} == stated < set(bounds.BOUNDS)

    dropped = row().case | {"dropout": 0.05}
    pair = [row("peft", case=dropped, kept_bytes=10), row(case=dropped, kept_bytes=7)]
    share = [f for f in bounds.check(pair) if f.bound.text == "LoRA kept: share of PEFT's"]
    assert [(f.verdict, f.measured) for f in share] == [("miss", 0.7)]


def test_bounds_are_stated_for_instruction_sets() -> None:
    def judged(backend: str, dtype: str, **against: float) -> set[str]:
        ratios = {rival: {"min": r, "q1": r, "median": r, "q3": r} for rival, r in against.items()}
        found = bounds.check([row(backend=backend, case=row().case | {"dtype": dtype}, against=ratios)])
        return {f.bound.text for f in found if f.missed and f.bound.measure is not bounds.kept_over_needed}

    step = "LoRA layer: step over the base"
    assert judged("cpu, avx2", "fp32", base=1.05, peft=0.9) == {step}
    assert judged("cpu, amx", "fp32", base=1.05, peft=0.9) == set()
    assert judged("cpu, avx2", "bf16", base=0.02, peft=0.02, **{"base-float32": 1.2}) == {
        "LoRA layer: step over float32's base"
    }
    for with_bf16 in ("cpu, amx", "cpu, avx512_bf16", "native, amx", "native, avx512"):
        assert judged(with_bf16, "bf16", base=1.2, peft=0.9) == {step}
    assert judged("cpu, avx512", "bf16", base=1.2, peft=0.9) == set()  # another set than the one of native rows
    assert judged("cpu, avx512", "fp32", base=1.0, peft=1.01) == {"never slower than PEFT"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["cpu, amx", "cpu, avx512_bf16", "cpu, avx512", "cpu, avx2", "cpu, plain"])
def test_one_bound_holds_every_row_of_a_cpu_to_peft(backend: str, method: str) -> None:
    slower = {name: {"min": r, "q1": r, "median": r, "q3": r} for name, r in (("base", 0.01), ("peft", 1.001))}
    cases = [
        LayerCase(M, K, K, dtype, dropout=p, method=method)
        for M, K in ((1, 2048), (3, 100), (2048, 2048))
        for dtype in ("bf16", "fp16", "fp32")
        for p in (0.0, 0.05)
    ]
    described = [{"kind": "layer", "shape": case.shape, **vars(case)} for case in cases]
    found = [
        row(backend=backend, case=case, phase=phase, against=slower)
        for case in described
        for phase in ("forward", "step", "generate")
    ]
    missed = [f.where for f in bounds.check(found) if f.missed and f.bound.text == "never slower than PEFT"]
    assert len(missed) == len(set(missed)) == len(found)


def test_a_machine_is_named_by_its_instruction_set() -> None:
    C = extension.built()
    fastest, least = C.isas()[0], C.isas()[-1]
    assert provenance.machine()["played"] is None
    assert f"-{provenance.slug(fastest)}-" in provenance.machine()["name"]
    C.set_isa(least)
    try:
        assert provenance.machine()["played"] == least
        assert f"-playing-{provenance.slug(least)}-" in provenance.machine()["name"]
    finally:
        C.set_isa("auto")


def test_without_the_extension_a_machine_is_named_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "C", None)
    assert "-reference-" in provenance.machine()["name"]
    assert provenance.machine()["played"] is None


def test_a_processor_plays_lesser_ones(tmp_path: Path) -> None:
    options = "--shape 6x32x48 --dtype bf16 --method lora --dropout 0 --rounds 2 --no-compile"
    for isa in {"avx2", "avx512"} & set(extension.built().isas()[1:]):  # those without products of bfloat16
        command = f"{sys.executable} -m fastpeft bench --isa {isa} {options} --out {tmp_path / isa}".split()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / isa).glob("*.jsonl")
        found = rows.load(path)
        assert {(r.machine["name"], r.machine["played"]) for r in found} == {(path.stem, isa)}
        assert f"-playing-{provenance.slug(isa)}-" in path.stem
        ours = [r for r in found if r.contestant == "fastpeft"]
        assert {r.backend for r in ours} == {f"cpu, {isa}"}
        assert all(r.against is not None and r.against.keys() == {"base", "peft", "base-float32"} for r in ours)
        assert "base, float32" in path.with_suffix(".md").read_text()


def test_a_part_that_cannot_be_played_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        for name, value in play.LIMITS["avx512"].items():
            patched.setenv(name, value)
        patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        patched.setattr(extension.built(), "isas", lambda: ["avx512", "plain"])
        with pytest.raises(play.CannotPlay, match="torch runs its DEFAULT kernels in spite of ATEN_CPU_CAPABILITY"):
            play.play("avx512", [], "fastpeft")
    with monkeypatch.context() as patched:
        patched.setattr(extension.built(), "isas", lambda: ["plain"])
        with pytest.raises(play.CannotPlay, match="this processor has plain, not avx512"):
            play.play("avx512", [], "fastpeft")
    monkeypatch.setattr(extension, "C", None)
    done = CliRunner().invoke(cli.command, ["--isa", "avx2"])
    assert done.exit_code == 2
    assert "the C++ extension is not built" in " ".join(done.output.split())


def test_a_gpus_rows_have_bounds_of_their_own() -> None:
    def against(ratio: float) -> dict[str, dict[str, float]]:
        return {rival: {"min": ratio, "q1": ratio, "median": ratio, "q3": ratio} for rival in ("base", "peft")}

    case = row().case | {"device": "cuda", "M": 4096, "K": 4096, "N": 4096, "shape": "4096×4096×4096"}
    findings = bounds.check(
        [row("peft-autocast", case=case, against=against(1.4)), row(case=case, against=against(1.05))]
    )
    assert {f.bound for f in findings} == {bound for bound in bounds.BOUNDS if bound.device == "cuda"}
    verdicts = {f.bound.text: (f.verdict, f.measured) for f in findings if f.measured is not None}
    assert verdicts == {
        "LoRA step over the base": ("pass", 1.05),
        "not slower than PEFT": ("miss", 1.05),
        "not slower than PEFT under autocast": ("pass", 1.05 / 1.4),
    }


def test_command_measures_records_and_redraws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "--method",
        "dora",
        "--shape",
        "6x32x48",
        "--dtype",
        "fp32",
        "--dropout",
        "0",
        "--rounds",
        "2",
        "--no-compile",
    ]
    done = CliRunner().invoke(cli.command, [*options, "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (recorded,) = tmp_path.glob("*.jsonl")
    assert len(rows.load(recorded)) == 2 * len(EAGER)
    drawn = recorded.with_suffix(".md"), recorded.with_name(f"{recorded.stem}-dora.png")
    for path in drawn:
        path.unlink()

    for limit, exit_code in ((float("inf"), 0), (0.0, 1)):
        monkeypatch.setattr(bounds, "BOUNDS", (bounds.Bound("kept", limit, bounds.kept_over_peft, phase="step"),))
        redrawn = CliRunner().invoke(cli.command, ["--plot-only", "--check", "--out", str(tmp_path)])
        assert redrawn.exit_code == exit_code, redrawn.output
    assert all(path.exists() for path in drawn)
    assert len(rows.load(recorded)) == 2 * len(EAGER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "512x2048"], "expected three positive integers such as 512x2048x2048, got '512x2048'"),
        (["--dropout", "1"], "'--dropout'"),
        (["--dropout", "nan"], "nan is no number: it must be at least 0 and below 1"),
        (["--rank", "0"], "'--rank'"),
        (["--plot-only"], "needs recorded rows, and there are none in"),
    ],
)
def test_command_refuses(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.command, [*options, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_command_chooses_cases() -> None:
    shapes, methods = [(1, 2, 3), (4, 5, 6)], ["lora", "dora"]
    all_of_them = cli.choose_cases(shapes, ["bf16", "fp32"], 8, [0.0, 0.1], methods, layer=True, model=True)
    assert len(all_of_them) == 2 * 2 * 2 * 2 + 2 * 2 * 2
    assert {case.rank for case in all_of_them} == {8}
    assert cli.choose_cases([(1, 2, 3)], ["fp16"], 8, [0.1], ["dora"], layer=True, model=False) == [
        LayerCase(1, 2, 3, "fp16", 8, 0.1, "dora")
    ]


def test_what_a_call_costs_is_recorded_for_each_method_and_phase(tmp_path: Path) -> None:
    options = ["--rounds", "2", "--method", "lora", "--out", str(tmp_path)]
    result = CliRunner().invoke(per_call.command, options)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*-per-call.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["phase"] for row in found] == list(per_call.PHASES)
    for row in found:
        assert set(row["seconds"]) == {"base", "peft", "fastpeft"}
        assert row["over_peft"]["q1"] <= row["over_peft"]["median"] <= row["over_peft"]["q3"]
    table_text = path.with_suffix(".md").read_text()
    assert table_text.count("| LoRA | ") == 3 and table_text in result.output
