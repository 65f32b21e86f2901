"""What goes wrong in the middle of a training leaves the model as it was; threads and processes share nothing."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft_layers import layer_of, lora_model, signed, tiny_llama, tokens
from torch import Tensor, nn

import fastpeft

METHODS = {"lora": {}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.3}}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fused_llama(method: str) -> peft.PeftModel:
    model = tiny_llama(init_lora_weights=False, **METHODS[method])
    assert fastpeft.patch(model).left_to_peft == {}
    return model


def step(model: nn.Module, ids: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


class Interrupt(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException) -> Tensor:
        ctx.error = error
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ctx.error


@methods
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_the_model_as_it_was(where: str, error: BaseException, method: str) -> None:
    model, ids = fused_llama(method), tokens()
    before, state = step(model, ids), copy.deepcopy(model.state_dict())

    def fail(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        if where == "forward":
            raise error
        return Interrupt.apply(y, error)

    handle = model.base_model.model.model.layers[0].register_forward_hook(fail)
    for _ in range(3):
        with pytest.raises(type(error)):
            step(model, ids)
    handle.remove()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert_same(step(model, ids), before)


@methods
def test_memory_that_cannot_be_had_leaves_the_layer_usable(method: str) -> None:
    model = lora_model(nn.Linear(8, 12), **METHODS[method])
    fastpeft.patch(model)
    x = signed(5, 8)
    before = layer_of(model).eval()(x)
    with pytest.raises(RuntimeError, match=r"(?i)memory|alloc"):
        layer_of(model)(torch.ones(1).expand(2**46, 8))
    assert torch.equal(layer_of(model)(x), before)


@methods
def test_an_interrupt_while_kernels_run_comes_through(method: str) -> None:
    """By the keyboard, in the middle of a training; the next step is what it would have been."""
    model, ids = fused_llama(method), tokens((4, 24))
    before = step(model, ids)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                step(model, ids)
    finally:
        signal.signal(signal.SIGINT, handler)
    timer.join()
    assert_same(step(model, ids), before)


@methods
def test_two_threads_train_two_models(method: str) -> None:
    models = [fused_llama(method) for _ in range(2)]
    batches = [tokens((2, 24)) for _ in range(2)]
    expected = [gradients(m, ids) for m, ids in zip(models, batches, strict=True)]
    found: list[list[list[Tensor]]] = [[], []]

    def train(i: int) -> None:
        for _ in range(20):
            found[i].append(gradients(models[i], batches[i]))

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 20
        if method != "dropout":  # the threads draw from one generator
            for each in found[i]:
                torch.testing.assert_close(each, expected[i])
        assert all(g.isfinite().all() for each in found[i] for g in each)


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    learned = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(input_ids=ids, labels=ids).loss, learned))


def one_layer(method: str) -> peft.PeftModel:
    torch.manual_seed(0)
    return lora_model(nn.Linear(64, 48), **METHODS[method])


def in_a_worker(method: str, results: Any) -> None:
    model = one_layer(method)
    fastpeft.patch(model)
    y = layer_of(model).eval()(torch.linspace(-1, 1, 640).reshape(10, 64))
    y.sum().backward()
    results.put([y.detach().numpy(), *(p.grad.numpy() for p in model.parameters() if p.grad is not None)])


@methods
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_a_worker_process_computes_the_same(start: str, method: str) -> None:
    """A forked one after kernels ran in its parent on one thread, as data loaders' workers do."""
    model = one_layer(method)
    fastpeft.patch(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        y = layer_of(model).eval()(torch.linspace(-1, 1, 640).reshape(10, 64))
        context = multiprocessing.get_context(start)
        results = context.Queue()
        worker = context.Process(target=in_a_worker, args=(method, results))
        worker.start()
        found, *grads = results.get(timeout=120)
        worker.join(timeout=60)
    finally:
        torch.set_num_threads(threads)
    assert worker.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(found), y.detach())
    assert len(grads) == (3 if method == "dora" else 2)


@methods
def test_unpatched_after_a_merge_it_is_pefts(method: str) -> None:
    model = lora_model(nn.Linear(24, 16), **METHODS[method]).eval()
    x = signed(9, 24)
    stock = copy.deepcopy(model)
    fastpeft.patch(model)
    for each in (model, stock):
        each.merge_adapter()
    fastpeft.unpatch(model)
    assert torch.equal(model(x), stock(x))
    for each in (model, stock):
        each.unmerge_adapter()
    assert torch.equal(model(x), stock(x))


SWAPS: dict[str, Callable[[], nn.Module]] = {
    "another weight": lambda: nn.Linear(24, 16),
    "no bias": lambda: nn.Linear(24, 16, bias=False),
    "another dtype": lambda: nn.Linear(24, 16, dtype=torch.bfloat16),
}


@methods
@pytest.mark.parametrize("swap", SWAPS)
def test_a_base_layer_that_is_swapped_is_the_one_computed_with(swap: str, method: str) -> None:
    model = lora_model(nn.Linear(24, 16), **METHODS[method]).eval()
    fastpeft.patch(model)
    x = signed(9, 24)
    model(x)
    layer_of(model).base_layer = SWAPS[swap]()
    fresh = copy.deepcopy(model)
    fastpeft.unpatch(fresh)
    fastpeft.patch(fresh)
    x = x.to(layer_of(model).base_layer.weight.dtype)
    assert torch.equal(model(x), fresh(x))
