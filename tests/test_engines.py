"""What people train with around a PEFT model: every call of its layers stays fused, or goes to PEFT for the reason that
is told; the losses are PEFT's."""

from __future__ import annotations

import pytest
from engines import HOOKED, Found, assert_trained_as_by_peft, trained

SHARDED = "its base layer's weight is no Parameter: the layer is parametrized, a replica or a shard"
LEFT_FOR = {
    "ddp/lora": None,
    "ddp/qdora": None,
    "ddp-static/dora": None,
    "ddp-unused/lora": None,
    "ddp-views/dora": None,
    "fsdp2/lora": None,
    "fsdp2/dora": None,
    "ddp/shared": None,
    "fsdp2/shared": None,
    "fsdp2/qlora": None,
    "fsdp2-mixed/lora": None,
    "ddp/experts": None,
    "fsdp2/experts": None,
    "fsdp1/lora": None,
    "fsdp1/dora": None,
    "fsdp1-adapters/lora": SHARDED,
    "tensor-parallel/lora": HOOKED,
}
pytestmark = pytest.mark.xdist_group("engines")  # they share the two processes


@pytest.fixture(scope="module")
def found() -> Found:
    return trained(list(LEFT_FOR))


@pytest.mark.parametrize("pair", LEFT_FOR)
def test_two_processes(pair: str, found: Found) -> None:
    assert_trained_as_by_peft(found[pair], LEFT_FOR[pair])
