"""What holds for every test: no network, two threads, a seed of its own, and NaN in memory that nobody wrote."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random
import zlib

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels are made for its interpreter; nobody else's are
    os.environ["TRITON_INTERPRET"] = "1"
    import fastpeft.kernels  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

torch.set_num_threads(2)
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty, and at::empty inside C++


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Every test draws numbers of its own, the same in each run and in any order of the tests."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)
    return seed
