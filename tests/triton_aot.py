"""Compiles every Triton kernel ahead of time, with no GPU, and prints what became of it as JSON.

``python tests/triton_aot.py [architecture ...]``, with the Triton that is imported first. A call of each launcher on
tensors of a usual size is recorded, and what it would launch is compiled: the same types, constants and divisibilities
as at run time. The result maps ``kernel, variant, bf16, rank 16, sm_90`` to registers, bytes spilled, bytes of shared
memory, blocks that a multiprocessor holds, the matrix instruction, instructions that move 16 bytes or more to or from
global memory and those that move fewer; and to what ptxas warns of, if it does.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
import triton
from occupancy import WARP, blocks_a_multiprocessor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpeft import kernels
from fastpeft.backends.gpu.kernel_set import NO_MASK, DyOperands, GroupedSums, GroupedTail, Mask, Tail
from fastpeft.backends.gpu.triton import COPY_TILES, ROW_BLOCKS

ARCHITECTURES = (80, 90, 100)
PERFORMANCE_WARNING = r"\(C75\d\d\).*"  # of ptxas, such as that wgmma instructions wait for one another
GLOBAL = r"\b(?:(?:ld|st)\.global|cp\.async\.c[ag]\.shared\.global|cp\.async\.bulk\.tensor)\S*"
WIDE = r"\.v4\.[bfu]32$|\.v[248]\.[bfu]64$|\.v8\.[bfu]32$|^cp\.async\.(?:cg|bulk)"
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync")
M, K, N, E = 2048, 4096, 4096, 64
KINDS = (
    (torch.bfloat16, 16),
    (torch.bfloat16, 32),
    (torch.bfloat16, 64),
    (torch.float32, 16),
)  # dtype, ranks a program
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.uint8: "u8"}
ALIGNMENT = 16


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(dtype: torch.dtype, rank: int, architecture: int) -> dict[str, Callable[[], object]]:
    """A call of every launcher in each variant that differs in more than a flag of its epilogue."""
    f32, u8, i64 = torch.float32, torch.uint8, torch.int64
    x, y, weight = tensor(M, K, dtype=dtype), tensor(M, N, dtype=dtype), tensor(N, K, dtype=dtype)
    A, B, u = tensor(rank, K, dtype=f32), tensor(N, rank, dtype=f32), tensor(M, rank, dtype=f32)
    c, z, bias, seed = tensor(N, dtype=f32), tensor(M, N, dtype=dtype), tensor(N, dtype=dtype), tensor(dtype=i64)
    kind = rank, dtype == f32
    common = rank, "ieee"
    plain, masked = Tail(u, B, 2.0, bias=bias), Tail(u, A.t(), 1.0, 3277, seed)
    dora, dropped = Tail(u, B, 2.0, c=c, z=z), Tail(u, B, 2.0, 3277, seed, c, z)
    v_sums, dB, dc = tensor(32, M, rank, dtype=f32), tensor(4, N, rank, dtype=f32), tensor(4, N, dtype=f32)
    gradients, all_gradients = kernels.DyOutputs(v_sums, dB, None, None), kernels.DyOutputs(v_sums, dB, dc, y)
    u_sums, dA = tensor(4, M, rank, dtype=f32), tensor(4, rank, K, dtype=f32)
    nested = [tensor(16, dtype=f32), tensor(N * K // 64, dtype=u8), *(tensor(n, dtype=f32) for n in (256, 1024, 1))]
    packed = tensor(N * K // 2, dtype=u8)
    down = replace(kernels.lora_down_config(*kind), SPLIT_K=1024)
    up = kernels.lora_up_config(*kind)
    linear, masked_input = kernels.lora_linear_config(*kind, False), kernels.lora_linear_config(*kind, True)
    dy, scaled_dy, wide_dy, wide_scaled_dy = (
        replace(kernels.lora_dy_config(*kind, scaled, SLABS > 1), TILES=8, SLABS=SLABS)
        for SLABS in (1, 4)
        for scaled in (False, True)
    )
    by_x = replace(kernels.lora_dA_config(*kind), TILES=8)
    persistent = rank, 132, kernels.lora_linear_persistent_config(rank)
    norm = kernels.dora_norm_config(*kind)
    by_dy, by_scaled_dy = DyOperands(B, u, 2.0), DyOperands(B, u, 2.0, c=c, z=z)
    every = {
        "lora_down": lambda: kernels.lora_down(x, [A], [u_sums], [(0, None)], None, *common, down),
        "lora_down, dropout": lambda: kernels.lora_down(x, [A], [u_sums], [(3277, seed)], None, *common, down),
        "lora_down, three adapters": lambda: kernels.lora_down(
            x, [A] * 3, [u_sums] * 3, [(3277, seed), (0, seed), (3277, seed)], None, *common, down
        ),
        "lora_linear": lambda: kernels.lora_linear(x, weight, y, plain, 0.0, *common, linear),
        "lora_linear, dx with dropout": lambda: kernels.lora_linear(y, weight.t(), x, masked, 0.0, *common, linear),
        "lora_linear, dora": lambda: kernels.lora_linear(x, weight, y, dora, 0.0, *common, linear),
        "lora_linear, dora with dropout": lambda: kernels.lora_linear(
            x, weight, y, dropped, 1.05, *common, masked_input
        ),
        "lora_up": lambda: kernels.lora_up(y, None, y, plain, *common, up),
        "lora_up, dx with dropout": lambda: kernels.lora_up(x, None, x, masked, *common, up),
        "lora_up, dora with dropout": lambda: kernels.lora_up(y, z, y, dora, *common, up),
        "lora_dy": lambda: kernels.lora_dy(y, by_dy, gradients, *common, dy),
        "lora_dy, dora": lambda: kernels.lora_dy(y, by_scaled_dy, all_gradients, *common, scaled_dy),
        "lora_dy, four slabs": lambda: kernels.lora_dy(y, by_dy, gradients, *common, wide_dy),
        "lora_dy, dora, four slabs": lambda: kernels.lora_dy(y, by_scaled_dy, all_gradients, *common, wide_scaled_dy),
        "lora_dA": lambda: kernels.lora_dA(x, u, dA, 0, None, *common, by_x),
        "lora_dA, dropout": lambda: kernels.lora_dA(x, u, dA, 3277, seed, *common, by_x),
        "dropout": lambda: kernels.dropout(x, x, 3277, 1.05, seed, kernels.DropoutConfig()),
        "dora_norm": lambda: kernels.dora_norm(weight, A.to(dtype), B, c, 2.0, *common, norm),
        "four_bit_decode": lambda: kernels.four_bit_decode(
            packed, nested, 6, 256, weight, kernels.FourBitDecodeConfig()
        ),
    }
    every |= grouped_launches(dtype, rank)
    by_descriptor = {
        "lora_linear_persistent": (x, weight, y, plain),
        "lora_linear_persistent, dx with dropout": (y, weight.t(), x, masked),
        "lora_linear_persistent, dora": (x, weight, y, dora),
    }
    if architecture in COPY_TILES and dtype != f32:
        every |= {
            name: lambda o=operands: kernels.lora_linear_persistent(*o, *persistent)
            for name, operands in by_descriptor.items()
        }
    return every


def grouped_launches(dtype: torch.dtype, rank: int) -> dict[str, Callable[[], object]]:
    """The same of the kernels for stacked experts, for each number of rows that a program takes."""
    f32, kind, common = torch.float32, (rank, dtype == torch.float32), (rank, "ieee")
    x, y, offsets, seed = (
        tensor(*shape, dtype=of)
        for shape, of in (((M, K), dtype), ((M, N), dtype), ((E + 1,), torch.int64), ((), torch.int64))
    )
    weight, bias = tensor(E, N, K, dtype=dtype), tensor(E, N, dtype=dtype)
    A, B, u = tensor(E, rank, K, dtype=f32), tensor(E, N, rank, dtype=f32), tensor(M, rank, dtype=f32)
    innermost = tensor(N, rank, E, dtype=f32).permute(2, 0, 1)  # as PEFT keeps B
    mask = Mask(3277, 1.05, seed)
    plain, masked = GroupedTail([u], [B], [2.0], [NO_MASK], bias), GroupedTail([u], [A.mT], [2.0], [mask])
    three = GroupedTail([u] * 3, [A.mT] * 3, [2.0] * 3, [mask, NO_MASK, mask])
    down, by_x = replace(kernels.lora_down_config(*kind), SPLIT_K=1024), kernels.lora_grouped_gradient_config(*kind)
    every = {
        "lora_grouped_down": lambda: kernels.lora_grouped_down(x, offsets, [A], [u[None]], [NO_MASK], *common, down),
        "lora_grouped_down, dropout": lambda: kernels.lora_grouped_down(
            x, offsets, [A], [u[None]], [mask], *common, down
        ),
        "lora_grouped_gradient": lambda: kernels.lora_grouped_gradient(
            GroupedSums(u, x, 2.0), offsets, A, *common, by_x
        ),
        "lora_grouped_gradient, dropout": lambda: kernels.lora_grouped_gradient(
            GroupedSums(u, x, 2.0, mask), offsets, A, *common, by_x
        ),
        "lora_grouped_gradient, dB": lambda: kernels.lora_grouped_gradient(
            GroupedSums(u, y, 2.0), offsets, innermost.mT, *common, by_x
        ),
    }
    products = {
        "": (x, offsets, weight, y, plain),
        ", dx with dropout": (y, offsets, weight.mT, x, masked),
        ", dx with three adapters": (y, offsets, weight.mT, x, three),
    }
    if dtype != f32:
        products[", float32 weight"] = x, offsets, weight.float(), y, plain
    for rows in ROW_BLOCKS:
        for name in products if rows == ROW_BLOCKS[-1] else [", dx with dropout"]:  # which holds the most
            config = kernels.lora_grouped_linear_config(rows, *kind, several=len(products[name][-1].q) > 1)
            every[f"lora_grouped_linear{name}, {config.BLOCK_M} rows"] = lambda o=products[name], c=config: (
                kernels.lora_grouped_linear(*o, *common, c)
            )
    return every


class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel = kernel
        self.launched: list[tuple[triton.JITFunction, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launched.append((self.kernel, args, kwargs))


def recorded(launch: Callable[[], object]) -> tuple[triton.JITFunction, tuple[Any, ...], dict[str, Any]]:
    """The one kernel that ``launch`` starts, and with what."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastpeft.kernels.")]
    places = [
        (module, name, kernel)
        for module in modules
        for name, kernel in vars(module).items()
        if name.startswith("_") and name.endswith("_kernel")
    ]
    recorders = [Recorder(kernel) for *_, kernel in places]
    for (module, name, _), recorder in zip(places, recorders, strict=True):
        setattr(module, name, recorder)
    try:
        launch()
    finally:
        for module, name, kernel in places:
            setattr(module, name, kernel)
    (launched,) = [call for recorder in recorders for call in recorder.launched]
    return launched


def source(
    kernel: triton.JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for this launch, and its options (warps, stages)."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {name: v for name, v in kwargs.items() if name in names}
    constants = {p.name for p in kernel.params if p.is_constexpr}
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}

    def described(value: Any, path: tuple[int, ...], constant: bool, special: bool) -> Any:
        if isinstance(value, tuple) and not constant:
            return tuple(described(each, (*path, i), constant, special) for i, each in enumerate(value))
        if constant or value is None or (type(value) is int and value == 1 and special):
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        divisible = isinstance(value, torch.Tensor) or (type(value) is int and value % ALIGNMENT == 0)
        if divisible and special:
            attributes[path] = [["tt.divisibility", ALIGNMENT]]
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32"

    for position, name in enumerate(names):
        signature[name] = described(values[name], (position,), name in constants, name not in fixed)
    options = {name: value for name, value in kwargs.items() if name not in names}
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes), options


def resources(log: str) -> dict[str, Any]:
    """What ptxas reports: registers a thread, bytes of stack (what was spilled), and its warnings, if any."""
    (registers,) = re.findall(r"Used (\d+) registers", log)
    (spilled,) = re.findall(r"(\d+) bytes stack frame", log)
    warnings = re.findall(PERFORMANCE_WARNING, log)
    return {"registers": int(registers), "spilled": int(spilled)} | ({"warnings": warnings} if warnings else {})


def moves(ptx: str) -> dict[str, int]:
    """How many instructions move 16 bytes a thread or more, or fewer."""
    instructions = re.findall(GLOBAL, ptx)
    wide = sum(re.search(WIDE, instruction) is not None for instruction in instructions)
    return {"wide": wide, "narrow": len(instructions) - wide}


def compiled(dtype: torch.dtype, rank: int, architecture: int) -> dict[str, Any]:
    """Every launch on one architecture."""
    every = {}
    for name, launch in launches(dtype, rank, architecture).items():
        made, options = source(*recorded(launch))
        with redirect_stdout(io.StringIO()) as log:
            binary = triton.compile(made, target=GPUTarget("cuda", architecture, 32), options=options)
        found, taken = resources(log.getvalue()), binary.metadata
        found["shared"] = taken.shared
        found["blocks"] = blocks_a_multiprocessor(
            architecture, found["registers"], taken.num_warps * WARP, taken.shared, taken.tmem_size
        )
        found["matrix"] = next((i for i in MATRIX_INSTRUCTIONS if i in binary.asm["ptx"]), None)
        found |= moves(binary.asm["ptx"])
        every[f"{name}, {TYPES[dtype]}, rank {rank}, sm_{architecture}"] = found
    return every


if __name__ == "__main__":
    triton.knobs.compilation.always_compile = True  # a kernel out of the cache has no log
    triton.knobs.nvidia.dump_ptxas_log = True
    chosen = tuple(map(int, sys.argv[1:])) or ARCHITECTURES
    combinations = [(*kind, architecture) for kind in KINDS for architecture in chosen]
    with ProcessPoolExecutor() as pool:
        kernels_by_name = dict(ChainMap(*reversed(list(pool.map(compiled, *zip(*combinations, strict=True))))))
    print(json.dumps({"triton": triton.__version__, "kernels": kernels_by_name}, indent=1))
