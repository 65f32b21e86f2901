"""Experts by the backend ``cuda``: by torch's grouped products, which its CPU has, too. No GPU has run these."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grouped_cases import PEFTS, Case, assert_as_close_as_eager, assert_same_bits, fused
from largest import Largest
from test_grouped_dora import DoraCase
from test_grouped_dora import plain as plain_dora
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_map_only

from fastpeft import dispatch
from fastpeft.backends.gpu import grouped
from fastpeft.backends.gpu.grouped import GroupedProducts
from fastpeft.backends.reference import ReferenceBackend
from fastpeft.call import Kept, Needs

BF16 = torch.bfloat16
CASES = [
    Case(K=64, N=48),
    Case(counts=(70,), K=8, N=16, ranks=(3,), bias=False),
    Case(counts=(0, 0, 0), K=16, N=16),
    Case(counts=(1, 1, 1, 0, 1, 1, 0, 2), K=64, N=96, ranks=(16,), as_peft=True, offsets=torch.int32),
    Case(counts=(3, 17, 0, 65, 33), K=64, N=48, dropout_p=0.5, ranks=(8, 3), as_peft=True),
    Case(counts=(31, 0, 2), K=256, N=104, ranks=(17,), wide_adapters=True, transposed=True, dropout_p=0.1),
]
DORA = [
    DoraCase(K=64, N=48),
    DoraCase(counts=(0, 0, 0), K=16, N=16),
    DoraCase(counts=(1, 40, 1, 0, 30, 1, 0, 20), K=64, N=96, ranks=(16,), as_peft=True, offsets=torch.int32),
    DoraCase(counts=(3, 17, 0, 65, 33), K=64, N=48, dropout_p=0.5, ranks=(8, 3), as_peft=True),
    DoraCase(counts=(31, 0, 72), K=256, N=104, ranks=(17,), wide_adapters=True, transposed=True, dropout_p=0.1),
    DoraCase(counts=(70, 40), K=64, N=48, ranks=(8, 3)),
]


@pytest.fixture(autouse=True)
def by_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the reference."""
    for name in ("lora_grouped_linear", "lora_grouped_linear_backward"):
        monkeypatch.setattr(ReferenceBackend, name, getattr(GroupedProducts, name))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_close_as_eager(case: Case) -> None:
    assert grouped.refusal(case.make(BF16).x, case.make(BF16).weight) is None
    assert_as_close_as_eager(case, BF16, lambda i: fused(i, "reference"))


@pytest.mark.parametrize("case", DORA, ids=str)
def test_dora_is_as_close_as_eager(case: DoraCase) -> None:
    assert_as_close_as_eager(case, BF16, lambda i: fused(i, "reference"), plain=plain_dora)


@pytest.mark.parametrize("kind", [Case, DoraCase])
def test_the_same_bits_in_the_parameters_layout_and_zeros_where_no_row_went(kind: type[Case]) -> None:
    i = kind(**vars(replace(PEFTS, K=64, N=48, transposed=True))).make(BF16)
    grads = fused(i, "reference")
    assert_same_bits(fused(i, "reference"), grads)
    for name, tensor in i.differentiable().items():
        assert grads[name].stride() == tensor.stride(), name
        if tensor.dim() == 3:
            assert not grads[name][2].any() and grads[name][3].any(), name


def test_operands_may_lie_anywhere() -> None:
    """An expanded gradient, as that of a sum, rows apart, columns contiguous."""
    i = Case(K=64, N=48).make(BF16)
    apart = torch.randn(64, 67).to(BF16)[:, 1:65]
    ones = replace(i, dy=torch.ones((), dtype=BF16).expand(64, 48))
    assert grouped.refusal(ones.dy, i.weight) is None and grouped.refusal(apart, i.weight) is None
    assert_same_bits(fused(ones, "reference"), fused(replace(i, dy=ones.dy.contiguous()), "reference"))
    for x in (apart, apart.t().contiguous().t()):
        assert_same_bits(fused(replace(i, x=x), "reference"), fused(replace(i, x=x.contiguous()), "reference"))


@pytest.mark.parametrize("kind", [Case, DoraCase])
def test_nothing_of_the_stacks_size_is_made(kind: type[Case]) -> None:
    i = kind(counts=(4, 0, 4, 2, 1, 0, 0, 1), K=64, N=48, bias=False).make(BF16)
    call, backend, needs = i.call(), ReferenceBackend(), Needs.of([True, False, False, True, True, True], 1)
    with Largest() as largest:
        _, u, z = backend.lora_grouped_linear(*call)
        backend.lora_grouped_linear_backward(i.dy, i.x, i.offsets, call.weight, call.adapters, Kept(u, z), needs)
    assert 0 < largest.elements < i.weight.numel()


@pytest.mark.parametrize("kind", [Case, DoraCase])
def test_nothing_asks_for_a_value(kind: type[Case]) -> None:
    i = kind(K=64, N=48, ranks=(8, 3)).make(BF16)
    needs, backend = Needs.of([True] * len(i.differentiable()), 2), ReferenceBackend()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        (x, offsets, weight, bias, adapters, keep_z), dy = tree_map_only(Tensor, mode.from_tensor, (i.call(), i.dy))
        with pytest.raises(DataDependentOutputException):
            offsets.tolist()
        y, u, z = backend.lora_grouped_linear(x, offsets, weight, bias, adapters, keep_z)
        grads = backend.lora_grouped_linear_backward(dy, x, offsets, weight, adapters, Kept(u, z), needs)
    assert y.shape == (64, 48) and u.shape == (64, 11)
    assert [g.shape for g in grads] == [t.shape for t in i.differentiable().values()]


def test_what_they_leave_to_others() -> None:
    i = Case(K=64, N=48).make(BF16)
    assert "in bfloat16" in str(grouped.refusal(i.x.float(), i.weight.float()))
    assert "multiples of 8" in str(grouped.refusal(i.x[:, :60], i.weight[:, :, :60]))
    assert "multiples of 8" in str(grouped.refusal(i.x, i.weight[:, :44]))
    assert "contiguous" in str(grouped.refusal(i.x, i.weight.repeat(1, 1, 2)[..., ::2]))
    found = dispatch.refusals(i.x, i.weight, [*i.A, *i.B])
    assert found["cpu"] is None and "NVIDIA" in str(found["cuda"])
