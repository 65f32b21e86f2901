"""What every backend for GPUs is tested for, wherever it runs: on a GPU, interpreted or emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, expected, in_layout
from devices import DEVICE, DTYPES, moved_to, on_device, run
from oracle import Expected, LoraInputs, Results, assert_close_as_eager, make_inputs
from test_dora_norm import eager as eager_norm

from fastpeft import four_bit, ops
from fastpeft.backends.gpu.kernel_set import Kernels, Mask, Tail
from fastpeft.call import Weight
from fastpeft.dropout import dropout_keep, dropout_threshold

Form = tuple[str, int, bool]  # quant_type, blocksize, nested
one_at_a_time = pytest.mark.xdist_group("far apart")  # each takes 9 GB of a GPU's memory


SHORT = {
    "dropout": Case(dropout_p=0.5, dtype=torch.bfloat16),
    "mixed": Case(ranks=(8, 3), dropout_p=0.5, mixed=True),
    "dora": Case(dora=True, ranks=(8, 3), dropout_p=0.5),
    "one token": Case(M=1, dora=True),
}


class GpuSuite:
    """``name`` is the backend's; a fixture ``kernels`` in the file of each subclass gives its kernels."""

    name: str

    def results(self, inputs: LoraInputs) -> Results:
        return run(inputs, self.name)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_forward_and_every_gradient_are_as_close_as_eager(self, case: Case) -> None:
        expected(case).assert_met_by(self.results)

    @pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
    @pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 8), (2, 257), (63, 100), (33, 130)])
    def test_the_mask_is_the_references(self, kernels: Kernels, rows: int, columns: int, p: float) -> None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=DEVICE)
        kept = kernels.dropout(torch.ones(rows, columns, device=DEVICE), Mask(dropout_threshold(p), 1.0, seed))
        assert torch.equal(kept != 0, dropout_keep(seed, rows, columns, p))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(40, 3), (33, 100), (33, 104), (70, 257), (8, 600)], ids=str)
    @pytest.mark.parametrize("rank", [1, 16, 70])
    def test_the_norm_is_as_close_as_eager(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
        made = make_inputs((1, shape[1]), shape[0], (rank,), dtype)
        weight, A, B = moved_to(DEVICE, (made.weight, made.A[0], made.B[0]))
        norm = ops.dora_norm(*Weight.of(weight), A, B, 0.75, dtype, self.name).cpu()
        exact = eager_norm(made.weight.double(), made.A[0].double(), made.B[0].double(), 0.75)
        assert_close_as_eager(norm, exact, eager_norm(made.weight, made.A[0], made.B[0], 0.75))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_norm_of_an_embedding_is_as_close_as_eager(self, dtype: torch.dtype) -> None:
        """Of a transposed W with wider adapters, in their dtype."""
        made = make_inputs((1, 600), 70, (16,), dtype, torch.float32)
        W, A, B = made.weight.float(), made.A[0], made.B[0]
        operands = moved_to(DEVICE, (in_layout(made.weight, "transposed"), A, B))
        norm = ops.dora_norm(*Weight.of(operands[0]), *operands[1:], 0.75, torch.float32, self.name).cpu()
        exact = eager_norm(W.double(), A.double(), B.double(), 0.75)
        assert_close_as_eager(norm, exact, eager_norm(W, A, B, 0.75))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("form", [("nf4", 64, True), ("fp4", 32, False), ("nf4", 4096, False), ("fp4", 128, True)])
    @pytest.mark.parametrize("shape", [(1, 1), (63, 101), (96, 130)], ids=str)
    def test_a_4_bit_weight_is_decoded_bit_by_bit(
        self, kernels: Kernels, shape: tuple[int, int], form: Form, dtype: torch.dtype
    ) -> None:
        packed = four_bit.quantize(torch.randn(shape), *form)
        decoded = kernels.four_bit_decode(Weight.of(moved_to(DEVICE, packed)), *shape, dtype)
        assert torch.equal(decoded.cpu(), packed.dequantize(dtype))

    @pytest.mark.parametrize("dora", [False, True], ids=["qlora", "qdora"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("M", "K", "form"),
        [
            (33, 100, ("nf4", 64, True)),
            (1, 192, ("nf4", 64, True)),
            (1, 1216, ("nf4", 64, False)),
            (2, 64, ("nf4", 4096, True)),
            (8, 640, ("fp4", 128, False)),
            (9, 128, ("nf4", 64, True)),
            (16, 128, ("fp4", 128, False)),
            (3, 64, ("nf4", 32, True)),
        ],
    )
    def test_forward_and_gradients_over_4_bits(
        self, M: int, K: int, form: Form, dtype: torch.dtype, dora: bool
    ) -> None:
        Expected.of(lambda: over_4_bits(M, K, form, dtype, dora)).assert_met_by(self.results)

    @pytest.mark.parametrize("M", [63, 65])
    @pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [1.3, 0.0625])
    def test_scalings_are_not_rounded_with_the_adapters(self, M: int, adapter_dtype: torch.dtype, scale: float) -> None:
        def make() -> LoraInputs:
            made = Case(M=M, adapter_dtype=adapter_dtype, dropout_p=0.1).inputs()
            return replace(made, scaling=[scale])

        Expected.of(make).assert_met_by(self.results)

    @pytest.mark.parametrize("scale", [0.0625, 1.0])
    def test_small_adapters_do_not_vanish(self, scale: float) -> None:
        """``s B`` is below float16's normal numbers, its product with ``dy`` is not."""

        def make() -> LoraInputs:
            made = Case(M=65, dtype=torch.float16, adapter_dtype=torch.float32).inputs()
            return replace(made, B=[2e-4 * b for b in made.B], scaling=[scale])

        Expected.of(make).assert_met_by(self.results)

    @pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")  # interpreted
    @pytest.mark.parametrize("M", [8, 63, 65, 300])
    @pytest.mark.parametrize("p", [0.0, 0.5])
    def test_one_adapters_infinities_stay_with_its_tokens(self, M: int, p: float) -> None:
        i = Case(M=M, dtype=torch.float16, ranks=(8, 3), dropout_p=p, mixed=True).inputs()
        i.A[1].fill_(1e6)
        results, sound = self.results(i), i.adapter_index != 1
        assert not results["y"][~sound].isfinite().all()
        for finite in (results["y"][sound], results["A[0]"], results["B[0]"]):
            assert finite.isfinite().all()

    @pytest.mark.parametrize("case", SHORT.values(), ids=SHORT)
    def test_the_short_way_gives_the_bits_of_the_op(self, case: Case) -> None:
        """Past torch's dispatcher, with the node in C++ where the backend has it."""
        i = on_device(case.inputs())
        for t in (i.x, i.weight, *i.A, *i.B, *i.c):
            t.requires_grad_()
        learned = [i.x, i.weight, *i.A, *i.B, *i.c]
        y, _, _ = ops.lora_linear(*i.call().flat(), self.name)
        short = ops.call_lora_linear(i.call(), self.name)
        assert torch.equal(short, y)
        pairs = zip(*(torch.autograd.grad(out, learned, i.dy) for out in (y, short)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)

    @one_at_a_time
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("which", ["x", "weight", "dy"])
    @pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
    def test_rows_may_be_further_apart_than_32_bits_count(self, which: str, dora: bool, dtype: torch.dtype) -> None:
        def results(i: LoraInputs) -> Results:
            there = on_device(i)
            return run(replace(there, **{which: in_layout(getattr(there, which), "far_apart")}), self.name)

        Expected.of(Case(M=70, K=40, N=66, dtype=dtype, dropout_p=0.3, dora=dora).inputs).assert_met_by(results)

    @one_at_a_time
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_result_may_have_rows_that_far_apart(self, kernels: Kernels, dtype: torch.dtype) -> None:
        with torch.device(DEVICE):
            base, u, B = torch.randn(70, 40, dtype=dtype), torch.randn(70, 4), torch.randn(40, 4)
        tail, near, far = Tail(u, B, 1.5), torch.empty_like(base), in_layout(base, "far_apart")
        kernels.lora_up(base, None, near, tail)
        kernels.lora_up(far, None, far, tail)
        assert torch.equal(far, near)

    @pytest.mark.parametrize("case", [Case(ranks=(8, 3), dropout_p=0.5, mixed=True), Case(M=300, dora=True)], ids=str)
    def test_the_same_call_twice_gives_the_same_bits(self, case: Case) -> None:
        inputs = case.inputs()
        first, second = self.results(inputs), self.results(inputs)
        assert all(torch.equal(first[name], second[name]) for name in first)


def over_4_bits(M: int, K: int, form: Form, dtype: torch.dtype, dora: bool = False, *, N: int = 66) -> LoraInputs:
    """Inputs with a 4-bit weight ``[N, K]``; the oracle's is what it decodes to."""
    made = make_inputs((M, K), N, (4,), dtype, torch.float32, dora=dora)
    packed = four_bit.quantize(made.weight, *form)
    return replace(made, weight=packed.dequantize(dtype), packed=packed)
