"""The Triton backend: on a GPU where there is one, else its kernels run on CPU tensors by Triton's interpreter, see
conftest.py and triton_interpreter.py. Oracle and eager compute on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from cases import Case
from devices import DEVICE, DTYPES, on_device, run
from gpu_suite import SHORT, GpuSuite
from oracle import Expected, LoraInputs, Results, assert_close_as_eager
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

import fastpeft
from fastpeft import dispatch, ops
from fastpeft import kernels as launchers
from fastpeft.backends.gpu import plans
from fastpeft.backends.gpu import triton as backend
from fastpeft.backends.gpu.kernel_set import DyNeeds, DyOperands, Mask, Tail
from fastpeft.backends.gpu.plans import Plan, Product, plans_for
from fastpeft.dropout import dropout_keep, dropout_threshold

PLANNED = {
    "plain": Case(M=70, K=130, N=90),
    "adapters": Case(ranks=(8, 70, 3), bias=False),
    "dropout": Case(M=70, K=130, N=90, dropout_p=0.3),
    "half": Case(dtype=torch.bfloat16, dropout_p=0.3, weight_layout="transposed"),
    "dora": Case(dora=True),
    "dora_dropout": Case(M=70, K=130, N=90, dora=True, dropout_p=0.3),
    "descriptors": Case(M=150, K=136, N=272, dtype=torch.bfloat16, ranks=(8, 3)),
    "descriptors, dropout": Case(M=150, K=272, N=136, dtype=torch.float16, dropout_p=0.3),
    "descriptors, transposed": Case(M=33, K=64, N=72, dtype=torch.bfloat16, dropout_p=0.3, weight_layout="transposed"),
    "descriptors, ranks": Case(M=70, K=136, N=72, dtype=torch.bfloat16, ranks=(40,), dropout_p=0.3),
    "descriptors, dora": Case(M=70, K=136, N=264, dtype=torch.bfloat16, dora=True),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the backend takes calls on CPU tensors."""
    if DEVICE == "cpu":
        triton_interpreter.use(monkeypatch)


without_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")


@pytest.fixture(name="kernels")
def triton_kernels() -> backend.TritonKernels:
    return backend.kernels()


class TestTriton(GpuSuite):
    name = "triton"


def by_triton(inputs: LoraInputs) -> Results:
    return run(inputs, "triton")


@triton.jit
def _square_kernel(a_ptr, b_ptr, out_ptr, rounded_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(out_ptr + at, product)
    tl.store(rounded_ptr + at, product.to(rounded_ptr.dtype.element_ty))


@without_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_interpreters_product_and_its_rounding_are_right(dtype: torch.dtype) -> None:
    a, b, out = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    rounded = torch.empty(16, 16, dtype=dtype)
    InterpretedFunction(_square_kernel.fn)[(1,)](a, b, out, rounded, SIZE=16)
    assert torch.equal(out, (a.double() @ b.double()).float())
    assert torch.equal(rounded, out.to(dtype))


@without_gpu
@pytest.mark.parametrize("case", [*SHORT.values(), Case(M=300, K=130, N=270, dtype=torch.bfloat16)], ids=str)
def test_no_two_programs_write_to_one_place(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one read what another wrote: the order in which they run changes no bit."""
    inputs = case.inputs()
    forwards = by_triton(inputs)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", triton_interpreter.set_program_backwards)
    backwards = by_triton(inputs)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


@triton.jit
def _same_place_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


@without_gpu
def test_programs_that_write_to_one_place_show_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.empty(1)
    InterpretedFunction(_same_place_kernel.fn)[(3,)](out)
    assert out.item() == 2
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", triton_interpreter.set_program_backwards)
    InterpretedFunction(_same_place_kernel.fn)[(3,)](out)
    assert out.item() == 0


@pytest.fixture(params=Plan)
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each plan in turn, where it can run at all."""

    def planned(product: Product, device: torch.device, shared: tuple[Plan, ...]) -> Plan:
        return request.param if request.param in plans_for(product.ending, shared) else Plan.base_first

    monkeypatch.setattr(plans, "choose", planned)
    yield


@pytest.mark.parametrize("case", PLANNED.values(), ids=PLANNED)
def test_every_plan_is_as_close_as_eager(plan: None, case: Case) -> None:
    Expected.of(case.inputs).assert_met_by(by_triton)


def test_where_the_copy_engine_can_move_the_tiles(
    kernels: backend.TritonKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((17, 32), (24, 32)))
    monkeypatch.setattr(backend, "_architecture", lambda device: 90)

    def persistent(x: torch.Tensor = x, weight: torch.Tensor = weight, rank: int = 64) -> bool:
        return Plan.one_accumulator_persistent in kernels.shared_plans(x, weight, rank)

    assert persistent()
    assert persistent(weight=weight.t().contiguous().t())
    assert not persistent(rank=65)
    assert not persistent(x.float(), weight.float())
    assert not persistent(weight=weight[:20])  # rows of y of 40 bytes
    assert not persistent(x[:, :28], weight[:, :28].contiguous())
    assert not persistent(x[:, 4:28], weight[:, 4:28])  # an address in between
    assert not persistent(x.t().contiguous().t())
    assert not persistent(x[:1].expand(17, 32))  # rows that overlap
    assert not persistent(x[:, :1], weight[:, :1])
    assert not persistent(x[:16])  # few tokens: z may be float32, and one tile leaves the GPU idle
    for architecture, moves_tiles in ((89, False), (100, True), (103, False), (120, False)):
        monkeypatch.setattr(backend, "_architecture", lambda device, name=architecture: name)
        assert persistent() is moves_tiles


@pytest.mark.parametrize("programs", [1, 3])
def test_the_persistent_programs_share_the_tiles(
    programs: int, kernels: backend.TritonKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 tiles; the kernel of that plan is what ran."""
    if DEVICE == "cuda" and not backend.shared_plans(torch.device("cuda"), torch.bfloat16)[1:]:
        pytest.skip("this GPU has no such copy engine")
    monkeypatch.setattr(backend, "multiprocessors", lambda device: programs)
    with torch.device(DEVICE):
        x, weight = torch.randn(130, 72).half(), torch.randn(904, 72).half()
        u, B, bias, y = torch.randn(130, 4), torch.randn(904, 4), torch.randn(904), torch.full((130, 904), torch.nan)
    y = y.half()
    kernels.lora_linear(Plan.one_accumulator_persistent, x, weight, y, Tail(u, B, 1.5, bias=bias))

    def formula(dtype: torch.dtype) -> torch.Tensor:
        low_rank = (1.5 * u).to(dtype) @ B.to(dtype).t()
        return x.to(dtype) @ weight.to(dtype).t() + low_rank + bias.to(dtype)

    assert_close_as_eager(y, formula(torch.float64), formula(torch.float16))


def test_a_product_that_drops_its_input_reads_w_once() -> None:
    """``base - dropped + c (dropped + s u Bᵀ)``, both products in the one kernel."""
    with torch.device(DEVICE):
        x, weight = torch.randn(70, 130), torch.randn(90, 130)
        u, B, c, seed = torch.randn(70, 4), torch.randn(90, 4), torch.rand(90), torch.tensor(5)
        y, z = torch.empty(70, 90), torch.empty(70, 90)
    keep, factor = dropout_keep(seed, 70, 130, 0.25), 4 / 3
    tail = Tail(u, B, 1.5, dropout_threshold(0.25), seed, c, z)
    config = launchers.lora_linear_config(16, True, masked_input=True)
    launchers.lora_linear(x, weight, y, tail, factor, 16, "ieee", config)

    def formula(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        dropped = factor * (x * keep).to(dtype) @ weight.to(dtype).t()
        exact_z = dropped + 1.5 * u.to(dtype) @ B.to(dtype).t()
        return x.to(dtype) @ weight.to(dtype).t() - dropped + c.to(dtype) * exact_z, exact_z

    for actual, exact, eager in zip((y, z), formula(torch.float64), formula(torch.float32), strict=True):
        assert_close_as_eager(actual, exact, eager)


@pytest.mark.parametrize("most_bytes", [1, 5_000])
@pytest.mark.parametrize(
    "case", [Case(M=130, N=600, ranks=(8, 70, 3), mixed=True), Case(M=70, N=300, dora=True, dropout_p=0.3)], ids=str
)
def test_slabs_of_columns_summed_up_by_one_program(
    case: Case, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "MOST_BYTES_OF_V", most_bytes)
    Expected.of(case.inputs).assert_met_by(by_triton)


@pytest.mark.parametrize("K", [192, 4096])
def test_a_token_in_float32_is_summed_up_in_short_chains(
    kernels: backend.TritonKernels, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H100 one chain along K was off by nearly four times what the vendor's product of one token is."""
    taken = []
    monkeypatch.setattr(launchers, "lora_down", lambda *operands: taken.append(operands))
    monkeypatch.setattr(backend, "multiprocessors", lambda device: 132)
    with torch.device("meta"):
        kernels.lora_down(torch.empty(1, K), [torch.empty(8, K)], torch.empty(1, 8), [Mask(0, 1.0, None)], None)
    ((*_, (sums,), _, _, _, _, config),) = taken
    assert (config.SPLIT_K, sums.shape[0]) == (32, K // 32)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(16384, 14336, 256), (65536, 4096, 512), (4096, 4096, 16), (16384, 14336, 16)])
def test_partial_sums_of_v_are_bounded(
    kernels: backend.TritonKernels, shape: tuple[int, int, int], scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a number of bytes, or by v itself where that takes more; all columns are summed up."""
    (M, N, r), taken = shape, []
    monkeypatch.setattr(launchers, "lora_dy", lambda *operands: taken.append(operands))
    with torch.device("meta"):
        dy, B, u, v = torch.empty(M, N, dtype=torch.bfloat16), torch.empty(N, r), torch.empty(M, r), torch.empty(M, r)
        c, z = (torch.empty(N), torch.empty_like(dy)) if scaled else (None, None)
        index = None if scaled else torch.empty(M, dtype=torch.int32)  # without either torch takes many ranks
    kernels.lora_dy(dy, DyOperands(B, u, 1.0, index, c=c, z=z), v, DyNeeds(True, scaled, scaled))
    ((*_, out, _, _, config),) = taken
    assert out.v.nbytes <= max(backend.MOST_BYTES_OF_V, v.nbytes)
    assert out.v.shape[0] * config.SLABS * config.BLOCK_N >= N


@pytest.mark.parametrize("c", [None, torch.tensor([0.5, -2.0, 1.0])], ids=["", "scaled"])
def test_torch_multiplies_by_more_ranks_than_a_program_holds(
    kernels: backend.TritonKernels, c: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel would read x once for every so many of them."""
    for name in ("lora_down", "lora_dy", "lora_dA"):
        monkeypatch.setattr(launchers, name, None)
    x, dy, A, B = (torch.randn(shape, device=DEVICE) for shape in ((4, 6), (4, 3), (70, 6), (3, 70)))
    c = None if c is None else c.to(DEVICE)
    u, v, no_mask = torch.empty(4, 70, device=DEVICE), torch.empty(4, 70, device=DEVICE), Mask(0, 1.0, None)
    kernels.lora_down(x, [A], u, [no_mask], None)
    found = kernels.lora_dy(dy, DyOperands(B, u, 2.0, c=c), v, DyNeeds(True, False, False))
    flowing = dy if c is None else dy * c
    expected = x @ A.t(), 2 * flowing @ B, 2 * flowing.t() @ (x @ A.t()), (2 * flowing @ B).t() @ x
    torch.testing.assert_close((u, v, found.dB, kernels.lora_dA(x, v, no_mask)), expected)


@pytest.mark.parametrize("case", [Case(), Case(ranks=(8, 3), dropout_p=0.5, mixed=True), Case(dora=True)], ids=str)
def test_only_the_gradients_asked_for(case: Case) -> None:
    i = on_device(case.inputs())
    _, u, z = ops.lora_linear(*i.call().flat(), "triton")
    count = 3 + len(i.A) + len(i.B) + len(i.c)
    every = ops.lora_linear_backward(*i.backward_call(u, z, [True] * count).flat(), "triton")
    for n in range(count):
        needs = [k == n for k in range(count)]
        (one,) = ops.lora_linear_backward(*i.backward_call(u, z, needs).flat(), "triton")
        assert torch.equal(one, every[n])


@without_gpu
def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, A, B = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)

    def reason(x: torch.Tensor, weight: torch.Tensor = weight) -> str | None:
        return dispatch.named("triton").refuses(x, weight, [A, B])

    assert reason(torch.randn(3, 6)) is None
    assert reason(torch.randn(3, 6).double()) == "it computes in float32, bfloat16 or float16, and x is torch.float64"
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason(torch.randn(3, 6)) is None
    assert reason(torch.randn(3, 6).bfloat16()) == "Triton's interpreter computes nonsense in torch.bfloat16"
    assert reason(torch.randn(3, 0), torch.empty(4, 0)) == "weight is empty, [4, 0]"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert reason(torch.randn(3, 6)) == "it runs on NVIDIA GPUs, and x is on cpu"
    with pytest.raises(
        fastpeft.BackendRefusal, match="backend='triton' cannot run lora_linear: it runs on NVIDIA GPUs"
    ):
        fastpeft.functional.lora_linear(torch.randn(3, 6), weight, None, A, B, 1.0, backend="triton")
