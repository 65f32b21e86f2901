"""The combinations of shapes, ranks, dtypes and layouts that every backend is tested with."""

from __future__ import annotations

import functools
import itertools
import mmap
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracle import Expected, LoraInputs, make_inputs
from torch import Tensor

_SIZES = (1, 3, 63, 100, 257)
_MAP_NORESERVE = 0x4000  # Linux's; Python names it from 3.13 on


@dataclass(frozen=True)
class Case:
    """One call of the op; :meth:`inputs` draws its tensors."""

    M: int = 63
    K: int = 100
    N: int = 63
    ranks: tuple[int, ...] = (8,)
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0
    bias: bool = True
    mixed: bool = False
    dora: bool = False
    alone: bool = False
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    dy_layout: str = "contiguous"

    def inputs(self) -> LoraInputs:
        """Fresh tensors from torch's default generator, in the layouts asked for."""
        made = make_inputs(
            (self.M, self.K),
            self.N,
            self.ranks,
            self.dtype,
            self.adapter_dtype,
            bias=self.bias,
            dropout_p=[self.dropout_p / (i + 1) for i in range(len(self.ranks))],
            mixed=self.mixed,
            dora=self.dora,
        )
        x = in_layout(made.x, self.x_layout)
        leading = x.shape[:-1]
        index = None if made.adapter_index is None else made.adapter_index.reshape(leading)
        dy = in_layout(made.dy, self.dy_layout).reshape(*leading, self.N)
        weight = torch.zeros_like(made.weight) if self.alone else in_layout(made.weight, self.weight_layout)
        return replace(made, x=x, weight=weight, dy=dy, adapter_index=index, alone=self.alone)

    def __str__(self) -> str:
        names = [f"{self.M}x{self.K}x{self.N}", f"r{'+'.join(map(str, self.ranks))}"]
        names += [str(self.dtype).removeprefix("torch."), str(self.adapter_dtype).removeprefix("torch.")]
        names += (
            [f"p{self.dropout_p}"] * (self.dropout_p > 0)
            + ["bias"] * self.bias
            + ["mixed"] * self.mixed
            + ["dora"] * self.dora
            + ["alone"] * self.alone
        )
        layouts = {"x": self.x_layout, "weight": self.weight_layout, "dy": self.dy_layout}
        names += [f"{name}:{layout}" for name, layout in layouts.items() if layout != "contiguous"]
        return "-".join(names)


@functools.cache
def expected(case: Case) -> Expected:
    """Inputs and results that every backend is judged by."""
    torch.manual_seed(0)
    return Expected.of(case.inputs)


def in_layout(matrix: Tensor, layout: str) -> Tensor:
    """``matrix [rows, columns]`` with other strides or leading dimensions; ``expanded`` repeats the first row."""
    rows, columns = matrix.shape
    match layout:
        case "contiguous":
            return matrix
        case "transposed":
            return matrix.t().contiguous().t()
        case "row_stride":
            return torch.nn.functional.pad(matrix, (2, 3), value=torch.nan)[:, 2 : 2 + columns]
        case "far_apart":
            return far_apart(matrix)
        case "column_stride":
            return torch.stack((matrix, torch.full_like(matrix, torch.nan)), dim=-1)[..., 0]
        case "expanded":
            return matrix[:1].expand(rows, columns)
        case "3d":
            return matrix.view(*_factors(rows), columns)
        case "4d_permuted":
            return matrix.view(*_factors(rows), 1, columns).transpose(0, 1)
    raise ValueError(layout)


def far_apart(matrix: Tensor) -> Tensor:
    """The same rows, the last of which starts 2³¹ elements behind the first; on a CPU only their pages take memory."""
    rows, columns = matrix.shape
    stride = -(-(2**31) // (rows - 1) // 64) * 64
    count = (rows - 1) * stride + columns
    if matrix.is_cuda:
        memory = torch.empty(count, dtype=matrix.dtype, device=matrix.device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, count * matrix.element_size(), flags), dtype=matrix.dtype)
    return memory.as_strided((rows, columns), (stride, 1)).copy_(matrix)


def _factors(rows: int) -> tuple[int, int]:
    first = next((d for d in range(2, rows) if rows % d == 0), 1)
    return first, rows // first


def covering(factors: Mapping[str, Sequence[Any]], seed: int = 0, candidates: int = 40) -> list[dict[str, Any]]:
    """Few combinations in which every pair of values of any two factors occurs (greedy, the same for the same seed)."""
    rng = random.Random(seed)
    pairs = {
        frozenset(((f, a), (g, b)))
        for f, g in itertools.combinations(factors, 2)
        for a, b in itertools.product(factors[f], factors[g])
    }
    chosen = []
    while pairs:
        start = dict(min(pairs, key=lambda pair: sorted(map(str, pair))))
        options = [{f: start.get(f, rng.choice(values)) for f, values in factors.items()} for _ in range(candidates)]
        news = [{frozenset(pair) for pair in itertools.combinations(option.items(), 2)} & pairs for option in options]
        best = max(range(candidates), key=lambda i: len(news[i]))
        chosen.append(options[best])
        pairs -= news[best]
    return chosen


_MATRIX = covering(
    {
        "M": _SIZES,
        "K": _SIZES,
        "N": _SIZES,
        "ranks": ((1,), (3,), (8,), (16,), (17,), (64,), (8, 3)),
        "dtypes": (
            (torch.float32, torch.float32),
            (torch.float16, torch.float16),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
        ),
        "dropout_p": (0.0, 0.1, 0.5),
        "bias": (True, False),
        "method": ("lora", "mixed batch", "dora"),
        "x_layout": ("contiguous", "transposed", "row_stride", "column_stride", "3d", "4d_permuted"),
        "weight_layout": ("contiguous", "transposed", "row_stride"),
        "dy_layout": ("contiguous", "transposed"),
    }
)
_EDGES = [
    {"M": 0},
    {"M": 0, "K": 5, "N": 4},
    {"M": 0, "ranks": (8, 3), "dropout_p": 0.1, "bias": False},
    {"M": 2000, "K": 3, "N": 5, "dropout_p": 0.1},
    {"M": 3, "K": 2000, "N": 5, "dropout_p": 0.1},
    {"M": 3, "K": 5, "N": 2000, "dropout_p": 0.1},
    {"ranks": (1, 17, 16), "dropout_p": 0.5},
    {"ranks": (1, 17, 16), "dropout_p": 0.5, "mixed": True},
    {"x_layout": "expanded", "ranks": (64,), "dropout_p": 0.1},
    {"dy_layout": "expanded", "ranks": (64,), "dropout_p": 0.1},
    {"M": 1, "K": 1, "N": 1, "ranks": (1,)},
    {"M": 300, "K": 130, "N": 270, "ranks": (16,), "dropout_p": 0.1},
    {"M": 0, "ranks": (8, 3), "dropout_p": 0.1, "dora": True},
    {"M": 1, "dora": True},
    {"M": 4, "ranks": (1,), "dropout_p": 0.5, "dora": True},
    {"ranks": (1, 17, 16), "dora": True},
    {"ranks": (1, 17, 16), "dropout_p": 0.5, "dora": True},
    {"M": 300, "K": 130, "N": 270, "ranks": (16,), "dora": True},
    {"M": 300, "K": 130, "N": 270, "ranks": (16,), "dropout_p": 0.1, "dora": True},
]
_COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Adapters narrower than the base, or in the other half precision; few tokens and many.
_NARROW = [
    Case(M=M, K=K, N=66, dtype=dtype, adapter_dtype=adapter_dtype, dora=dora)
    for dtype, adapter_dtype in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    )
    for M, K, dora in ((1, 128, False), (4, 33, True), (70, 33, False))
]
# Without a product with W.
_ALONE = [
    {},
    {"M": 0, "bias": False},
    {"M": 1, "K": 192, "N": 130},
    {"M": 300, "K": 130, "N": 270, "ranks": (16,), "dropout_p": 0.1},
    {"ranks": (1, 17, 16), "dropout_p": 0.5, "mixed": True, "bias": False},
    {"ranks": (8, 3), "x_layout": "4d_permuted", "dy_layout": "transposed"},
    {"ranks": (70,), "adapter_dtype": torch.float32, "x_layout": "row_stride"},
]

CASES = [
    Case(
        **{k: v for k, v in row.items() if k not in ("dtypes", "method")},
        dtype=row["dtypes"][0],
        adapter_dtype=row["dtypes"][1],
        mixed=row["method"] == "mixed batch",
        dora=row["method"] == "dora",
    )
    for row in _MATRIX
] + [Case(**edge, dtype=dtype) for edge in _EDGES for dtype in _COMPUTE_DTYPES]
CASES += _NARROW
CASES += [
    Case(**{"adapter_dtype": dtype} | case, dtype=dtype, alone=True) for case in _ALONE for dtype in _COMPUTE_DTYPES
]
