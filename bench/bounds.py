"""The speed that fastpeft is meant to have, as bounds on the measured rows, and whether the rows keep them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fastpeft.experiments.models import METHODS

from .cases import DTYPES
from .contestants import BASE, FASTPEFT, PEFT, PEFT_AUTOCAST
from .rows import Row

STATED_FOR = {"cpu": "2 cores", "cuda": "an H100"}
_TOKENS_512, _TOKENS_2048 = ("512×2048×2048", "512×4096×4096"), ("2048×2048×2048",)
_LARGE = (*_TOKENS_512, *_TOKENS_2048)
_GPU_2048, _GPU_4096 = ("2048×4096×4096",), ("4096×4096×4096",)


Others = Callable[[str, str], Row | None]  # the row of another contestant or another method in the same case
Measure = Callable[[Row, Others], float | None]


def times(rival: str) -> Measure:
    """Median ratio of wall seconds to ``rival``'s; None while parity fails or where the rival was not measured."""
    return lambda row, others: (row.against or {}).get(rival, {}).get("median")


def times_autocast(row: Row, others: Others) -> float | None:
    """The ratio of :func:`times` of the base to that of PEFT under autocast; None while parity fails or where PEFT has
    no row."""
    peft = others(PEFT_AUTOCAST.name, row.case["method"])
    if row.against is None or peft is None or peft.against is None:
        return None
    return row.against[BASE.name]["median"] / peft.against[BASE.name]["median"]


def times_lora(row: Row, others: Others) -> float | None:
    """:func:`times` of the base over that of fastpeft's LoRA; None while parity fails or where LoRA has no row."""
    lora = others(FASTPEFT.name, "lora")
    if row.against is None or lora is None or lora.against is None:
        return None
    return row.against[BASE.name]["median"] / lora.against[BASE.name]["median"]


def kept_over_needed(row: Row, others: Others) -> float | None:
    """Kept bytes over those of ``x`` as it came, ``u [M, r]`` in float32 and the seed."""
    case = row.case
    x, u, seed = case["M"] * case["K"] * DTYPES[case["dtype"]].itemsize, case["M"] * case["rank"] * 4, 8
    return None if row.kept_bytes is None else row.kept_bytes / (x + u + (seed if case["dropout"] else 0))


def kept_over_peft(row: Row, others: Others) -> float | None:
    """Kept bytes over PEFT's."""
    peft = others(PEFT.name, row.case["method"])
    return None if row.kept_bytes is None or peft is None or not peft.kept_bytes else row.kept_bytes / peft.kept_bytes


@dataclass(frozen=True)
class Bound:
    """``measure(row, others)`` is at most ``limit`` on each of fastpeft's rows that fit; None fits all.

    ``isas``: the instruction sets of the CPU's kernels that it is stated for.
    """

    text: str
    limit: float
    measure: Measure
    kind: str | None = None
    dtype: str | None = None
    phase: str | None = None
    dropout: bool | None = None
    shapes: Sequence[str] | None = None
    method: str | None = None
    device: str = "cpu"
    isas: Sequence[str] | None = None

    def stated_for(self, row: Row) -> bool:
        """Whether it is about the device, and the kernels, of a row of fastpeft's."""
        return (
            row.contestant == FASTPEFT.name
            and self.device == row.case["device"]
            and (self.isas is None or (row.backend or "").removeprefix("cpu, ") in self.isas)
        )

    def fits(self, row: Row) -> bool:
        return (
            self.stated_for(row)
            and row.case["rank"] == 16
            and self.method in (None, row.case["method"])
            and self.kind in (None, row.case["kind"])
            and self.dtype in (None, row.case["dtype"])
            and self.phase in (None, row.phase)
            and self.dropout in (None, row.case["dropout"] > 0)
            and (self.shapes is None or row.case["shape"] in self.shapes)
        )


def _on_gpu(*bounds: Bound) -> tuple[Bound, ...]:
    return tuple(replace(bound, device="cuda", kind="layer", dtype="bf16") for bound in bounds)


def _of(method: str, *bounds: Bound) -> tuple[Bound, ...]:
    return tuple(replace(bound, method=method, text=f"{METHODS[method]} {bound.text}") for bound in bounds)


# With instructions for bfloat16; the latter two in rows of when the backend was called native.
_WITH_BF16 = ("amx", "avx512_bf16", "native, amx", "native, avx512")
_AVX2 = ("avx2",)
_ONE_TOKEN = ("1×2048×2048", "1×4096×4096")


def _on(isas: Sequence[str], *bounds: Bound) -> tuple[Bound, ...]:
    return tuple(replace(bound, isas=isas) for bound in bounds)


_BF16 = (
    *_of(
        "lora",
        Bound("layer: forward over the base", 1.08, times("base"), "layer", "bf16", "forward", False, _LARGE),
        Bound("layer: step over the base", 1.12, times("base"), "layer", "bf16", "step", False, _LARGE),
        Bound("layer: step over the base", 1.18, times("base"), "layer", "bf16", "step", True, _LARGE),
        Bound("model: step over the base", 1.12, times("base"), "model", "bf16", "step", False),
        Bound("model: step over the base", 1.15, times("base"), "model", "bf16", "step", True),
    ),
    *_of(
        "dora",
        Bound("layer: step over the base", 1.22, times("base"), "layer", "bf16", "step", False, _LARGE),
        Bound("layer: step over the base", 2.2, times("base"), "layer", "bf16", "step", True, _LARGE),
        Bound("model: step over the base", 1.25, times("base"), "model", "bf16", "step", False),
        Bound("model: step over the base", 2.0, times("base"), "model", "bf16", "step", True),
    ),
    *_of(
        "qlora",
        Bound("layer: step over LoRA's, 512 tokens", 1.3, times_lora, "layer", "bf16", "step", shapes=_TOKENS_512),
        Bound("layer: step over LoRA's, 2048 tokens", 1.12, times_lora, "layer", "bf16", "step", shapes=_TOKENS_2048),
        Bound("one token: over LoRA's", 1.0, times_lora, dtype="bf16", phase="generate"),
    ),
    *_of(
        "qdora",
        Bound("layer: step over LoRA's", 1.45, times_lora, "layer", "bf16", "step", False, _LARGE),
    ),
)
# Without them: the frozen float32 layer is what there is to be as fast as.
_FP32 = (
    *_of(
        "lora",
        Bound("layer: forward over the base", 1.0, times("base"), "layer", "fp32", "forward", False, _TOKENS_512),
        Bound("layer: step over the base", 1.0, times("base"), "layer", "fp32", "step", False, _TOKENS_512),
        Bound("layer: step over the base", 1.05, times("base"), "layer", "fp32", "step", True, _TOKENS_512),
        Bound("model: step over the base", 0.97, times("base"), "model", "fp32", "step", False),
        Bound("model: step over the base", 1.02, times("base"), "model", "fp32", "step", True),
        Bound(
            "layer: step over float32's base", 1.15, times("base-float32"), "layer", "bf16", "step", shapes=_TOKENS_512
        ),
    ),
    *_of(
        "dora",
        Bound("layer: step over the base", 1.08, times("base"), "layer", "fp32", "step", False, _TOKENS_512),
        Bound("layer: step over the base", 1.4, times("base"), "layer", "fp32", "step", True, _TOKENS_512),
    ),
    *_of(
        "qlora",
        Bound("one token: over the base", 0.6, times("base"), "layer", "fp32", "generate", shapes=_ONE_TOKEN),
        Bound(
            "layer: step over float32's base", 1.15, times("base-float32"), "layer", "bf16", "step", shapes=_TOKENS_512
        ),
    ),
)
BOUNDS = (
    *_on(_WITH_BF16, *_BF16),
    *_on(_AVX2, *_FP32),
    *_of(
        "lora",
        Bound("kept: x, u and the seed alone", 1.0, kept_over_needed, "layer", phase="step"),
        Bound("kept: share of PEFT's", 0.6, kept_over_peft, phase="step", dropout=True),
    ),
    *_of("dora", Bound("kept: share of PEFT's", 0.4, kept_over_peft, dtype="bf16", phase="step")),
    Bound("never slower than PEFT", 1.0, times("peft")),
    *_on_gpu(
        *_of(
            "lora",
            # The base's 2 x 180 µs and what csrc/cuda/lora_linear.cpp must move besides, at 2.7 TB/s a pass over
            # [M, 4096] in 12.5 µs: u, then v, dB, dA: 1.07 and 1.14.
            Bound("forward over the base", 1.10, times("base"), phase="forward", shapes=_GPU_4096),
            Bound("step over the base", 1.20, times("base"), phase="step", shapes=_GPU_4096),
            Bound("step over PEFT's", 1 / 1.5, times("peft"), phase="step", dropout=True, shapes=_GPU_2048),
        ),
        *_of(
            "dora",
            # Besides: the norm, z written and read, c ∘ dy written: 1.28.
            Bound("step over the base", 1.35, times("base"), phase="step", dropout=False, shapes=_GPU_4096),
            Bound("step over PEFT's", 1 / 2, times("peft"), phase="step", shapes=_GPU_4096),
        ),
        # W decoded twice in 16 µs each: 1.08.
        *_of("qlora", Bound("step over LoRA's", 1.12, times_lora, phase="step", shapes=_GPU_4096)),
        Bound("not slower than PEFT", 1.0, times("peft")),
        Bound("not slower than PEFT under autocast", 1.0, times_autocast),
    ),
)


@dataclass(frozen=True)
class Finding:
    """One bound on one row; ``where`` is empty and ``measured`` None when no row fits the bound."""

    bound: Bound
    where: str
    measured: float | None
    verdict: str

    @property
    def missed(self) -> bool:
        return self.verdict not in ("pass", "not measured")


def check(rows: Sequence[Row]) -> list[Finding]:
    """Every bound that is stated for the rows' devices and kernels, on every row that it is about; a row whose parity
    fails misses its bounds on time."""
    places = {_place(row, row.contestant, row.case["method"]): row for row in rows}
    findings = []
    for bound in BOUNDS:
        if not any(map(bound.stated_for, rows)):
            continue
        fitting = [row for row in rows if bound.fits(row)]
        if not fitting:
            findings.append(Finding(bound, "", None, "not measured"))
        for row in fitting:
            measured = bound.measure(row, partial(_other, places, row))
            where = f"{row.title}, {row.phase}"
            if measured is None:
                reason = "no row to compare with" if row.parity["passed"] else "parity fails"
                findings.append(Finding(bound, where, None, f"miss: {reason}"))
            else:
                findings.append(Finding(bound, where, measured, "pass" if measured <= bound.limit else "miss"))
    return findings


def _other(places: Mapping[object, Row], row: Row, contestant: str, method: str) -> Row | None:
    return places.get(_place(row, contestant, method))


def _place(row: Row, contestant: str, method: str) -> tuple[object, ...]:
    return replace(row, contestant=contestant, case=row.case | {"method": method}).identity
