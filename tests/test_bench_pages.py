"""What a reader is shown of the recorded rows: README's few cases, the range of all, pictures as wide as a page."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.bench import gains, plot, readme, rows, summary, table
from fastpeft.bench.cases import LayerCase, ModelCase
from fastpeft.bench.rows import Row
from test_bench import row

from fastpeft.experiments.models import METHODS

PAGE = (1000, 1200)  # pixels: what a picture may take of a page, in width and in height


def of(
    case: LayerCase | ModelCase, base: float, peft: float = 1.0, contestant: str = "fastpeft", **changes: Any
) -> Row:
    """A row of ``case`` with these ratios to the frozen base and to PEFT."""
    against = {name: {"min": x, "q1": x, "median": x, "q3": x} for name, x in (("base", base), ("peft", peft))}
    described = {"kind": case.kind, "shape": case.shape, **vars(case)}
    return row(contestant, case=described, **{"against": against} | changes)


def size(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG, out of its header."""
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:])
    return width, height


def fits_a_page(picture: Path) -> bool:
    return all(pixels <= most for pixels, most in zip(size(picture), PAGE, strict=True))


SHOWN = LayerCase(512, 4096, 4096, "bf16")
SLOW = LayerCase(1, 64, 64, "bf16")
GPU = {"name": "gpu", "gpu": "Some GPU"}


def test_readmes_block_compares_the_newest_rows_of_each_machine(tmp_path: Path) -> None:
    results = tmp_path / readme.RESULTS
    rows.append(
        results / "cpu-2-cores.jsonl",
        [
            of(SHOWN, 9.0, 3.0, commit="old"),
            of(SHOWN, 2.0, contestant="peft", kept_bytes=4000),
            of(SHOWN, 1.5, contestant="peft-autocast"),
            of(SHOWN, 0.1, contestant="base-float32"),  # another dtype's: no part of what PEFT can do
            of(SHOWN, 1.25, 0.625, kept_bytes=1000, date="2026-01-02"),
            of(SLOW, 1.0, contestant="peft", kept_bytes=4000),
            of(SLOW, 1.5, 1.5, kept_bytes=3000),
            of(SHOWN, 1.0, against=None, phase="forward"),
        ],
    )
    dropped = LayerCase(4096, 4096, 4096, "bf16", dropout=0.05, device="cuda")
    rows.append(
        results / "gpu.jsonl", [of(dropped, 3.0, contestant="peft", machine=GPU), of(dropped, 0.9, 0.3, machine=GPU)]
    )
    (results / "cpu-2-cores-kernels.jsonl").write_text('{"another": "kind of row"}\n', encoding="utf-8")

    text = readme.block(tmp_path)
    assert "| training step | CPU, 2 cores<br>512×4096×4096 | Some GPU<br>4096×4096×4096 |" in text
    assert "| LoRA | **1.6× faster**<br>1.25, PEFT 2.00 | – |" in text
    assert "| LoRA, dropout | – | **3.3× faster**<br>0.90, PEFT 3.00 |" in text
    assert (
        "training step (3): 0.67× to 3.3× (median 1.6×) PEFT's speed; 0.67× to 3.3× (median 1.2×) that of PEFT at its "
        "fastest; 0.90× to 1.5× (median 1.2×) the frozen base's time"
    ) in text
    assert "forward pass alone (1): no ratio" in text
    assert "at its fastest: 1, LoRA 1×64×64 bf16, dropout 0, step, CPU, 2 cores (0.67×); wrong, and so" in text
    assert "25.00% to 100% of what PEFT keeps (median 75%)" in text
    assert "CPU, 2 cores, 2 threads; python 3.11, torch 2.13; backend cpu, amx; newest commit 01234567" in text
    assert "(bench/results/cpu-2-cores.md)" in text and "(bench/results/gpu.jsonl)" in text
    assert "another" not in text and "old" not in text


def test_a_slower_and_a_wrong_case_are_named_so(tmp_path: Path) -> None:
    found = [of(SHOWN, 1.0, contestant="peft"), of(SHOWN, 1.25, 1.25)]
    rows.append(tmp_path / readme.RESULTS / "cpu.jsonl", found)
    assert "| LoRA | **1.2× slower**<br>1.25, PEFT 1.00 |" in readme.block(tmp_path)
    rows.append(tmp_path / readme.RESULTS / "cpu.jsonl", [of(SHOWN, 1.0, against=None)])
    assert "| LoRA | parity fails |" in readme.block(tmp_path)


def test_an_origin_names_the_newest_commit_alone() -> None:
    found = [row(date=f"2026-01-0{day}T00:00:00", commit=f"{day}" * 10, dirty=day == 3) for day in (1, 3, 2)]
    assert table.origin(found).endswith("newest commit 33333333 with changes; 2026-01-01 to 2026-01-03")


def every_case() -> Sequence[Row]:
    """More than any machine has recorded."""
    sizes = [LayerCase(M, K, K, "bf16") for M in (1, 64, 512, 2048, 4096) for K in (1024, 2048, 4096)]
    return [
        of(LayerCase(case.M, case.K, case.N, dtype, dropout=dropout, method=method), 1.5, 0.7, contestant, phase=phase)
        for method in METHODS
        for dtype in ("bf16", "fp32")
        for dropout in (0.0, 0.05)
        for case in sizes
        for phase in ("forward", "step")
        for contestant in ("peft", "fastpeft")
    ]


def test_pictures_are_drawn_from_rows_alone_and_fit_a_page(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "machine.jsonl"
    plot.draw(every_case(), path)
    drawn = plot.pictures(every_case(), path)
    assert drawn == {method: path.with_name(f"machine-{method}.png") for method in METHODS}
    assert all(fits_a_page(picture) for picture in drawn.values())

    one = [row("base"), row("peft"), row(), row(phase="forward"), row(against=None, phase="generate")]
    plot.draw(one, path)
    assert size(drawn["lora"])[1] < size(drawn["dora"])[1]


def test_readmes_picture_fits_a_page(tmp_path: Path) -> None:
    cases = [*(LayerCase(512, 4096, 4096, "bf16", method=method) for method in METHODS), ModelCase("bf16")]
    found = [of(case, ratio, ratio, name) for case in cases for name, ratio in (("peft", 20.0), ("fastpeft", 0.9))]
    assert set(summary.chosen(found)) == {"LoRA", "DoRA", "QLoRA", "LoRA, a small Llama"}
    plot.draw_summary([found, found, found], tmp_path / "summary.png")
    assert fits_a_page(tmp_path / "summary.png")


def test_gains_are_ranges_over_all_sizes_of_an_adapter(tmp_path: Path) -> None:
    larger = LayerCase(512, 1024, 1024, "bf16")
    found = [
        of(SHOWN, 2.0, contestant="peft", kept_bytes=4000),
        of(SHOWN, 1.0, 0.5, kept_bytes=1000),
        of(larger, 3.0, contestant="peft", kept_bytes=4000),
        of(larger, 2.5, 2.5 / 3, kept_bytes=2000),
        of(larger, 1.0, against=None, phase="forward"),
    ]
    text = gains.text({Path("bench/results/cpu.jsonl"): found})
    assert "## CPU, 2 cores\n\n[All cases](../bench/results/cpu.md)" in text
    line = "| LoRA, bfloat16 | 1.20 – **1.60** – 2.0× | 1.00 – **1.75** – 2.5 | – | – | 25 – **38** – 50 % | 2 |"
    assert line in text
