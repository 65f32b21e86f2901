"""Stacked experts by Triton's kernels: on a GPU where there is one, else interpreted, as in test_triton.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import triton_interpreter
from grouped_cases import (
    CASES,
    DTYPES,
    PEFTS,
    Case,
    Experts,
    assert_as_close_as_eager,
    assert_same_bits,
    plain,
    results,
)
from grouped_cases import fused as by_the_op
from oracle import DEVICE, Results, moved_to
from peft_experts import moe
from test_peft_experts import assert_parity
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from fastpeft import dispatch, ops
from fastpeft.backends.cpu import CpuBackend
from fastpeft.backends.gpu import triton as backend
from fastpeft.call import GroupedBackwardCall, Kept, Needs, Weight
from fastpeft.dispatch import BackendRefusal
from fastpeft.dropout import dropout_keep
from fastpeft.four_bit import quantize
from fastpeft.peft import experts

CASES = [
    *CASES,
    Case(counts=(3, 0, 33), K=24, N=40, ranks=(70, 3), dropout_p=0.3),  # more ranks than a program holds
    Case(counts=(0,) * 17 + (2, 0, 1) + (0,) * 20, K=40, N=24, ranks=(4,)),
]
SHORT = {"peft": PEFTS, "empty": Case(counts=(0, 0)), "tiles": Case(counts=(7, 150, 0, 33), dropout_p=0.5, K=40, N=136)}
short = pytest.mark.parametrize("case", SHORT.values(), ids=SHORT)
without_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the backend takes calls on CPU tensors."""
    if DEVICE == "cpu":
        triton_interpreter.use(monkeypatch)


def there(i: Experts) -> Experts:
    """Where the backend runs."""
    return replace(i, **{name: moved_to(DEVICE, value) for name, value in vars(i).items()})


def fused(i: Experts) -> Results:
    return {name: result.cpu() for name, result in by_the_op(there(i), "triton").items()}


def eagers(i: Experts) -> Iterable[Results]:
    """PEFT's way on the CPU, and on the GPU where there is one."""
    for made in [i] if DEVICE == "cpu" else [i, there(i)]:
        yield {name: result.cpu() for name, result in results(plain, made).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_every_gradient_are_as_close_as_eager(case: Case, dtype: torch.dtype) -> None:
    assert_as_close_as_eager(case, dtype, fused, eagers=eagers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stack_in_float32_is_rounded_tile_by_tile(dtype: torch.dtype) -> None:
    """As under autocast, which casts x and leaves the stack alone; the bits are those of a stack that was cast."""
    i = replace(PEFTS, dropout_p=0.0).make(dtype)
    wide = replace(i, weight=i.weight.float())
    found, expected = (
        results(lambda i: ops.lora_grouped_linear(*i.call().flat(), "triton")[0], there(each), "x", "A[0]", "B[1]")
        for each in (wide, i)
    )
    assert_same_bits(found, expected)


def test_the_mask_is_the_references_in_each_product() -> None:
    """Of ones, each result shows the mask by its zeros: u where A is the identity, dA of experts with one row each, dx
    where W is zero."""
    E, K, p = 9, 24, 0.3
    i = Case(counts=(1,) * E, K=K, N=8, ranks=(K,), dropout_p=p, bias=False).make()
    identity = replace(i, x=torch.ones(E, K), A=[torch.eye(K).expand(E, K, K)])
    ones = replace(identity, weight=torch.zeros(E, 8, K), A=[torch.ones(E, K, K)], B=[torch.ones(E, 8, K)])
    ones = replace(ones, dy=torch.ones(E, 8))
    assert i.seed is not None
    keep = dropout_keep(i.seed[0], E, K, p)
    _, u, _ = ops.lora_grouped_linear(*there(identity).call().flat(), "triton")
    assert torch.equal(u.cpu(), keep.float())
    grads = fused(ones)
    assert torch.equal(grads["x"] != 0, keep)
    assert torch.equal(grads["A[0]"][:, 0] != 0, keep)


def test_each_adapter_has_the_mask_of_its_own() -> None:
    """Rows of tiles that begin anywhere, over experts with no rows."""
    K = 40
    i = Case(counts=(37, 0, 70, 1, 90), K=K, N=K, ranks=(K, K), dropout_p=0.5, bias=False).make()
    i = replace(i, x=torch.ones_like(i.x), A=[torch.eye(K).expand(5, K, K)] * 2)
    assert i.seed is not None
    _, u, _ = ops.lora_grouped_linear(*there(i).call().flat(), "triton")
    masks = [dropout_keep(seed, len(i.x), K, 0.5).float() for seed in i.seed]
    assert torch.equal(u.cpu(), torch.cat(masks, 1)) and not torch.equal(*masks)


@short
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_twice_and_both_ways_give_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    i = case.make(dtype)
    expected = fused(i)
    assert_same_bits(fused(i), expected)
    short_way = results(lambda i: ops.call_lora_grouped_linear(i.call(), "triton"), there(i))
    assert_same_bits({name: result.cpu() for name, result in short_way.items()}, expected)


@without_gpu
@short
def test_no_two_programs_write_to_one_place(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    i = case.make()
    forwards = fused(i)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", triton_interpreter.set_program_backwards)
    assert_same_bits(fused(i), forwards)


@pytest.mark.parametrize("programs", [1, 64])
def test_the_inputs_are_shared_out_where_programs_are_few(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "multiprocessors", lambda device: programs)
    assert_as_close_as_eager(Case(counts=(3, 0, 2), K=300, N=280, dropout_p=0.5), torch.float32, fused, eagers=eagers)


def test_gradients_have_the_layout_of_their_parameters_and_zeros_where_no_row_went() -> None:
    i = replace(PEFTS, transposed=True).make()
    grads = fused(i)
    for name, tensor in i.differentiable().items():
        assert grads[name].stride() == tensor.stride(), name
        if tensor.dim() == 3:
            assert not grads[name][2].any() and grads[name][3].any(), name


def test_strides_of_operands_change_nothing() -> None:
    """An expanded gradient, as that of a sum, and weights without contiguous rows or columns among them."""
    made = replace(PEFTS, bias=False).make()
    made = replace(made, dy=torch.ones(()).expand_as(made.dy))

    def apart(t: Tensor) -> Tensor:
        return torch.stack((t, torch.full_like(t, -1)), dim=-1)[..., 0]

    A, B = ([apart(t) for t in some] for some in (made.A, made.B))
    x, weight, offsets = made.x.t().contiguous().t(), apart(made.weight), apart(made.offsets)
    strided = replace(made, x=x, weight=weight, A=A, B=B, offsets=offsets)
    contiguous = replace(made, B=[b.contiguous() for b in made.B], dy=made.dy.contiguous())
    assert_same_bits(fused(strided), fused(contiguous))
    assert_same_bits(fused(made), fused(contiguous))


def test_lazily_negated_operands_are_resolved() -> None:
    i = replace(PEFTS, ranks=(8,)).make()

    def negated(t: Tensor) -> Tensor:
        return torch._neg_view(-t)

    lazily = replace(i, x=negated(i.x), weight=negated(i.weight), A=[negated(i.A[0])], dy=negated(i.dy))
    assert_same_bits(fused(lazily), fused(i))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_with_its_row(dtype: torch.dtype) -> None:
    i = Case(counts=(3, 40, 2)).make(dtype)
    x = i.x.clone()
    x[3, 5] = torch.nan
    expected, actual = fused(i), fused(replace(i, x=x))
    others = torch.arange(len(x)) != 3
    assert not actual["y"][3].isfinite().any()
    assert torch.equal(actual["y"][others], expected["y"][others])
    for name in ("A[0]", "B[0]"):
        assert torch.equal(actual[name][::2], expected[name][::2]), name


def test_only_what_is_asked_for_is_computed() -> None:
    i = there(PEFTS.make())
    x, offsets, weight, _, adapters, _ = i.call()
    _, u, _ = ops.lora_grouped_linear(*i.call().flat(), "triton")

    def gradients(needs: list[bool]) -> list[Tensor]:
        wanted = Needs.of(needs, 2)
        call = GroupedBackwardCall(
            i.dy,
            x if wanted.weight or any(wanted.A) else None,
            offsets,
            weight,
            adapters,
            Kept(u if any(wanted.B) else None, []),
            wanted,
        )
        return ops.lora_grouped_linear_backward(*call.flat(), "triton")

    every = gradients([True] * 7)
    for n in range(7):
        (one,) = gradients([k == n for k in range(7)])
        assert torch.equal(one, every[n])


@pytest.mark.parametrize("offsets", [[0, 5, 900, 9], [-7, 3, 9, 12], [9, 5, 3, 0]])
def test_whatever_the_offsets_hold_no_row_is_read_or_written_beyond_those_there_are(offsets: list[int]) -> None:
    """A GPU is not asked what they hold; here the tensors' neighbours are looked at."""
    i = there(Case(counts=(3, 4, 2), bias=False).make())
    around = torch.full((3, *i.x.shape), torch.nan, device=DEVICE)
    around[1] = i.x
    y, A = torch.zeros(3, 9, i.weight.shape[1], device=DEVICE), torch.zeros_like(i.A[0])
    wrong, kernels = torch.tensor(offsets, device=DEVICE), backend.kernels()
    tail = backend.GroupedTail([torch.ones(9, 8, device=DEVICE)], i.B, [1.0], [backend.Mask(0, 1.0, None)])
    kernels.lora_grouped_linear(around[1], wrong, i.weight, y[1], tail)
    sums = backend.GroupedSums(torch.ones(9, 8, device=DEVICE), around[1], 1.0, backend.Mask(0, 1.0, None))
    kernels.lora_grouped_gradient(sums, wrong, A)
    assert not y[::2].any() and y.isfinite().all() and A.isfinite().all()


@without_gpu
def test_what_it_takes_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    i = PEFTS.make()

    def reason(x: Tensor, weight: Tensor) -> str | None:
        return dispatch.named("triton").refuses(x, weight, [*i.A, *i.B])

    for dtype in DTYPES:
        assert reason(i.x.to(dtype), i.weight.to(dtype)) is None
    assert reason(i.x, i.weight[..., ::2]) is None
    assert "x is torch.float64" in str(reason(i.x.double(), i.weight.double()))
    packed = Weight.of(quantize(torch.randn(6, 64))).data
    assert reason(i.x, packed) == "it has no kernels for experts in 4 bits"
    factors = [*i.A, *i.B, torch.ones(5, 63)]
    assert dispatch.named("triton").refuses(i.x, i.weight, factors) == "its kernels for experts compute no DoRA"
    dora = i.call()
    dora = dora._replace(adapters=dora.adapters._replace(c=[torch.ones(5, 63)] * 2))
    with pytest.raises(BackendRefusal, match="compute no DoRA"):
        ops.call_lora_grouped_linear(dora, "triton")


@without_gpu
def test_pefts_experts_are_fused_where_the_vendor_has_no_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in float32 on a GPU; bfloat16 would be the backend cuda's."""
    monkeypatch.setattr(experts, "_is_waited_for", lambda weight: True)
    monkeypatch.setattr(CpuBackend, "refuses", lambda self, *operands: "it is no GPU")
    assert_parity(moe("GptOss", target_modules=[]), monkeypatch)
