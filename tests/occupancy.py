"""How many blocks of a kernel a multiprocessor holds at once, by what each takes of it (CUDA's programming guide)."""

from __future__ import annotations

SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes a multiprocessor, by architecture
SHARED_RESERVED = 1024  # bytes that the driver adds to each block's
REGISTERS, THREADS, BLOCKS, TENSOR_COLUMNS = 65536, 2048, 32, 512  # of a multiprocessor, on all of these
WARP = 32
REGISTER_UNIT, WARP_UNIT, SHARED_UNIT = 256, 4, 128  # what is handed out at a time: registers to a warp, warps, bytes


def blocks_a_multiprocessor(
    architecture: int, registers: int, threads: int, shared: int, tensor_columns: int = 0
) -> int:
    """``registers`` a thread; ``shared`` bytes and ``tensor_columns`` (of Blackwell's tensor memory) a block."""
    warps = -(-threads // WARP)
    warps_by_registers = REGISTERS // _ceil_to(registers * WARP, REGISTER_UNIT) // WARP_UNIT * WARP_UNIT
    limits = [
        BLOCKS,
        THREADS // threads,
        warps_by_registers // warps,
        SHARED[architecture] // _ceil_to(shared + SHARED_RESERVED, SHARED_UNIT),
    ]
    return min(limits + ([TENSOR_COLUMNS // tensor_columns] if tensor_columns else []))


def _ceil_to(size: int, unit: int) -> int:
    return -(-size // unit) * unit
