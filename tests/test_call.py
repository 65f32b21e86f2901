"""The nouns of a call: torch's flat schema has their fields in their order, and nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import torch

from fastpeft import four_bit, ops
from fastpeft.call import (
    Adapters,
    BackwardCall,
    ForwardCall,
    GroupedBackwardCall,
    GroupedCall,
    Kept,
    Needs,
    NormCall,
    Weight,
)

WEIGHT = ["weight", *Weight._fields[1:]]  # the schema calls its data by its name
ADAPTERS = list(Adapters._fields)


def names(op: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


def made() -> tuple[Weight, Adapters]:
    weight = four_bit.quantize(torch.randn(6, 64))
    adapters = Adapters(
        [torch.randn(3, 64), torch.randn(2, 64)],
        [torch.randn(6, 3), torch.randn(6, 2)],
        [torch.rand(6), torch.rand(6)],
        [1.0, 2.0],
        [0.1, 0.2],
        torch.tensor([5, 6]),
        torch.zeros(4, dtype=torch.int64),
    )
    return Weight.of(weight), adapters


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_the_schemas_are_the_fields_of_the_nouns() -> None:
    assert names(ops.lora_linear) == ["x", *WEIGHT, "bias", *ADAPTERS, "keep_z", "backend"]
    backward = ["dy", "x", *WEIGHT, *ADAPTERS, *Kept._fields, "needs", "backend"]
    assert names(ops.lora_linear_backward) == backward
    assert names(ops.lora_grouped_linear) == ["x", "offsets", *WEIGHT, "bias", *ADAPTERS, "keep_z", "backend"]
    grouped_backward = ["dy", "x", "offsets", *WEIGHT, *ADAPTERS, *Kept._fields, "needs", "backend"]
    assert names(ops.lora_grouped_linear_backward) == grouped_backward
    assert names(ops.dora_norm) == [*WEIGHT, "A", "B", "scaling", "dtype", "backend"]


def test_a_call_comes_back_from_its_flat_list() -> None:
    weight, adapters = made()
    forward = ForwardCall(torch.randn(4, 64), weight, torch.randn(6), adapters, True)
    assert len(forward.flat()) == len(names(ops.lora_linear)) - 1
    assert same(ForwardCall.of(forward.flat()), forward)
    needs = Needs(True, False, True, [True, False], [False, True], [True, True])
    backward = BackwardCall(torch.randn(4, 6), None, weight, adapters, Kept(None, [torch.randn(4, 6)]), needs)
    assert len(backward.flat()) == len(names(ops.lora_linear_backward)) - 1
    assert same(BackwardCall.of(backward.flat()), backward)
    offsets = torch.tensor([0, 4])
    grouped = GroupedCall(torch.randn(4, 64), offsets, weight, torch.randn(1, 6), adapters, True)
    assert len(grouped.flat()) == len(names(ops.lora_grouped_linear)) - 1
    assert same(GroupedCall.of(grouped.flat()), grouped)
    back = GroupedBackwardCall(torch.randn(4, 6), None, offsets, weight, adapters, Kept(torch.randn(4, 5), []), needs)
    assert len(back.flat()) == len(names(ops.lora_grouped_linear_backward)) - 1
    assert same(GroupedBackwardCall.of(back.flat()), back)
    norm = NormCall(weight, adapters.A[0], adapters.B[0], 2.0, torch.bfloat16)
    assert len(norm.flat()) == len(names(ops.dora_norm)) - 1
    assert same(NormCall.of(norm.flat()), norm)


def test_needs_and_shapes_by_name() -> None:
    weight, adapters = made()
    assert adapters.shape == (6, 64) and adapters.ranks == [3, 2]
    flat = [True, False, False, False, True, True, False, True, True]
    needs = Needs.of(flat, 2)
    assert needs == (True, False, False, [False, True], [True, False], [True, True])
    assert needs.flat == flat
    assert len(ForwardCall(torch.ones(1, 64), weight, None, adapters, False).differentiable) == 9
