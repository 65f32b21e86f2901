"""Nothing waits for the GPU: calls on tensors that have a device and no values. Whatever asked for a value would raise.

On a GPU the same is asked of torch itself, and a whole training step is captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import peft
import pytest
import torch
from cases import Case
from grouped_cases import Case as Experts
from grouped_cases import Experts as Stacked
from oracle import LoraInputs, moved_to
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

import fastpeft
from fastpeft import checks, dropout, functional
from fastpeft.backends.gpu import compose, compose_grouped, plans
from fastpeft.backends.gpu.kernel_set import DyGradients, DyOperands, Mask
from fastpeft.call import Kept, Needs
from fastpeft.peft import readers

CASES = {
    "lora": Case(ranks=(8, 3), dropout_p=0.1),
    "mixed": Case(ranks=(8, 3), mixed=True),
    "dora": Case(dora=True, dropout_p=0.1),
    "one token": Case(M=1, dora=True),
}
EXPERTS = Experts(K=64, N=48, ranks=(8, 3), dropout_p=0.1)
Inputs = TypeVar("Inputs", LoraInputs, Stacked)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class ValuelessKernels:
    """A set of kernels that only allocates."""

    def lora_down(self, *args: Any) -> None:
        pass

    def lora_dy(self, dy: Tensor, operands: DyOperands, *args: Any) -> DyGradients:
        dB, dc = dy.new_empty(operands.B.shape, dtype=torch.float32), dy.new_empty(dy.shape[1], dtype=torch.float32)
        return DyGradients(*(made if need else None for made, need in zip((dB, dc, dy), args[-1], strict=True)))

    def lora_dA(self, x: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return v.new_empty((v.shape[1], x.shape[1]))

    def lora_up(self, *args: Any) -> None:
        pass

    def dropout(self, x: Tensor, mask: Mask) -> Tensor:
        return x.new_empty(x.shape)

    def shared_plans(self, *args: Any) -> tuple[()]:
        return ()

    def lora_grouped_down(self, *args: Any) -> None:
        pass

    def lora_grouped_linear(self, *args: Any) -> None:
        pass

    def lora_grouped_gradient(self, *args: Any) -> None:
        pass


@pytest.fixture
def valueless(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A torch without CUDA has no GPU's facts, context and random numbers; nothing else is left out."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(plans, "_nearest_gpu", lambda index: None)
    monkeypatch.setattr(
        dropout, "dropout_seeds", lambda count, device: torch.empty(count, dtype=torch.int64, device=device)
    )
    with FakeTensorMode() as mode:
        yield mode


def on_cuda(inputs: Inputs) -> Inputs:
    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return [moved(each) for each in value] if isinstance(value, list) else value

    return type(inputs)(**{name: moved(value) for name, value in vars(inputs).items()})


def test_a_value_asked_for_is_noticed(valueless: FakeTensorMode) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.empty((), device="cuda").item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_composition_asks_for_no_value(valueless: FakeTensorMode, case: Case) -> None:
    i, kernels = on_cuda(case.inputs()), ValuelessKernels()
    call = i.call()
    y, u, z = compose.lora_linear(kernels, *call)
    assert y.device.type == "cuda" and y.shape == i.dy.shape
    needs = Needs.of([True] * (3 + 2 * len(i.A) + len(i.c)), len(i.A))
    grads = compose.lora_linear_backward(kernels, i.dy, i.x, call.weight, call.adapters, Kept(u, z), needs)
    assert [g.shape for g in grads] == [t.shape for t in (i.x, i.weight, i.bias, *i.A, *i.B, *i.c)]


def test_the_composition_of_experts_asks_for_no_value(valueless: FakeTensorMode) -> None:
    i, kernels = on_cuda(EXPERTS.make()), ValuelessKernels()
    call = i.call()
    y, u, _ = compose_grouped.lora_grouped_linear(kernels, *call[:-1])
    assert y.device.type == "cuda" and y.shape == i.dy.shape
    operands = i.x, i.offsets, call.weight, call.adapters, u
    grads = compose_grouped.lora_grouped_linear_backward(kernels, i.dy, *operands, Needs.of([True] * 7, 2))
    assert [g.shape for g in grads] == [t.shape for t in i.differentiable().values()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_public_functions_ask_for_no_value(valueless: FakeTensorMode, case: Case) -> None:
    i = on_cuda(case.inputs())
    adapters = i.A, i.B, i.scaling
    settings = {"dropout_p": i.dropout_p, "training": True}
    if i.c:
        magnitude = torch.empty(i.weight.shape[0], device="cuda")
        y = functional.dora_linear(i.x, i.weight, i.bias, i.A[0], i.B[0], magnitude, i.scaling[0], i.dropout_p[0])
    else:
        y = functional.lora_linear(i.x, i.weight, i.bias, *adapters, **settings, adapter_index=i.adapter_index)
    assert y.device.type == "cuda" and y.shape == i.dy.shape


def test_a_scaling_that_is_a_tensor_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's norm depends on it; on a GPU its value would have to be waited for."""
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["linear"])
    model = peft.get_peft_model(nn.ModuleDict({"linear": nn.Linear(12, 10)}), config)
    fastpeft.patch(model)
    (layer,) = (module for module in model.modules() if hasattr(module, "lora_magnitude_vector"))
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.scaling["default"] = torch.tensor(2.0)
    x = torch.randn(5, 12)
    expected = layer(x)

    def waits(tensor: Tensor) -> float:
        raise AssertionError("a value is asked for")

    for module in (checks, readers):
        monkeypatch.setattr(module, "is_readable", lambda tensor: False)
    for name in ("__float__", "item"):
        monkeypatch.setattr(Tensor, name, waits)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("kind", ["LoRALinear", "DoRALinear", "QLoRALinear", "QDoRALinear"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_training_step_is_captured(kind: str, backend: str) -> None:
    """And its replay computes what the step does; each replay draws masks of its own."""
    make = getattr(fastpeft.nn, kind).from_linear
    linear = nn.Linear(256, 192, device="cuda", dtype=torch.bfloat16)
    for p in (0.0, 0.5):
        layer = make(linear, r=8, alpha=16, dropout=p, backend=backend)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        learned = [x, *(t for t in layer.parameters() if t.requires_grad)]

        def step(layer: nn.Module = layer, x: Tensor = x, learned: list[Tensor] = learned) -> list[Tensor]:
            y = layer(x)
            return [y, *torch.autograd.grad(y.float().square().sum(), learned)]

        assert_captured(step, draws=p > 0)


@on_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_step_of_experts_is_captured(backend: str, p: float) -> None:
    i, leaves = Experts(K=64, N=48, ranks=(8, 3), bias=False).make(torch.bfloat16).requiring("x", "A[0]", "B[1]")
    leaves = {name: moved_to("cuda", t.detach()).requires_grad_(t.requires_grad) for name, t in leaves.items()}
    A, B = ([leaves[f"{s}[{n}]"] for n in range(2)] for s in "AB")
    offsets, learned = i.offsets.cuda(), [t for t in leaves.values() if t.requires_grad]
    call = leaves["x"], offsets, leaves["weight"], None, A, B, i.scaling, p

    def step() -> list[Tensor]:
        y = functional.lora_grouped_linear(*call, backend=backend)
        return [y, *torch.autograd.grad(y.float().square().sum(), learned)]

    assert_captured(step, draws=p > 0)


def assert_captured(step: Callable[[], list[Tensor]], draws: bool) -> None:
    """Its replay computes what the step does; where it draws masks, each draws its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which fills the operands
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.cuda.set_sync_debug_mode("error")
            expected = step()
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    first = [t.clone() for t in captured]
    graph.replay()
    torch.cuda.synchronize()
    same = [torch.equal(a, b) for a, b in zip(first, captured, strict=True)]
    assert not any(same) if draws else all(same)
    assert draws or all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    assert all(t.isfinite().all() for t in captured)
