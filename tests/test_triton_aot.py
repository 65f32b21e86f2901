"""Every Triton kernel compiled for three architectures by each Triton on record, with no GPU: nothing spills, ptxas has
nothing to complain of, and the table of what each takes stands beside this file, so that a change of it shows."""

from __future__ import annotations

import json

import pytest
import triton_aot
from occupancy import blocks_a_multiprocessor
from triton_resources import FOLDERS, RECORD, Kernels, compiled_by

pytestmark = pytest.mark.xdist_group("triton_aot")  # one process compiles for all of them
WITHOUT_PRODUCT = ("dropout", "four_bit_decode")
# Blocks that a multiprocessor of sm_90 and sm_100 holds at least. Kernels that go at the memory's speed need more than
# one: the loads of others are on their way while one computes or ends. Those not named here need one.
FLOORS = {
    "lora_down": 2,
    "lora_dy": 2,
    "lora_dA": 2,
    "lora_grouped_down": 2,
    "lora_grouped_gradient": 2,
    "dora_norm": 2,
    "lora_up": 3,
    "four_bit_decode": 5,
    "dropout": 6,
}


def architecture(name: str) -> str:
    return name.rpartition(", ")[2]


def stem(name: str) -> str:
    return name.partition(",")[0]


@pytest.fixture(scope="module", params=FOLDERS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compiled(version: str) -> Kernels:
    return compiled_by(version)


def test_nothing_spills_and_shared_memory_suffices(compiled: Kernels) -> None:
    assert {name: found["spilled"] for name, found in compiled.items() if found["spilled"]} == {}
    assert [name for name, found in compiled.items() if found["blocks"] < 1] == []


def test_nothing_is_serialised(compiled: Kernels) -> None:
    assert {name: found["warnings"] for name, found in compiled.items() if "warnings" in found} == {}


def test_a_multiprocessor_holds_enough_blocks(compiled: Kernels) -> None:
    meant = {name: found["blocks"] for name, found in compiled.items() if architecture(name) in ("sm_90", "sm_100")}
    assert {name: blocks for name, blocks in meant.items() if blocks < FLOORS.get(stem(name), 1)} == {}


def test_products_use_the_matrix_units(compiled: Kernels) -> None:
    """In a low precision; float32 is multiplied exactly unless torch allows tf32."""
    halves = {name: found["matrix"] for name, found in compiled.items() if ", bf16, " in name}
    without = {stem(name) for name, matrix in halves.items() if matrix is None}
    assert without == set(WITHOUT_PRODUCT)
    large = {name: matrix for name, matrix in halves.items() if name.startswith(("lora_linear", "lora_grouped_linear"))}
    meant = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}
    few = {name for name in large if ", 16 rows" in name}  # the larger instructions take 64
    assert large == {name: "mma.sync" if name in few else meant[architecture(name)] for name in large}


def test_the_table_is_the_one_on_record(compiled: Kernels, version: str) -> None:
    assert compiled == json.loads(RECORD.read_text())[version]


def test_what_ptxas_says_is_read() -> None:
    log = """ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_some_kernel' for 'sm_90a'
ptxas info    : Function properties for _some_kernel
    16 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size
"""
    found = triton_aot.resources(log)
    assert (found["registers"], found["spilled"]) == (128, 16)
    assert [warning[:7] for warning in found["warnings"]] == ["(C7515)"]
    assert "warnings" not in triton_aot.resources(log.replace("(C7515)", "(C7600)"))


def test_what_moves_16_bytes_is_counted() -> None:
    ptx = """
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x8, %r6;
    st.global.v2.b32 [ %rd3 + 0 ], { %r7, %r8 };
    st.global.b16 [ %rd4 + 0 ], { %rs1 };
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
    cp.async.commit_group;
"""
    assert triton_aot.moves(ptx) == {"wide": 3, "narrow": 3}


def test_large_operands_move_16_bytes_at_a_time(compiled: Kernels) -> None:
    assert [name for name, found in compiled.items() if not found["wide"]] == []


def test_how_many_blocks_fit() -> None:
    """As CUDA's own calculator says, whatever the limit: registers, threads, shared or tensor memory, their number."""
    assert blocks_a_multiprocessor(90, registers=128, threads=256, shared=0) == 2
    assert blocks_a_multiprocessor(90, registers=129, threads=256, shared=0) == 1
    assert blocks_a_multiprocessor(90, registers=168, threads=128, shared=0) == 3
    assert blocks_a_multiprocessor(90, registers=32, threads=1024, shared=0) == 2
    assert blocks_a_multiprocessor(90, registers=32, threads=128, shared=113 * 1024) == 2
    assert blocks_a_multiprocessor(80, registers=32, threads=128, shared=113 * 1024) == 1
    assert blocks_a_multiprocessor(90, registers=32, threads=128, shared=228 * 1024) == 0
    assert blocks_a_multiprocessor(100, registers=32, threads=128, shared=0, tensor_columns=256) == 2
    assert blocks_a_multiprocessor(90, registers=16, threads=32, shared=0) == 32
