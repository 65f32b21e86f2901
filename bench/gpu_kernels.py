"""Each kernel on this GPU beside its rivals and the memory's speed: ``python -m fastpeft.bench.gpu_kernels``.

The time on the GPU alone, over operands that do not fit its cache; the share is that of the bandwidth that a copy
reaches. Rows are appended to ``bench/results/<gpu>-kernels.jsonl`` with their table beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.functional import grouped_mm

from fastpeft import dispatch, extension
from fastpeft.backends.gpu import triton
from fastpeft.backends.gpu.cuda_kernels import CudaKernels
from fastpeft.backends.gpu.kernel_set import DyNeeds, DyOperands, GroupedSums, GroupedTail, Kernels, Mask, Tail
from fastpeft.call import Weight
from fastpeft.four_bit import FourBit, quantize

from . import gpu_timing
from .measure import Run, record_kernels

RANK = 16
K = N = 4096
EXPERTS = 16
FEW = (1, 4, 8)
MANY = (512, 2048, 4096, 8192)
MASK = 3277, 1.05  # threshold and factor of p = 0.05
Calls = dict[str, Callable[[], Any]]
SHARES = {"four_bit_decode": 0.9, "four_bit_linear 1": 0.8}
"""At least so much of the copy's bandwidth is meant to be reached."""


def kernel_sets() -> dict[str, Kernels]:
    """The kernels of every backend that runs here."""
    sets: dict[str, Kernels] = {}
    if dispatch.named("cuda").unavailable() is None:
        sets["cuda"] = CudaKernels(extension.cuda())
    if dispatch.named("triton").unavailable() is None:
        sets["triton"] = triton.kernels()
    return sets


def copy(device: str) -> tuple[int, Calls]:
    source = torch.ones(N, K, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes, {"torch": lambda: target.copy_(source)}


def four_bit_decode(sets: dict[str, Kernels], device: str) -> tuple[int, Calls]:
    packed = _packed(device)
    operands = Weight.of(packed), N, K, torch.bfloat16
    calls: Calls = {name: lambda k=kernels: k.four_bit_decode(*operands) for name, kernels in sets.items()}
    return _packed_bytes(packed) + 2 * N * K, calls | _bitsandbytes(None, device)


def four_bit_linear(sets: dict[str, Kernels], device: str, M: int) -> tuple[int, Calls]:
    packed = _packed(device)
    x, y = torch.randn(M, K, device=device).bfloat16(), torch.empty(M, N, device=device, dtype=torch.bfloat16)
    tail = Tail(torch.randn(M, RANK, device=device), torch.randn(N, RANK, device=device), 2.0)
    operands = x, Weight.of(packed), y, tail
    able = {name: kernels for name, kernels in sets.items() if isinstance(kernels, CudaKernels)}
    calls: Calls = {name: lambda k=kernels: k.four_bit_linear(*operands) for name, kernels in able.items()}
    return _packed_bytes(packed) + x.nbytes + y.nbytes, calls | _bitsandbytes(x, device)


def dora_norm(sets: dict[str, Kernels], device: str, four_bit: bool) -> tuple[int, Calls]:
    weight = _packed(device) if four_bit else torch.randn(N, K, device=device).bfloat16()
    size = _packed_bytes(weight) if isinstance(weight, FourBit) else weight.nbytes
    A, B = torch.randn(RANK, K, device=device), torch.randn(N, RANK, device=device)
    operands = Weight.of(weight), A, B, 2.0, torch.bfloat16
    return size, {name: lambda k=kernels: k.dora_norm(*operands) for name, kernels in sets.items()}


def lora_up(sets: dict[str, Kernels], device: str, M: int, ending: str) -> tuple[int, Calls]:
    base = torch.randn(M, N, device=device).bfloat16()
    seed, c = torch.tensor(7, device=device), torch.rand(N, device=device)
    z = torch.empty_like(base) if ending == "scaled" else None
    tail = Tail(torch.randn(M, RANK, device=device), torch.randn(N, RANK, device=device), 2.0)
    endings = {"plain": {}, "masked": {"threshold": MASK[0], "seed": seed}, "scaled": {"c": c, "z": z}}
    tail = Tail(tail.q, tail.right, tail.scale, **endings[ending])
    calls: Calls = {name: lambda k=kernels: k.lora_up(base, None, base, tail) for name, kernels in sets.items()}
    return (2 + (z is not None)) * base.nbytes, calls


def skinny(sets: dict[str, Kernels], device: str, M: int, name: str, masked: bool) -> tuple[int, Calls]:
    x, dy = (torch.randn(M, width, device=device).bfloat16() for width in (K, N))
    seed = torch.tensor(7, device=device)
    A, B, u = (torch.randn(shape, device=device) for shape in ((RANK, K), (N, RANK), (M, RANK)))
    mask = Mask(*(MASK if masked else (0, 1.0)), seed)
    half_A, half_B, half_u = (t.bfloat16() for t in (A, B, u))
    by_torch: dict[str, Callable[[], Any]] = {
        "lora_down": lambda: _wide(x, half_A.t()),
        "lora_dy": lambda: (_wide(dy, half_B), _wide(dy.t(), half_u)),
        "lora_dA": lambda: _wide(half_u.t(), x),
    }
    dA = torch.empty_like(A)

    def by_cuda(k: CudaKernels) -> Any:
        if name == "lora_dy":
            return k.lora_down_many(dy, B.t(), u, mask), k.lora_gradient(dy, u, dA, mask)
        if name == "lora_dA":
            return k.lora_gradient(x, half_u, dA, mask)
        return k.lora_down(x, [A], u, [mask], None) if M == 1 else k.lora_down_many(x, A, u, mask)

    launches: dict[str, Callable[[Kernels], Any]] = {
        "lora_down": lambda k: k.lora_down(x, [A], u, [mask], None),
        "lora_dy": lambda k: k.lora_dy(dy, DyOperands(B, u, 2.0), u, DyNeeds(True, False, False)),
        "lora_dA": lambda k: k.lora_dA(x, u, mask),
    }
    moved = dy.nbytes if name == "lora_dy" else x.nbytes + (A.nbytes if name == "lora_down" else 0)
    calls: Calls = {
        of: (lambda k=kernels: by_cuda(k)) if isinstance(kernels, CudaKernels) else lambda k=kernels: launches[name](k)
        for of, kernels in sets.items()
    }
    return moved, calls if masked else calls | {"torch": by_torch[name]}


def lora_linear(sets: dict[str, Kernels], device: str, M: int, ending: str) -> tuple[int, Calls]:
    """The product with W and its low-rank part by one kernel, beside the vendor's product alone."""
    x, weight = torch.randn(M, K, device=device).bfloat16(), torch.randn(N, K, device=device).bfloat16()
    if ending != "plain":
        weight = weight.t().contiguous().t()  # as in the gradient of x
    q, right = torch.randn(M, RANK, device=device).bfloat16(), torch.randn(RANK, N, device=device).bfloat16()
    right = right.t().contiguous() if ending == "plain" else right.t()
    y, seed = x.new_empty(M, N), torch.tensor(7, device=device)
    tail = Tail(q, right, 1.0, MASK[0] if ending == "masked" else 0, seed)
    wide = tail._replace(q=q.float())
    calls: Calls = {"torch": lambda: torch.mm(x, weight.t())}
    for name, kernels in sets.items():
        if isinstance(kernels, CudaKernels) and kernels.library.has_lora_linear(y.get_device()):
            calls[name] = lambda k=kernels: k.lora_linear(x, weight, y, tail)
        elif isinstance(kernels, triton.TritonKernels):
            plan = kernels.shared_plans(x, weight, RANK)[-1]
            calls[name] = lambda k=kernels, plan=plan: k.lora_linear(plan, x, weight, y, wide)
    return x.nbytes + weight.nbytes + y.nbytes, calls


def grouped(sets: dict[str, Kernels], device: str, T: int, name: str, masked: bool) -> tuple[int, Calls]:
    """The kernels of stacked experts, who have about as many rows each, beside the vendor's grouped products."""
    x, y = torch.randn(T, K, device=device).bfloat16(), torch.empty(T, N, device=device, dtype=torch.bfloat16)
    u, A, B = (torch.randn(shape, device=device) for shape in ((T, RANK), (EXPERTS, RANK, K), (EXPERTS, N, RANK)))
    mask = Mask(*(MASK if masked else (0, 1.0)), torch.tensor(7, device=device))
    ends = torch.randint(T + 1, (EXPERTS - 1,)).sort().values.tolist()
    offsets = torch.tensor([0, *ends, T], dtype=torch.int32, device=device)
    if name == "lora_grouped_linear":
        weight = torch.randn(EXPERTS, N, K, device=device).bfloat16()
        tail = GroupedTail([u], [B], [2.0], [mask])
        moved, by_torch = x.nbytes + weight.nbytes + y.nbytes, (x, weight.mT)
        operands: tuple[Any, ...] = x, offsets, weight, y, tail
    elif name == "lora_grouped_down":
        moved, by_torch = x.nbytes + A.nbytes, (x, A.bfloat16().mT)
        operands = x, offsets, [A], u, [mask]
    else:
        moved, by_torch = x.nbytes + A.nbytes, (u.bfloat16().mT, x)
        operands = GroupedSums(u, x, 2.0, mask), offsets, A
    able = {of: kernels for of, kernels in sets.items() if isinstance(kernels, triton.TritonKernels)}
    calls: Calls = {of: lambda k=kernels: getattr(k, name)(*operands) for of, kernels in able.items()}
    return moved, calls if masked else calls | {"torch": lambda: grouped_mm(*by_torch, offs=offsets[1:])}


def _wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b`` as the C++ composition has torch multiply; on a CPU, which has no such product, in the low precision."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b)


def dropout(sets: dict[str, Kernels], device: str, M: int) -> tuple[int, Calls]:
    x, mask = torch.randn(M, K, device=device).bfloat16(), Mask(*MASK, torch.tensor(7, device=device))
    return 2 * x.nbytes, {name: lambda k=kernels: k.dropout(x, mask) for name, kernels in sets.items()}


def makers(sets: dict[str, Kernels], device: str) -> dict[str, Callable[[], tuple[int, Calls]]]:
    """By kernel and size: what makes fresh operands, and gives the bytes to be moved and each contestant's call."""
    found: dict[str, Callable[[], tuple[int, Calls]]] = {
        "copy": lambda: copy(device),
        "four_bit_decode": lambda: four_bit_decode(sets, device),
        "dora_norm": lambda: dora_norm(sets, device, False),
        "dora_norm, 4 bits": lambda: dora_norm(sets, device, True),
    }
    for M in FEW:
        found[f"four_bit_linear {M}"] = lambda M=M: four_bit_linear(sets, device, M)
    for M in (1, *MANY):
        found[f"lora_down {M}"] = lambda M=M: skinny(sets, device, M, "lora_down", False)
    for M in MANY:
        found[f"lora_down {M}, masked"] = lambda M=M: skinny(sets, device, M, "lora_down", True)
        found[f"lora_dy {M}"] = lambda M=M: skinny(sets, device, M, "lora_dy", False)
        found[f"lora_dA {M}"] = lambda M=M: skinny(sets, device, M, "lora_dA", False)
        found[f"lora_dA {M}, masked"] = lambda M=M: skinny(sets, device, M, "lora_dA", True)
        found[f"dropout {M}"] = lambda M=M: dropout(sets, device, M)
        for ending in ("plain", "transposed", "masked"):
            found[f"lora_linear {M}, {ending}"] = lambda M=M, e=ending: lora_linear(sets, device, M, e)
        for kind in ("lora_grouped_linear", "lora_grouped_down", "lora_grouped_gradient"):
            found[f"{kind} {M}"] = lambda M=M, kind=kind: grouped(sets, device, M, kind, False)
            found[f"{kind} {M}, masked"] = lambda M=M, kind=kind: grouped(sets, device, M, kind, True)
        for ending in ("plain", "masked", "scaled"):
            found[f"lora_up {M}, {ending}"] = lambda M=M, e=ending: lora_up(sets, device, M, e)
    return found


def measure(rounds: int, run: Run) -> Iterator[dict[str, Any]]:
    """A row for every kernel and size."""
    for name, make in makers(kernel_sets(), gpu_timing.DEVICE).items():
        moved, first = make()
        sets = [first, *(make()[1] for _ in range(gpu_timing.copies_of(moved) - 1))]
        seconds = gpu_timing.seconds_per_call({who: [each[who] for each in sets] for who in first}, rounds)
        yield {**run.facts(), "kernel": name, "K": K, "N": N, "rank": RANK, "bytes": moved, "seconds": seconds}


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Microseconds of each contestant and its share of the copy's bandwidth."""
    first = found[0]
    names = list(dict.fromkeys(who for row in found for who in row["seconds"]))
    speed = copy_speed(found)
    lines = [
        f"{first['machine']['gpu']}, {K} x {N}, bfloat16, rank {RANK}, {first['run'][:10]}, "
        f"commit {str(first['commit'])[:9]}. Medians of the time on the GPU in µs, "
        f"in brackets the share of the bandwidth of a copy, {speed / 1e12:.2f} TB/s.",
        "",
        f"| kernel and tokens | MB | {' | '.join(names)} | meant |",
        f"|---|---:|{'---:|' * len(names)}---:|",
    ]
    for row in found:
        cells = []
        for who in names:
            seconds = row["seconds"].get(who, "")
            if isinstance(seconds, dict):
                share = row["bytes"] / seconds["median"] / speed
                cells.append(f"{seconds['median'] * 1e6:.1f} ({share:.0%})")
            else:
                cells.append(seconds)
        meant = f"{SHARES[row['kernel']]:.0%}" if row["kernel"] in SHARES else ""
        lines.append(f"| {row['kernel']} | {row['bytes'] / 1e6:.1f} | {' | '.join(cells)} | {meant} |")
    return "\n".join(lines) + "\n"


def copy_speed(found: Sequence[dict[str, Any]]) -> float:
    """Bytes a second of the row ``copy``."""
    row = next(row for row in found if row["kernel"] == "copy")
    return row["bytes"] / row["seconds"]["torch"]["median"]


def _packed(device: str) -> FourBit:
    return quantize(torch.randn(N, K, device=device))


def _packed_bytes(weight: FourBit) -> int:
    return weight.packed.nbytes + sum(tensor.nbytes for tensor in weight.quant)


def _bitsandbytes(x: torch.Tensor | None, device: str) -> Calls:
    """Its decoding, or its product with ``x``; nothing where it is not installed."""
    try:
        from bitsandbytes import functional, matmul_4bit
    except ImportError:
        return {}
    weight = torch.randn(N, K, device=device).bfloat16()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    if x is None:
        return {"bitsandbytes": lambda: functional.dequantize_4bit(packed, state)}
    return {"bitsandbytes": lambda: matmul_4bit(x, packed.t(), quant_state=state)}


@click.command()
@click.option("--rounds", type=click.IntRange(min=2), default=9, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench/results"))
def command(rounds: int, out: Path) -> None:
    """Times every kernel of the GPU backends."""
    record_kernels("kernels", lambda run: measure(rounds, run), markdown, out, "cuda")


if __name__ == "__main__":
    command()
