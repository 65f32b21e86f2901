"""Experts in 4 bits: parity with plain PyTorch on what the bits stand for, what is made and kept, refusals."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from grouped_cases import (
    BACKENDS,
    CASES,
    DTYPES,
    PEFTS,
    SLOWER,
    Case,
    Experts,
    assert_as_close_as_eager,
    assert_same_bits,
    by_functional,
    every_backend,
    fused,
    plain,
    results,
)
from largest import Largest
from oracle import assert_close_as_eager
from torch import Tensor

from fastpeft import dispatch, extension, ops
from fastpeft import functional as F
from fastpeft.backends.gpu import compose
from fastpeft.backends.reference import ReferenceBackend
from fastpeft.call import GroupedBackwardCall, Kept, Needs
from fastpeft.four_bit import FourBit, quantize

FORMATS = [("nf4", 64, True), ("fp4", 32, False), ("nf4", 4096, False), ("fp4", 128, True)]


@dataclass(frozen=True)
class Packed(Experts):
    """``weight`` is what ``packed`` stands for in the dtype of ``x``."""

    packed: FourBit

    @property
    def given(self) -> FourBit:
        return self.packed

    def differentiable(self) -> dict[str, Tensor]:
        return {name: t for name, t in super().differentiable().items() if name != "weight"}


@dataclass(frozen=True)
class PackedCase(Case):
    """The same in 4 bits of a format; transposed, the bits are those of ``[E, K, N]``."""

    form: tuple[str, int, bool] = FORMATS[0]

    def make(self, dtype: torch.dtype = torch.float32) -> Packed:
        made = super().make(dtype)
        packed = quantize(made.weight.mT, *self.form).mT if self.transposed else quantize(made.weight, *self.form)
        return Packed(**vars(replace(made, weight=packed.dequantize(dtype))), packed=packed)

    @classmethod
    def of(cls, case: Case, form: tuple[str, int, bool] = FORMATS[0]) -> PackedCase:
        return cls(**vars(case), form=form)


# Experts that begin within a byte and within a block, and whole groups of 64.
ODD, WHOLE = PackedCase.of(PEFTS), PackedCase.of(CASES[11])
PACKED = [PackedCase.of(case, form) for case, form in zip(CASES, itertools.cycle(FORMATS), strict=False)]
PACKED += [PackedCase.of(case, form) for case in (PEFTS, CASES[11]) for form in FORMATS]
PACKED += [replace(case, transposed=True) for case in (ODD, WHOLE)]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_as_close_as_eager(backend: str, case: PackedCase, dtype: torch.dtype) -> None:
    assert_as_close_as_eager(case, dtype, lambda i: fused(i, backend))


@pytest.mark.parametrize("isa", SLOWER)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [ODD, WHOLE, replace(ODD, transposed=True)], ids=["odd", "whole", "transposed"])
def test_every_instruction_set_is_as_close_as_eager(isa: str, case: PackedCase, dtype: torch.dtype) -> None:
    extension.built().set_isa(isa)
    try:
        assert_as_close_as_eager(case, dtype, lambda i: fused(i, "cpu"))
    finally:
        extension.built().set_isa("auto")


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("sizes", [(63, 65), (128, 192), (1, 3)], ids=str)
def test_unit_inputs_give_the_stack_bit_by_bit(
    backend: str, sizes: tuple[int, int], form: tuple[str, int, bool], transposed: bool, dtype: torch.dtype
) -> None:
    """Each row of each expert, forward and backward: blocks and bytes go on across rows and experts."""
    (N, K), E = sizes, 3
    case = PackedCase(counts=(K,) * E, K=K, N=N, bias=False, transposed=transposed, form=form)
    made = case.make(dtype)
    zeros = [torch.zeros_like(b) for b in made.B]
    y = fused(replace(made, x=torch.eye(K, dtype=dtype).repeat(E, 1), B=zeros), backend)["y"]
    assert torch.equal(y.view(E, K, N).mT, made.packed.dequantize(dtype))
    made = replace(replace(case, counts=(N,) * E).make(dtype), packed=made.packed)
    dx = fused(replace(made, dy=torch.eye(N, dtype=dtype).repeat(E, 1), B=zeros), backend)["x"]
    assert torch.equal(dx.view(E, N, K), made.packed.dequantize(dtype))


@every_backend
def test_an_expert_without_rows_is_not_looked_at(backend: str) -> None:
    made = replace(ODD, form=("nf4", 32, False)).make()
    expected = fused(made, backend)
    absmax, size = made.packed.absmax.clone(), made.weight[0].numel()
    absmax[2 * size // 32 + 1 : 3 * size // 32] = torch.nan  # of the third, which has none
    assert_same_bits(fused(replace(made, packed=replace(made.packed, absmax=absmax)), backend), expected)


@pytest.mark.parametrize(
    ("backend", "case"), [("reference", ODD), ("cpu", replace(ODD, transposed=True))], ids=BACKENDS
)
def test_opcheck(backend: str, case: PackedCase) -> None:
    i, _ = case.make().requiring()
    torch.library.opcheck(ops.lora_grouped_linear, (*i.call().flat(), backend))
    i = case.make()
    _, u, z = ops.lora_grouped_linear(*i.call().flat(), backend)
    call, needs = i.call(), Needs.of([True, False, *[True] * 5], 2)
    backward = GroupedBackwardCall(i.dy, i.x, call.offsets, call.weight, call.adapters, Kept(u, z), needs)
    torch.library.opcheck(ops.lora_grouped_linear_backward, (*backward.flat(), backend))


@every_backend
def test_what_is_kept_is_the_bits_themselves(backend: str) -> None:
    i, _ = ODD.make().requiring("x", "A[0]", "B[0]")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.call_lora_grouped_linear(i.call(), backend)
    held = (i.packed.packed, *i.packed.quant, *i.A, *i.B, i.offsets, i.x)
    beside = [tuple(t.shape) for t in kept if t.data_ptr() not in {t.data_ptr() for t in held}]
    assert sorted(beside) == [(2,), (len(i.x), 11)]  # the seeds and u
    assert i.packed.packed.data_ptr() in {t.data_ptr() for t in kept}


def test_no_dense_expert_is_made_and_no_dense_stack_by_the_reference() -> None:
    N = K = 1024
    i, leaves = PackedCase(counts=(9, 0, 3, 4), K=K, N=N, bias=False).make(torch.bfloat16).requiring()
    with torch.profiler.profile(profile_memory=True) as profile:
        by_functional(i, "cpu").backward(i.dy)
    sizes = [event.cpu_memory_usage for event in profile.events()]
    assert leaves["x"].grad is not None and 0 < max(sizes) < N * K
    call, needs = i.call(), Needs.of([True, False, False, True, True], 1)
    with Largest() as largest, torch.no_grad():
        _, u, z = ReferenceBackend().lora_grouped_linear(*call)
        kept = Kept(u, z)
        ReferenceBackend().lora_grouped_linear_backward(i.dy, i.x, i.offsets, call.weight, call.adapters, kept, needs)
    assert 0 < largest.elements <= N * K


def test_compiled_without_a_break() -> None:
    i = replace(ODD, dropout_p=0.0).make()
    compiled = torch.compile(by_functional, fullgraph=True, backend="aot_eager")
    actual, truth, eager = results(compiled, i), results(plain, i.to(torch.float64)), results(plain, i)
    for name, tensor in actual.items():
        assert_close_as_eager(tensor, truth[name], eager[name], name)


def test_under_autocast_and_in_float64() -> None:
    i = WHOLE.make()
    with torch.autocast("cpu", torch.bfloat16):
        y = by_functional(i)
    narrow = replace(i, weight=i.packed.dequantize(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert_close_as_eager(y, plain(narrow.to(torch.float64)), plain(narrow.to(torch.bfloat16)))
    wide = i.to(torch.float64)
    assert by_functional(wide).dtype == torch.float64
    torch.testing.assert_close(by_functional(wide), plain(wide))


def test_functions_of_torchs_that_ask_for_other_derivatives_get_the_references() -> None:
    i = PackedCase(counts=(3, 0, 2), K=6, N=5, ranks=(2,)).make().to(torch.float64)

    def of(function: Any) -> Any:
        return lambda x: function(replace(i, x=x)).cos().sum()

    torch.testing.assert_close(torch.func.hessian(of(by_functional))(i.x), torch.func.hessian(of(plain))(i.x))


def test_a_batch_of_gradients() -> None:
    i, leaves = ODD.make().requiring("x")
    y = ops.call_lora_grouped_linear(i.call(), "cpu")
    dys = torch.stack([i.dy, i.dy.cos()])
    (batched,) = torch.autograd.grad(y, leaves["x"], dys, retain_graph=True, is_grads_batched=True)
    for dy, one in zip(dys, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, leaves["x"], dy, retain_graph=True)[0], one)


def test_a_gpu_leaves_them_to_the_reference() -> None:
    i = WHOLE.make(torch.bfloat16)
    data, factors = i.call().weight.data, [*i.A, *i.B]
    assert compose.refusal(i.x, data, factors) == "it has no kernels for experts in 4 bits"
    assert dispatch.refusals(i.x, data, factors)["cpu"] is None


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [ODD, WHOLE, replace(ODD, transposed=True)], ids=["odd", "whole", "transposed"])
def test_dora_is_that_of_what_the_bits_stand_for(backend: str, case: PackedCase, dtype: torch.dtype) -> None:
    i = case.make(dtype)
    magnitude = [1 + torch.rand(i.weight.shape[:2]) for _ in i.A]
    operands = i.A, i.B, magnitude, i.scaling
    settings = {"dropout_p": i.dropout_p, "backend": backend}
    found, dense = [], i.packed.dequantize(dtype)
    for weight in (i.packed, dense):
        torch.manual_seed(3)
        found.append(F.dora_grouped_linear(i.x, i.offsets, weight, i.bias, *operands, **settings))
    torch.manual_seed(3)
    wide = F.dora_grouped_linear(
        *(t if t is None or t.dtype == i.offsets.dtype else t.double() for t in (i.x, i.offsets, dense, i.bias)),
        *operands,
        **settings | {"backend": "reference"},
    )
    assert_close_as_eager(found[0], wide, found[1])
    for A, B, s in zip(i.A, i.B, i.scaling, strict=True):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):  # bits have no dtype of their own
            norm = F.dora_grouped_norm(i.packed, A, B, s, backend)
        assert torch.equal(norm, F.dora_grouped_norm(dense, A, B, s, backend))


def stack(*shape: int) -> FourBit:
    return quantize(torch.randn(shape))


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "a matrix": ({"weight": stack(5, 6)}, r"weight must have shape \[E, N, K\], got \[5, 6\]"),
    "none": ({"weight": stack(0, 5, 6), "bias": None}, "weight holds no expert"),
    "experts": ({"weight": stack(2, 5, 6)}, r"bias must have shape \[E=2, N=5\]"),
    "experts of A": ({"weight": stack(2, 5, 6), "bias": None}, r"A must have shape \[E=2, r, K=6\]"),
    "the other way": ({"weight": stack(3, 5, 6).mT}, r"x must have shape \[..., K=5\]"),
    "offsets": ({"offsets": torch.tensor([0, 3, 8])}, r"offsets must have shape \[E \+ 1 = 4\]"),
    "falling": ({"offsets": torch.tensor([0, 5, 3, 8])}, "offsets must ascend"),
    "x": ({"x": torch.ones(8, 7)}, "x must have shape"),
}


@pytest.mark.parametrize(("given", "words"), REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {
        "x": torch.ones(8, 6),
        "offsets": torch.tensor([0, 3, 5, 8]),
        "weight": stack(3, 5, 6),
        "bias": torch.ones(3, 5),
        "A": torch.ones(3, 2, 6),
        "B": torch.ones(3, 5, 2),
        "scaling": 1.0,
    }
    F.lora_grouped_linear(**right)
    with pytest.raises(ValueError, match=words):
        F.lora_grouped_linear(**(right | given))


def test_a_stack_is_no_layers_weight() -> None:
    x, A, B = torch.ones(8, 6), torch.ones(2, 6), torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"weight must have shape \[N, K\], got \[3, 5, 6\]"):
        F.lora_linear(x, stack(3, 5, 6), None, A, B, 1.0)
    with pytest.raises(ValueError, match=r"weight must have shape \[N, K\], got \[3, 5, 6\]"):
        F.dora_norm(stack(3, 5, 6), A, B)


def test_bytes_that_are_missing_are_not_read() -> None:
    call = ODD.make().call()
    short = call.weight._replace(data=call.weight.data[:-1])
    with pytest.raises(RuntimeError, match=r"weight must hold .* elements of 4 bits, got"):
        ops.lora_grouped_linear(*call._replace(weight=short).flat(), "cpu")
