"""``make test-engines``: DeepSpeed's ZeRO, where DeepSpeed can be imported."""

from __future__ import annotations

import pytest
from engines import HOOKED, Found, assert_trained_as_by_peft, trained

LEFT_FOR = {  # ZeRO-3 gathers each module's own parameters by a hook on the module
    "zero2/lora": None,
    "zero2/dora": None,
    "zero2/qlora": None,
    "zero3/lora": HOOKED,
    "zero3/dora": HOOKED,
}


@pytest.fixture(scope="module")
def found() -> Found:
    return trained(list(LEFT_FOR), {"DS_ACCELERATOR": "cpu"})


@pytest.mark.parametrize("pair", LEFT_FOR)
def test_two_processes(pair: str, found: Found) -> None:
    assert_trained_as_by_peft(found[pair], LEFT_FOR[pair])
