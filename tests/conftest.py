"""What holds for every test: no network, two threads, a seed of its own, and NaN in memory that nobody wrote."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes of two threads each: none may spin while it waits
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import random
import zlib
from typing import Any

import pytest
import torch

from fastpeft import ops

if not torch.cuda.is_available():  # Triton's kernels are made for its interpreter; nobody else's are
    os.environ["TRITON_INTERPRET"] = "1"
    import fastpeft.kernels  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

torch.set_num_threads(2)
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty, and at::empty inside C++


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups, which one process has to run alone, come first: the others take what is left beside them."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Every test draws numbers of its own, the same in each run and in any order of the tests."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each of DoRA's norms that is computed."""
    calls: list[None] = []
    compute = ops.call_dora_norm

    def counted(*args: Any) -> torch.Tensor:
        calls.append(None)
        return compute(*args)

    monkeypatch.setattr(ops, "call_dora_norm", counted)
    return calls
