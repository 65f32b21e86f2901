"""The C++ extension: each instruction set against the oracle and against whole numbers; the mask bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from cases import CASES, Case, expected
from oracle import LoraInputs, fused, oracle

from fastpeft import ops
from fastpeft.backends import native
from fastpeft.dropout import dropout_keep, dropout_scale, dropout_threshold

# Without the extension these tests stand under the one name that every processor has, and fail.
ISAS: tuple[str, ...] = tuple(native._C.isas()) if native._C is not None else ("plain",)
# The AMX kernels with emulated tile instructions, where the processor has all else that they need.
EMULATED = "emulated_amx"
ISAS += (EMULATED,) * ("avx512" in ISAS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    extension().set_isa(request.param)
    yield request.param
    extension().set_isa("auto")


def extension() -> ModuleType:
    assert native._C is not None, native.unavailable()
    return native._C


def test_every_instruction_set_of_this_processor_has_its_kernels() -> None:
    wanted = {"plain"}
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX"):
        wanted.add("avx2")
    if torch.cpu._is_avx512_bf16_supported():
        wanted.add("avx512")
    if torch.cpu._is_amx_tile_supported():
        wanted.add("amx")
    assert wanted <= set(ISAS)


def test_the_override_is_told_and_auto_takes_the_fastest() -> None:
    for name in ISAS:
        extension().set_isa(name)
        assert extension().isa() == name
    extension().set_isa("auto")
    assert extension().isa() == ISAS[0]


def test_an_unknown_instruction_set_is_refused_and_changes_nothing() -> None:
    before = extension().isa()
    with pytest.raises(ValueError, match="mmx"):
        extension().set_isa("mmx")
    assert extension().isa() == before


@pytest.mark.parametrize(
    ("case", "isa"),
    [
        (case, isa)
        for case in CASES
        for isa in ISAS[1:] or ISAS
        if isa != EMULATED or case.dtype == torch.bfloat16  # the one dtype that AMX multiplies
    ],
    indirect=["isa"],
    ids=str,
)
def test_forward_and_every_gradient_are_as_close_as_eager(isa: str, case: Case) -> None:
    """On the slower instruction sets; test_ops.py runs the same on the fastest."""
    expected(case).assert_met_by(lambda inputs: fused(inputs, "native"))


def whole_numbers(case: Case) -> LoraInputs:
    """Digits so small that every product, sum and intermediate is exact in the case's dtype, in any order."""
    i = case.inputs()
    density = min(0.25, 64 / max(case.M, case.K, case.N))

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        digits = torch.randint(-1, 2, tensor.shape) * (torch.rand(tensor.shape) < density)
        return digits.to(tensor.dtype)

    scaling = [2.0, -1.0, 0.5][: len(i.A)]
    bias = None if i.bias is None else draw(i.bias)
    A, B = ([draw(t) for t in tensors] for tensors in (i.A, i.B))
    p = [case.dropout_p] * len(A)
    c = [torch.tensor([1.0, 2.0, -1.0, 0.5])[torch.randint(4, (case.N,))] for _ in i.c]
    return replace(
        i, c=c, x=draw(i.x), weight=draw(i.weight), bias=bias, A=A, B=B, dy=draw(i.dy), scaling=scaling, dropout_p=p
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(M=1, K=257, N=63),
        Case(M=5, K=65, N=257, ranks=(17,), dropout_p=0.5),
        Case(M=130, K=63, N=33, ranks=(1,), bias=False),
        Case(M=66, K=129, N=127, ranks=(16, 3), dropout_p=0.5, mixed=True, x_layout="row_stride"),
        Case(M=33, K=31, N=65, ranks=(64,), x_layout="transposed", weight_layout="transposed", dy_layout="transposed"),
    ],
    ids=str,
)
def test_whole_numbers_come_out_exactly(isa: str, case: Case, dtype: torch.dtype) -> None:
    """An index that is off by one, a lane that is counted twice or a tail that is lost cannot hide in a tolerance."""
    i = whole_numbers(replace(case, dtype=dtype, adapter_dtype=dtype))
    actual = fused(i, "native")
    for name, exact in oracle(i).items():
        assert torch.equal(exact, exact.to(actual[name].dtype).double()), f"{name} is not exact in {dtype}"
        assert torch.equal(actual[name].double(), exact), name


# Half a dozen stripes, parts of rows, depths and blocks, and the tails of each.
WIDE_CASES = [
    Case(M=1, K=66, N=2),
    Case(M=577, K=66, N=130, ranks=(3,), dropout_p=0.5),
    Case(M=97, K=3202, N=66, ranks=(17,), bias=False),
    Case(M=35, K=130, N=3202, ranks=(16, 3), dropout_p=0.5, mixed=True),
    Case(M=70, K=96, N=98, x_layout="row_stride", weight_layout="transposed", dy_layout="transposed"),
    Case(M=97, K=66, N=130, ranks=(17,), dora=True),
    Case(M=577, K=130, N=66, ranks=(3,), dropout_p=0.5, dora=True),
    Case(M=33, K=66, N=98, ranks=(3, 16, 1), dropout_p=0.5, bias=False, dora=True, weight_layout="transposed"),
]
PLANS = ("vendor_first", "vendor_last", "one_accumulator")
PAIRS = tuple(isa for isa in ISAS if isa in ("amx", "avx512", EMULATED))


# vendor_last adds the base product last: DoRA cannot scale it.
PLANNED = [(plan, case) for plan in PLANS for case in WIDE_CASES if not (plan == "vendor_last" and case.dora)]
every_plan = pytest.mark.parametrize(("plan", "case"), PLANNED, ids=str, indirect=["plan"])


@pytest.fixture
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each plan of the base product in bfloat16, in place of the one that would be chosen."""
    monkeypatch.setattr(native, "FEW_TOKENS", dict.fromkeys(DTYPES, 0))
    monkeypatch.setattr(
        native, "_plan", lambda dtype, weight, quant, contracted, dora: getattr(extension().Plan, request.param)
    )
    return request.param


@pytest.mark.parametrize("isa", PAIRS or ISAS[:1], indirect=True)
@every_plan
def test_every_plan_is_as_close_as_eager(isa: str, plan: str, case: Case) -> None:
    if plan == "one_accumulator" and not extension().has_base_product():
        with pytest.raises(RuntimeError, match="has_base_product"):
            fused(replace(case, dtype=torch.bfloat16).inputs(), "native")
        return
    expected(replace(case, dtype=torch.bfloat16)).assert_met_by(lambda inputs: fused(inputs, "native"))


@pytest.mark.parametrize("isa", PAIRS or ISAS[:1], indirect=True)
@every_plan
def test_whole_numbers_come_out_exactly_from_every_plan(isa: str, plan: str, case: Case) -> None:
    i = whole_numbers(replace(case, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16))
    if plan == "one_accumulator" and not extension().has_base_product():
        with pytest.raises(RuntimeError, match="has_base_product"):
            fused(i, "native")
        return
    actual = fused(i, "native")
    for name, exact in oracle(i).items():
        assert torch.equal(exact, exact.to(actual[name].dtype).double()), f"{name} is not exact"
        assert torch.equal(actual[name].double(), exact), name


def test_one_accumulator_is_chosen_where_it_runs() -> None:
    weight = torch.empty(64, 64, dtype=torch.bfloat16)
    possible = extension().has_base_product() and extension().isa() in native.ONE_ACCUMULATOR
    wanted = extension().Plan.one_accumulator
    assert (native._plan(torch.bfloat16, weight, [], 64, False) == wanted) == possible
    assert native._plan(torch.bfloat16, weight, [], 63, False) != wanted
    assert native._plan(torch.bfloat16, torch.empty(64, 64, 2)[..., 0], [], 64, False) != wanted
    assert native._plan(torch.float32, weight, [], 64, False) != wanted
    with torch.backends.mkldnn.flags(enabled=False):
        assert not extension().has_base_product()
        assert native._plan(torch.bfloat16, weight, [], 64, False) != wanted


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 8), (2, 257), (63, 100), (2, 5000), (0, 5), (5, 0)])
def test_the_mask_is_the_references(isa: str, rows: int, columns: int) -> None:
    seeds = torch.randint(2**63 - 1, ()), torch.tensor(0), torch.tensor(2**63 - 1), torch.tensor(-1)
    for seed, p in itertools.product(seeds, (0.0, 1e-9, 0.05, 0.5, 1 - 1e-9)):
        mask = extension().dropout_keep(seed.item(), rows, columns, dropout_threshold(p))
        assert mask.dtype == torch.bool
        assert torch.equal(mask, dropout_keep(seed, rows, columns, p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K"), [(3, 7), (40, 64), (65, 129)])
def test_forward_dA_and_dx_see_the_references_mask(isa: str, M: int, K: int, dtype: torch.dtype) -> None:
    """With x of ones and unit matrices for A, B and dy, ``u``, ``dA`` and ``dx`` are the mask itself."""
    p = 0.5
    seed = torch.randint(2**63 - 1, (1,))
    keep = dropout_keep(seed[0], M, K, p)
    weight = torch.zeros(M, K, dtype=dtype)

    eye = torch.eye(K, dtype=dtype)
    settings = [1.0], [p], seed, None
    x = torch.ones(M, K, dtype=dtype)
    _, u, _ = ops.lora_linear(
        x, weight, [], 0, None, [eye], [torch.zeros(M, K, dtype=dtype)], [], *settings, False, "native"
    )
    assert torch.equal(u, keep.to(u.dtype))

    A, B = torch.ones(M, K, dtype=dtype), torch.eye(M, dtype=dtype)
    needs = [True, False, False, True, False]
    dx, dA = ops.lora_linear_backward(
        torch.eye(M, dtype=dtype), x, weight, [], 0, [A], [B], [], None, [], *settings, needs, "native"
    )
    assert torch.equal(dx, keep.to(dtype) * dropout_scale(p))
    assert torch.equal(dA, keep.to(dtype) * dropout_scale(p))
