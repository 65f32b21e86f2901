"""The C++ extension: each instruction set against the oracle and against whole numbers; the mask bit by bit."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import CASES, Case, expected, in_layout
from oracle import Expected, LoraInputs, fused, oracle

from fastpeft import extension as loader
from fastpeft import ops
from fastpeft.call import Adapters, BackwardCall, ForwardCall, Kept, Needs, Weight
from fastpeft.dropout import dropout_keep, dropout_scale, dropout_threshold

# Without the extension these tests stand under the one name that every processor has, and fail.
ISAS: tuple[str, ...] = ("plain",) if loader.C is None else tuple(loader.C.isas())
# The AMX kernels with emulated tile instructions, where the processor has all else that they need.
EMULATED = "emulated_amx"
ISAS += (EMULATED,) * ("avx512_bf16" in ISAS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    extension().set_isa(request.param)
    yield request.param
    extension().set_isa("auto")


def extension() -> ModuleType:
    assert loader.C is not None, loader.missing()
    return loader.C


def test_every_instruction_set_of_this_processor_has_its_kernels() -> None:
    wanted = {"plain"}
    if platform.machine() in ("aarch64", "arm64"):
        wanted.add("neon")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX"):
        wanted.add("avx2")
    if torch.cpu._is_avx512_supported():
        wanted.add("avx512")
    if torch.cpu._is_avx512_bf16_supported():
        wanted.add("avx512_bf16")
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
    expected(case).assert_met_by(lambda inputs: fused(inputs, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["x", "weight", "dy"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_rows_may_be_further_apart_than_32_bits_count(isa: str, which: str, dora: bool, dtype: torch.dtype) -> None:
    def far_apart(i: LoraInputs) -> LoraInputs:
        return replace(i, **{which: in_layout(getattr(i, which), "far_apart")})

    case = Case(M=70, K=40, N=66, dtype=dtype, dropout_p=0.3, dora=dora)
    Expected.of(case.inputs).assert_met_by(lambda i: fused(far_apart(i), "cpu"))


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
    actual = fused(i, "cpu")
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
PLANS = ("base_first", "low_rank_first", "one_accumulator")
PAIRS = tuple(isa for isa in ISAS if isa in ("amx", "avx512_bf16", EMULATED))
MATRIX_UNITS = ("amx", EMULATED)
# Those whose bfloat16 base product is the vendor's: torch has no micro-kernel for Arm's pairs.
VENDORS = ("neon_bf16",)


# low_rank_first adds the base product last: DoRA cannot scale it.
PLANNED = [(plan, case) for plan in PLANS for case in WIDE_CASES if not (plan == "low_rank_first" and case.dora)]
every_plan = pytest.mark.parametrize(("plan", "case"), PLANNED, ids=str, indirect=["plan"])


@pytest.fixture
def plan(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each plan of the base product in bfloat16, in place of the one that would be chosen."""
    extension().force_plan(getattr(extension().Plan, request.param))
    yield request.param
    extension().force_plan(None)


@every_plan
def test_every_plan_is_as_close_as_eager(isa: str, plan: str, case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        expected(replace(case, dtype=dtype)).assert_met_by(lambda inputs: fused(inputs, "cpu"))


@every_plan
def test_whole_numbers_come_out_exactly_from_every_plan(isa: str, plan: str, case: Case) -> None:
    i = whole_numbers(replace(case, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16))
    actual = fused(i, "cpu")
    for name, exact in oracle(i).items():
        assert torch.equal(exact, exact.to(actual[name].dtype).double()), f"{name} is not exact"
        assert torch.equal(actual[name].double(), exact), name


# Of x more than a second-level cache holds: several stripes are packed together, in two depths or, of many rows, whole;
# the last are fewer.
FAR_CASES = [
    Case(M=300, K=2102, N=1098, ranks=(3,)),
    Case(M=515, K=1602, N=1098, ranks=(3,)),
    Case(M=515, K=1602, N=1098, ranks=(3,), dropout_p=0.5, dora=True, bias=False),
]


@pytest.mark.parametrize("isa", PAIRS or ISAS[:1], indirect=True)
@pytest.mark.parametrize("plan", ["one_accumulator"], indirect=True)
@pytest.mark.parametrize("case", FAR_CASES, ids=str)
def test_stripes_packed_together_come_out_exactly(isa: str, plan: str, case: Case) -> None:
    i = whole_numbers(replace(case, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16))
    actual = fused(i, "cpu")
    for name, exact in oracle(i).items():
        assert torch.equal(exact, exact.to(actual[name].dtype).double()), f"{name} is not exact"
        assert torch.equal(actual[name].double(), exact), name


# DoRA's dropout where few elements are dropped: depths and stripes of several blocks, rows without a dropped element.
APART_CASES = [
    Case(M=1, K=66, N=2, ranks=(3,), dropout_p=0.1, dora=True),
    Case(M=577, K=130, N=66, ranks=(3,), dropout_p=0.25, dora=True),
    Case(M=35, K=603, N=301, ranks=(17,), dropout_p=0.05, dora=True, bias=False),
    Case(M=70, K=301, N=603, dropout_p=0.2, dora=True, x_layout="row_stride", weight_layout="transposed"),
    Case(M=70, K=256, N=512, dropout_p=0.1, dora=True, dy_layout="transposed", mixed=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 8.0, -0.1])
@pytest.mark.parametrize("case", APART_CASES, ids=str)
def test_dropped_elements_apart_are_as_close_as_eager(isa: str, case: Case, factor: float, dtype: torch.dtype) -> None:
    def make() -> LoraInputs:
        made = replace(case, dtype=dtype).inputs()
        return replace(made, c=[factor * c for c in made.c])

    Expected.of(make).assert_met_by(lambda i: fused(i, "cpu"))


def test_a_dropped_infinity_stays_dropped(isa: str) -> None:
    i = Case(M=40, K=300, N=70, ranks=(4,), dropout_p=0.1, dora=True).inputs()
    (keep,) = i.keep()
    assert keep is not None
    m, k = (int(some) for some in torch.nonzero(~keep)[0])
    i.x.data[m, k] = torch.inf
    expected_y, (y, _, (z,)) = fused(i, "reference")["y"], ops.lora_linear(*i.call().flat(), "cpu")
    assert torch.equal(y.isfinite(), expected_y.isfinite()) and torch.equal(y.isnan(), expected_y.isnan())
    assert z.isfinite().all()  # of D(x), which has none


def plan_of(x: torch.Tensor, weight: torch.Tensor, *, dora: bool = False, backward: bool = False) -> str:
    N, K = weight.shape
    adapters = Adapters([torch.empty(4, K)], [torch.empty(N, 4)], [torch.ones(N)] * dora, [1.0], [0.0])
    return extension().plan(x, Weight.of(weight), adapters, backward).name


def test_one_accumulator_is_chosen_where_it_is_faster_than_the_vendors_product(isa: str) -> None:
    weight, x = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64, dtype=torch.bfloat16)
    pairs = isa in PAIRS
    for backward in (False, True):
        assert (plan_of(x, weight, backward=backward) == "one_accumulator") == (isa not in VENDORS)
    if isa in MATRIX_UNITS:  # where it is not for many tokens of a small depth
        many = torch.empty(513, 64, dtype=torch.bfloat16)
        deep = torch.empty(513, 1536, dtype=torch.bfloat16)
        assert plan_of(many, weight) == "low_rank_first" and plan_of(many, weight, dora=True) == "base_first"
        assert plan_of(deep, torch.empty(64, 1536, dtype=torch.bfloat16)) == "one_accumulator"
    assert plan_of(x[:, :63], weight[:, :63].contiguous()) == "one_accumulator"
    tuned = torch.backends.mkl.is_available() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    in_float = "low_rank_first" if tuned else "one_accumulator" if isa in ("avx2", "avx512") else "base_first"
    assert plan_of(x.float(), weight.float()) == in_float
    assert plan_of(x.float(), weight.float(), dora=True) == in_float.replace("low_rank", "base")
    assert extension().multiplies_pairs() == pairs
    with torch.backends.mkldnn.flags(enabled=False):
        assert not extension().multiplies_pairs()
        assert (plan_of(x, weight) == "one_accumulator") == (isa not in (*PAIRS, *VENDORS))


@pytest.mark.parametrize(("dtype", "few"), [(torch.bfloat16, 4), (torch.float32, 8), (torch.float16, 16)])
def test_a_few_tokens_take_dot_products_while_they_fit_the_cache(dtype: torch.dtype, few: int) -> None:
    weight = torch.empty(64, 64, dtype=dtype)
    for tokens in (1, few, few + 1):
        assert (plan_of(torch.empty(tokens, 64, dtype=dtype), weight) == "dots") == (tokens <= few)
    assert plan_of(torch.empty(1, 64, dtype=dtype), weight, backward=True) != "dots"
    assert plan_of(torch.empty(0, 64, dtype=dtype), weight) != "dots"
    wide = torch.empty(64, 16384, dtype=dtype)
    assert plan_of(torch.empty(1, 16384, dtype=dtype), wide) == "dots"
    assert plan_of(torch.empty(2, 16384, dtype=dtype), wide) != "dots"
    assert plan_of(torch.empty(1, 64, dtype=dtype), weight.t()) != "dots"  # strides


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
    x = torch.ones(M, K, dtype=dtype)
    adapters = Adapters([eye], [torch.zeros(M, K, dtype=dtype)], [], [1.0], [p], seed)
    _, u, _ = ops.lora_linear(*ForwardCall(x, Weight.of(weight), None, adapters, False).flat(), "cpu")
    assert torch.equal(u, keep.to(u.dtype))

    adapters = adapters._replace(A=[torch.ones(M, K, dtype=dtype)], B=[torch.eye(M, dtype=dtype)])
    needs = Needs.of([True, False, False, True, False], 1)
    call = BackwardCall(torch.eye(M, dtype=dtype), x, Weight.of(weight), adapters, Kept(None, []), needs)
    dx, dA = ops.lora_linear_backward(*call.flat(), "cpu")
    assert torch.equal(dx, keep.to(dtype) * dropout_scale(p))
    assert torch.equal(dA, keep.to(dtype) * dropout_scale(p))
