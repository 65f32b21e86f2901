"""Which backend takes a call, and what is said when one does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastpeft
from fastpeft import dispatch, ops
from fastpeft.call import Adapters, BackwardCall, Kept, Needs, Weight

PASSES = ("lora_linear", "lora_linear_backward")
CPU, REFERENCE = dispatch.named("cpu"), dispatch.named("reference")
ON_CPU = "it runs on NVIDIA GPUs, and x is on cpu"


def operands(dtype: torch.dtype, adapter_dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    adapter_dtype = adapter_dtype or dtype
    x, weight = torch.ones(2, 5, dtype=dtype), torch.ones(4, 5, dtype=dtype)
    return x, weight, torch.ones(3, 5, dtype=adapter_dtype), torch.ones(4, 3, dtype=adapter_dtype)


@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cpus_takes_what_it_computes_in(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    x, weight, A, B = operands(dtype, adapter_dtype)
    assert dispatch.refusals(x, weight, [A, B]) == {
        "cpu": None,
        "cuda": ON_CPU,
        "triton": ON_CPU,
        "reference": None,
    }
    assert dispatch.choose(op, x, weight, [A, B], None) is CPU
    assert dispatch.choose(op, x, weight, [A, B], "cpu") is CPU
    assert dispatch.choose(op, x, weight, [A, B], "reference") is REFERENCE


@pytest.mark.parametrize("op", PASSES)
def test_each_refusal_says_what_was_expected_and_what_it_was(op: str) -> None:
    x, weight, A, B = operands(torch.float32)
    calls = {
        "float64": operands(torch.float64),
        "meta": (x.to("meta"), weight.to("meta"), A.to("meta"), B.to("meta")),
        "adapters in float32, bfloat16 or float16": (x, weight, A.double(), B),
        r"\[0, 5\]": (x, weight[:0], A, B[:0]),
    }
    for words, (x, weight, A, B) in calls.items():
        assert dispatch.choose(op, x, weight, [A, B], None) is REFERENCE
        with pytest.raises(fastpeft.BackendRefusal, match=rf"backend='cpu' cannot run {op}: .*{words}"):
            dispatch.choose(op, x, weight, [A, B], "cpu")


def test_a_name_that_a_backend_had_before_is_understood() -> None:
    x, weight, A, B = operands(torch.float32)
    assert dispatch.choose("lora_linear", x, weight, [A, B], "native") is CPU
    y = fastpeft.functional.lora_linear(x, weight, None, A, B, 1.0, backend="native")
    assert torch.equal(y, fastpeft.functional.lora_linear(x, weight, None, A, B, 1.0, backend="cpu"))
    with pytest.raises(fastpeft.BackendRefusal, match=r"backend='native' cannot run lora_linear: .*float64"):
        fastpeft.functional.lora_linear(*(t.double() for t in (x, weight)), None, A, B, 1.0, backend="native")


def test_an_explicit_backend_is_asked_again_in_the_backward_pass() -> None:
    x, weight, A, B = operands(torch.float64)
    with pytest.raises(fastpeft.BackendRefusal, match="cannot run lora_linear_backward"):
        adapters = Adapters([A], [B], [], [1.0], [0.0])
        needs = Needs.of([True] * 2 + [False] * 3, 1)
        call = BackwardCall(x @ weight.t(), x, Weight.of(weight), adapters, Kept(x @ A.t(), []), needs)
        ops.lora_linear_backward(*call.flat(), "cpu")


def test_an_automatic_choice_of_another_dtype_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    x, weight, A, B = operands(torch.float64)
    assert fastpeft.functional.lora_linear(x, weight, None, A, B, 1.0).dtype == torch.float64
    assert not [w for w in recwarn if "fastpeft" in str(w.message)]


def test_without_the_extension_it_warns_once_and_runs() -> None:
    """In a process of its own, where the extension is kept from being imported."""
    program = """
import sys, warnings
sys.modules["fastpeft._C"] = None
import torch, fastpeft
operands = [torch.ones(shape) for shape in ((2, 5), (4, 5), (4,), (3, 5), (4, 3))]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = fastpeft.functional.lora_linear(*operands, 1.0)
assert torch.equal(y, torch.full((2, 4), 21.0)), y
said = [str(w.message) for w in caught if "fastpeft" in str(w.message)]
assert len(said) == 1 and "cpu" in said[0] and "python -m fastpeft build" in said[0], said
try:
    fastpeft.functional.lora_linear(*operands, 1.0, backend="cpu")
except fastpeft.BackendRefusal as refusal:
    assert "python -m fastpeft build" in str(refusal)
else:
    raise AssertionError("nothing was refused")
"""
    done = subprocess.run([sys.executable, "-c", program], env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_extension_is_built_here() -> None:
    assert CPU.unavailable() is None
