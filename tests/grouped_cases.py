"""Calls of the op on experts stacked in one weight, and how its results are judged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from oracle import POOL, Results, assert_close_as_eager, worst
from torch import Tensor

from fastpeft import extension, ops
from fastpeft import functional as F
from fastpeft.call import Adapters, GroupedCall, Weight
from fastpeft.dropout import dropout_keep, dropout_scale, dropout_seeds

BACKENDS = ("reference", "cpu")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
linear = torch.nn.functional.linear
SLOWER = ("plain",) if extension.C is None else tuple(extension.C.isas()[1:])


@dataclass(frozen=True)
class Experts:
    """One call of the op, and ``dy`` that flows back."""

    FACTORS: ClassVar = "AB"
    x: Tensor
    offsets: Tensor
    weight: Tensor
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    dropout_p: list[float]
    seed: Tensor | None
    dy: Tensor

    @property
    def scaling(self) -> list[float]:
        """Another one each."""
        return [1.5, -0.625, 2.0][: len(self.A)]

    @property
    def given(self) -> Any:
        """What is passed as the weight."""
        return self.weight

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, in the order of the op's gradients."""
        named = {"x": self.x, "weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return named | {f"{s}[{i}]": t for s in self.FACTORS for i, t in enumerate(getattr(self, s))}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Experts:
        """The same with other tensors, by these names."""
        factors = {s: [tensors[f"{s}[{i}]"] for i in range(len(self.A))] for s in self.FACTORS}
        weight = tensors.get("weight", self.weight)
        return replace(self, x=tensors["x"], weight=weight, bias=tensors.get("bias"), **factors)

    def requiring(self, *names: str) -> tuple[Experts, dict[str, Tensor]]:
        """The same with leaves, of which these require a gradient, all where none is named; and the leaves."""
        leaves = {name: tensor.detach() for name, tensor in self.differentiable().items()}
        for name in names or leaves:
            leaves[name].requires_grad_()
        return self.with_tensors(leaves), leaves

    def call(self) -> GroupedCall:
        """The op's arguments but the backend."""
        adapters = Adapters(self.A, self.B, getattr(self, "c", []), self.scaling, self.dropout_p, self.seed)
        return GroupedCall(self.x, self.offsets, Weight.of(self.given), self.bias, adapters, True)

    def keep(self) -> list[Tensor | None]:
        """Each adapter's mask over all rows."""
        if self.seed is None:
            return [None] * len(self.A)
        return [
            dropout_keep(seed, *self.x.shape, p) if p else None
            for seed, p in zip(self.seed, self.dropout_p, strict=True)
        ]

    def to(self, dtype: torch.dtype) -> Experts:
        """In another dtype."""
        moved = self.with_tensors({name: t.to(dtype) for name, t in self.differentiable().items()})
        return replace(moved, weight=self.weight.to(dtype), dy=self.dy.to(dtype))


@dataclass(frozen=True)
class Case:
    """Experts with so many rows each, and what else is particular."""

    counts: tuple[int, ...] = (5, 0, 40, 1, 18)
    K: int = 65
    N: int = 63
    ranks: tuple[int, ...] = (8,)
    dropout_p: float = 0.0
    bias: bool = True
    wide_adapters: bool = False  # in float32, as PEFT keeps them
    transposed: bool = False  # the stack is [E, K, N] in memory
    as_peft: bool = False  # A and B are views of PEFT's lora_A [E r, K] and lora_B [N, r E]
    offsets: torch.dtype = torch.int64

    def make(self, dtype: torch.dtype = torch.float32) -> Experts:
        """Random ones, base and adapters of equal weight in ``y``."""
        E, T, K, N = len(self.counts), sum(self.counts), self.K, self.N
        adapter_dtype = torch.float32 if self.wide_adapters else dtype
        weight = (random(E, N, K) / math.sqrt(K)).to(dtype)
        A = [(random(E, r, K) / math.sqrt(K)).to(adapter_dtype) for r in self.ranks]
        B = [(random(E, N, r) / math.sqrt(r)).to(adapter_dtype) for r in self.ranks]
        if self.as_peft:
            B = [b.permute(1, 2, 0).contiguous().permute(2, 0, 1) for b in B]
        seeds = dropout_seeds(len(A), torch.device("cpu"))
        return Experts(
            x=random(T, K).to(dtype),
            offsets=torch.tensor([0, *itertools.accumulate(self.counts)], dtype=self.offsets),
            weight=weight.transpose(1, 2).contiguous().transpose(1, 2) if self.transposed else weight,
            bias=random(E, N).to(dtype) if self.bias else None,
            A=A,
            B=B,
            dropout_p=[self.dropout_p] * len(A),
            seed=seeds if self.dropout_p else None,
            dy=random(T, N).to(dtype),
        )


def random(*shape: int) -> Tensor:
    """Magnitudes within a factor of two, so that no single element decides how two errors compare."""
    return (torch.rand(shape) + 1) * (2.0 * torch.randint(2, shape) - 1)


CASES = [
    Case(),
    Case(counts=(70,)),
    Case(counts=(1,), K=1, N=1, ranks=(1,)),
    Case(counts=(0, 150, 0, 0), dropout_p=0.1, K=129, N=131),
    Case(counts=(0, 0, 0)),
    Case(counts=(0, 0), dropout_p=0.5, ranks=(8, 3)),
    Case(counts=(1, 1, 1, 0, 1, 1, 0, 2), K=64, N=96, ranks=(16,), as_peft=True),
    Case(counts=(3, 17, 0, 65, 33), dropout_p=0.5, ranks=(8, 3), as_peft=True, offsets=torch.int32),
    Case(counts=(2, 9, 1, 4), ranks=(1, 17, 16), bias=False, transposed=True),
    Case(counts=(31, 0, 2), K=257, N=100, ranks=(64,), wide_adapters=True, as_peft=True, dropout_p=0.1),
    Case(counts=(7, 540, 130, 0, 5), K=130, N=66, wide_adapters=True, transposed=True, dropout_p=0.5),
    Case(counts=(33, 2, 0, 66), K=256, N=192, ranks=(16,), wide_adapters=True, as_peft=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
PEFTS = CASES[7]


def plain(i: Experts) -> Tensor:
    """What PEFT's layer makes of each expert's rows."""
    outputs, keeps = [], i.keep()
    for e, (first, end) in enumerate(itertools.pairwise(i.offsets.tolist())):
        x = i.x[first:end]
        y = linear(x, i.weight[e], None if i.bias is None else i.bias[e])
        for A, B, s, p, keep in zip(i.A, i.B, i.scaling, i.dropout_p, keeps, strict=True):
            dropped = x if keep is None else x * keep[first:end] * dropout_scale(p)
            y = y + linear(linear(dropped, A[e].to(x.dtype)), B[e].to(x.dtype)) * s
        outputs.append(y.to(i.x.dtype))
    return torch.cat(outputs)


def results(function: Callable[[Experts], Tensor], inputs: Experts, *names: str) -> Results:
    """``y`` and the gradient of each tensor, of these where some are named."""
    i, leaves = inputs.requiring(*names)
    y = function(i)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), i.dy), strict=True))


def fused(i: Experts, backend: str | None, *names: str) -> Results:
    """By the op."""
    return results(lambda i: ops.lora_grouped_linear(*i.call().flat(), backend)[0], i, *names)


def by_functional(i: Experts, backend: str | None = None) -> Tensor:
    return F.lora_grouped_linear(
        i.x, i.offsets, i.given, i.bias, i.A, i.B, i.scaling, i.dropout_p, training=i.seed is not None, backend=backend
    )


def assert_same_bits(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def assert_as_close_as_eager(
    case: Case,
    dtype: torch.dtype,
    compute: Callable[[Any], Results],
    *names: str,
    plain: Callable[[Any], Tensor] = plain,
    eagers: Callable[[Any], Iterable[Results]] | None = None,
) -> None:
    """As ``plain`` is to itself in float64: ``y`` and every gradient, of these tensors where some are named. Of several
    ``eagers`` each element counts where it is worst."""
    i = case.make(dtype)
    tokens = len(i.x) * min(case.ranks)
    draws = math.ceil(POOL / min(tokens, *(t.numel() for t in i.differentiable().values()))) if tokens else 1
    inputs = [i, *(case.make(dtype) for _ in range(draws - 1))]
    truth = [results(plain, i.to(torch.float64), *names) for i in inputs]
    eager = [worst(t, eagers(i) if eagers else [results(plain, i, *names)]) for t, i in zip(truth, inputs, strict=True)]
    actual = [compute(i) for i in inputs]
    for name, like in eager[0].items():
        assert actual[0][name].dtype == like.dtype, name
        assert_close_as_eager(*([each[name] for each in some] for some in (actual, truth, eager)), name)
