"""Starts engine_program.py with two processes, and judges what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from engine_program import STEPS
from oracle import assert_close_as_eager

HERE = Path(__file__).parent
LAYERS = 6  # of the Llama, with an adapter
LAYERS_OF_EXPERTS = 4  # the experts of each of two blocks, and q_proj
HOOKED = "its adapter 'default' has a module with a hook or a forward of its own"
Found = dict[str, dict[str, Any]]


def trained(pairs: Sequence[str], environment: Mapping[str, str] | None = None) -> Found:
    """What the program found, by ENGINE/METHOD. All pairs share two processes, which take longer to start than to
    train; where one breaks, those after it are missing, and the last of the errors is told."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "engine_program.py", *pairs]
    variables = os.environ | (environment or {})
    done = subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True, env=variables)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    found: Found = {line["pair"]: line for line in lines}
    return {pair: found.get(pair, {"error": done.stderr}) for pair in pairs}


def assert_trained_as_by_peft(found: Mapping[str, Any], left_for: str | None) -> None:
    """All calls were fused; ``left_for``: all went to PEFT, for this reason."""
    assert "error" not in found, found["error"]
    calls = STEPS * (LAYERS_OF_EXPERTS if found["pair"].endswith("experts") else LAYERS)
    expected = (calls, 0, []) if left_for is None else (0, calls, [left_for])
    assert (found["calls"], found["left"], found["reasons"]) == expected
    # Of each block q and v, from the second step on: the first one shows that they read the same x.
    assert found["shared"] == (2 * (STEPS - 1) if found["pair"].endswith("shared") else 0)
    fused, exact, stock = (torch.tensor(found[who], dtype=torch.float64) for who in ("fused", "exact", "stock"))
    assert_close_as_eager(fused.float(), exact, stock, "loss curve")
    assert fused[-4:].mean() < fused[:4].mean()
