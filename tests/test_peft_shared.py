"""``patch(model, share_inputs=True)``: layers that read the same x compute together what they compute alone."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import bitsandbytes as bnb
import cuda_emulation
import peft
import pytest
import torch
from oracle import DEVICE, Results, assert_close_as_eager
from peft_layers import TARGETS, signed, tiny_llama, tokens, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import extension, usual
from fastpeft.dropout import dropout_keep, dropout_scale

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
K, N = 72, {"q": 96, "k": 40, "v": 40}
ALL = {**TARGETS, "target_modules": "all-linear"}


class Attention(nn.Module):
    """q, k and v of the same x, or k and v of another; ``between`` runs after q."""

    def __init__(self, make: Callable[..., nn.Module] = nn.Linear, dtype: torch.dtype = F32) -> None:
        super().__init__()
        for name, size in N.items():
            setattr(self, name, make(K, size, bias=name != "k").to(dtype))
        self.between: Callable[[Tensor], object] = lambda x: None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        results = [self.q(x)]
        self.between(x)
        other = x if other is None else other
        return torch.cat([*results, self.k(other), self.v(other)], -1)


def adapted(base: nn.Module, **config: Any) -> Any:
    settings = {"r": 5, "lora_alpha": 8, "init_lora_weights": False, "target_modules": list(N)} | config
    return peft.get_peft_model(base, peft.LoraConfig(**settings)).train()


def patched(model: nn.Module, share: bool, **kwargs: Any) -> Any:
    model = copy.deepcopy(model)
    assert fastpeft.patch(model, share_inputs=share, **kwargs).left_to_peft == {}
    return model


def attention(model: Any) -> Any:
    return model.base_model.model


def explained(model: Any) -> str:
    return str(fastpeft.explain(model))


def run(model: Any, x: Tensor, dy: Tensor, seed: int = 0) -> Results:
    """``y`` and every gradient, by name."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    return {"y": y.detach()} | dict(
        zip(["x", *trained], torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype)), strict=True)
    )


def inputs(dtype: torch.dtype, shape: Sequence[int] = (2, 33)) -> tuple[Tensor, Tensor]:
    return signed(*shape, K).to(dtype), signed(*shape, sum(N.values())).to(dtype)


@pytest.fixture
def shared_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call computed together; empty while none did."""
    counts = []
    compute = usual.lora_shared_linear

    def counted(x: Tensor, calls: Sequence[Any], backend: Any) -> list[Tensor] | None:
        results = compute(x, calls, backend)
        if results is not None:
            counts.append(len(results))
        return results

    monkeypatch.setattr(usual, "lora_shared_linear", counted)
    return counts


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("plan", [None, "base_first", "low_rank_first", "one_accumulator"])
def test_together_is_as_close_as_peft(
    plan: str | None, dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch, shared_calls: list[int]
) -> None:
    """And what comes forward, and each adapter's gradient, has the bits that the layer alone gives it."""
    model = adapted(Attention(dtype=dtype), lora_dropout=p)
    seeds = {name: 1234 + i for i, name in enumerate(N)}
    for name, seed in seeds.items():
        getattr(attention(model), name).lora_dropout["default"].seed = seed
    draws = cycle(seeds.values())
    monkeypatch.setattr("fastpeft.dropout.dropout_seeds", lambda count, device: torch.tensor([next(draws)]))
    alone, together, double = patched(model, False), patched(model, True), copy.deepcopy(model).double()

    def forward(self: Any, x: Tensor) -> Tensor:
        keep = dropout_keep(torch.tensor(self.seed), x.shape[:-1].numel(), x.shape[-1], self.p)
        return x * keep.view(x.shape) * dropout_scale(self.p)

    x, dy = inputs(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Dropout, "forward", forward)
        oracle = run(double, x.double(), dy.double())
        with torch.autocast("cpu", dtype, enabled=dtype != F32):
            eager = run(model, x, dy)
    assert extension.C is not None
    extension.C.force_plan(None if plan is None else getattr(extension.C.Plan, plan))
    try:
        expected = run(alone, x, dy)
        run(together, x, dy)
        assert shared_calls == []
        found = run(together, x, dy)
    finally:
        extension.C.force_plan(None)
    assert shared_calls == [3]
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    for name, result in found.items():
        assert_close_as_eager(result, oracle[name], eager[name], name)
        assert name == "x" or torch.equal(result, expected[name]), name


def test_a_step_draws_what_the_layers_alone_draw(shared_calls: list[int]) -> None:
    model = adapted(Attention(), lora_dropout=0.2)
    alone, together = patched(model, False), patched(model, True)
    x, dy = inputs(F32)
    run(together, x, dy)
    states = []
    for each in (alone, together):
        run(each, x, dy, seed=3)
        states.append(torch.get_rng_state())
    assert shared_calls == [3]
    assert torch.equal(*states)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_over_4_bits(dtype: torch.dtype, nested: bool, shared_calls: list[int]) -> None:
    def make(*sizes: int, bias: bool) -> nn.Module:
        return bnb.nn.Linear4bit(*sizes, bias=bias, quant_type="nf4", compress_statistics=nested)

    model = adapted(Attention(make, dtype).to("cpu"), lora_dropout=0.2)
    alone, together = patched(model, False), patched(model, True)
    x, dy = inputs(dtype)
    run(together, x, dy)
    found, expected = run(together, x, dy), run(alone, x, dy)
    exact = run(alone, x.double(), dy.double()) if dtype == F32 else run(alone, x.float(), dy.float())
    assert shared_calls == [3]
    assert_close_as_eager(found["x"], exact["x"].double(), expected["x"], "x")
    assert all(torch.equal(found[name], expected[name]) for name in found if name != "x")


def test_layers_that_read_another_x_are_learnt_to_be_apart(shared_calls: list[int]) -> None:
    """As in cross attention: k and v stay together."""
    model = adapted(Attention())
    alone, together = patched(model, False), patched(model, True)
    x, other = inputs(F32)[0], inputs(F32)[0]
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(together(x), alone(x))
        assert shared_calls == [3]
        for _ in range(3):
            assert torch.equal(together(x, other), alone(x, other))
    assert shared_calls == [3, 3, 2, 2]  # once more all three, in vain
    notes = explained(together)
    assert "it reads x alone: no other fused layer is called next with the same tensor" in notes
    assert "it reads x together with the layer that is called after it" in notes


@pytest.mark.parametrize("change", ["A", "B", "weight", "x", "scaling", "eval", "frozen", "no_grad"])
def test_a_change_between_the_calls_is_seen(change: str, shared_calls: list[int]) -> None:
    model = adapted(Attention(), lora_dropout=0.5 if change == "eval" else 0.0)
    alone, together = patched(model, False), patched(model, True)
    x, dy = inputs(F32)
    run(together, x, dy)
    results = []
    for each in (alone, together):
        attention(each).between = changing(attention(each).k, change)
        torch.manual_seed(5)
        with torch.enable_grad():
            parts = each(x.clone()).split(list(N.values()), -1)
        results.append(parts[1] if change == "eval" else torch.cat(parts, -1))
    assert shared_calls == [3]
    assert torch.equal(*results)
    assert "its parameters changed since" in explained(together) or change == "x"


def changing(layer: Any, change: str) -> Callable[[Tensor], None]:
    """Something that changes what ``layer`` will compute."""

    @torch.no_grad()
    def between(x: Tensor) -> None:
        parts = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight, "x": x}
        if change in parts:
            parts[change].mul_(2.0)
        elif change == "weight":
            layer.base_layer.weight = nn.Parameter(layer.base_layer.weight * 2, requires_grad=False)
        elif change == "scaling":
            layer.scaling["default"] = 7.0
        elif change == "eval":
            layer.eval()
        elif change == "frozen":
            layer.requires_grad_(False)

    return (lambda x: torch.set_grad_enabled(False)) if change == "no_grad" else between


def test_parameters_changed_in_place_between_the_calls_raise_in_backward(shared_calls: list[int]) -> None:
    together = patched(adapted(Attention()), True)
    x, dy = inputs(F32)
    run(together, x, dy)
    attention(together).between = changing(attention(together).k, "A")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(together, x, dy)
    assert shared_calls == [3]


@pytest.mark.parametrize("used", [["q"], ["k"], ["q", "v"], ["k", "v"]])
def test_a_backward_pass_through_some_of_the_results(used: list[str], shared_calls: list[int]) -> None:
    model = adapted(Attention(), lora_dropout=0.3)
    alone, together = patched(model, False), patched(model, True)
    x, dy = inputs(F32)
    run(together, x, dy)
    grads = []
    for each in (alone, together):
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        parts = dict(zip(N, each(leaf).split(list(N.values()), -1), strict=True))
        torch.cat([parts[name] for name in used], -1).square().sum().backward()
        grads.append({name: p.grad for name, p in each.named_parameters()} | {"leaf": leaf.grad})
    assert shared_calls == [3]
    for name, expected in grads[0].items():
        found = grads[1][name]
        if name == "leaf":
            torch.testing.assert_close(found, expected)
        else:
            assert (found is None) == (expected is None)
            assert expected is None or torch.equal(found, expected), name


def test_derivatives_of_derivatives_raise_and_batches_of_gradients_work(shared_calls: list[int]) -> None:
    together = patched(adapted(Attention(), lora_dropout=0.3), True)
    x, dy = inputs(F32)
    run(together, x, dy)
    leaf = x.clone().requires_grad_()
    y = together(leaf)
    assert shared_calls == [3]
    A = attention(together).v.lora_A["default"].weight
    batch = torch.stack([dy, 2 * dy])
    batched = torch.autograd.grad(y, [leaf, A], batch, is_grads_batched=True, retain_graph=True)
    for one in range(2):
        for found, expected in zip(
            batched, torch.autograd.grad(y, [leaf, A], batch[one], retain_graph=True), strict=True
        ):
            torch.testing.assert_close(found[one], expected)
    (first,) = torch.autograd.grad(y, A, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_keep_what_they_kept(reentrant: bool, shared_calls: list[int]) -> None:
    model = adapted(Attention(), lora_dropout=0.3)
    alone, together = patched(model, False), patched(model, True)
    x, dy = inputs(F32)
    for step in range(3):
        grads = []
        for each in (alone, together):
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            y = checkpoint(each, leaf, use_reentrant=reentrant)
            y.backward(dy)
            grads.append([leaf.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected)
    assert (len(shared_calls) > 0) == reentrant
    if not reentrant:
        assert "saved tensors go through hooks" in explained(together)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_llama_learns_as_with_the_layers_alone(p: float, shared_calls: list[int]) -> None:
    model = tiny_llama(**(ALL | {"lora_dropout": p}))
    alone, together = patched(model, False), patched(model, True)
    batches = [tokens() for _ in range(20)]
    losses = []
    for each in (alone, together):
        torch.manual_seed(1)
        losses.append(train(each, batches))
    torch.testing.assert_close(losses[1], losses[0])
    assert shared_calls == [3, 2] * 2 * 19  # q, k, v and gate, up of two blocks; the first step learns which


def test_a_token_and_an_unusual_call_go_alone(shared_calls: list[int]) -> None:
    model = adapted(Attention())
    alone, together = patched(model, False), patched(model, True)
    x = inputs(F32, (1, 1))[0]
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(together(x), alone(x))
    assert shared_calls == []
    assert "the call has few tokens" in explained(together)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(together(inputs(F32)[0]), together(inputs(F32)[0])) is False
    assert "tensors of inference mode" in explained(together)
    x, dy = inputs(F32)
    with torch.autocast("cpu", BF16):
        for _ in range(3):
            run(together, x, dy)
    attention(together).v.scaling["default"] = torch.tensor(2.0)
    for _ in range(3):
        run(together, x, dy)
    assert shared_calls == []


@pytest.mark.parametrize("config", [{"use_dora": True}, {"bias": "all"}, {"lora_bias": True}], ids=str)
def test_dora_and_trained_weights_go_alone(config: dict[str, Any], shared_calls: list[int]) -> None:
    model = adapted(Attention(), **config)
    alone, together = patched(model, False), patched(model, True)
    x, dy = inputs(F32)
    for _ in range(3):
        found, expected = run(together, x, dy), run(alone, x, dy)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert shared_calls == []


def test_a_compiled_model_computes_alone_without_a_break() -> None:
    model = adapted(Attention())
    alone, together = patched(model, False), patched(model, True)
    x, dy = inputs(F32)
    run(together, x, dy)
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    expected = run(alone, x, dy)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    (grad,) = torch.autograd.grad(y, leaf, dy)
    torch.testing.assert_close(y, expected["y"])
    torch.testing.assert_close(grad, expected["x"])


def test_copies_pickles_and_deleted_models(shared_calls: list[int]) -> None:
    x, dy = inputs(F32)
    together = patched(adapted(Attention()), True)
    del attention(together).between  # a lambda, which cannot be pickled
    attention(together).between = len
    run(together, x, dy)
    expected = run(together, x, dy)
    file = io.BytesIO()
    torch.save(together, file)
    file.seek(0)
    for other in (copy.deepcopy(together), torch.load(file, weights_only=False)):
        shared_calls.clear()
        run(other, x, dy)
        found = run(other, x, dy)
        assert shared_calls == [3]
        assert all(torch.equal(found[name], expected[name]) for name in found)
    gone = weakref.ref(attention(together).q)
    fastpeft.unpatch(together)
    assert "fastpeft_shares_input" not in vars(attention(together).q)
    del together
    gc.collect()
    assert gone() is None


def test_threads_do_not_take_each_others_results(shared_calls: list[int]) -> None:
    model = adapted(Attention())
    together = patched(model, True)
    data = [inputs(F32) for _ in range(4)]
    expected = [run(patched(model, False), *each) for each in data]
    run(together, *data[0])
    found: list[list[Results]] = [[] for _ in data]

    def work(i: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                found[i].append({"y": together(data[i][0])})

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared_calls
    for results, alone in zip(found, expected, strict=True):
        assert all(torch.equal(each["y"], alone["y"]) for each in results) and len(results) == 20


def test_patch_without_it_takes_it_back_and_other_types_are_refused(shared_calls: list[int]) -> None:
    together = patched(adapted(Attention()), True)
    x, dy = inputs(F32)
    run(together, x, dy)
    with pytest.raises(TypeError, match="share_inputs must be True or False"):
        fastpeft.patch(together, share_inputs="all")  # type: ignore[arg-type]
    run(together, x, dy)
    assert shared_calls == [3]
    fastpeft.patch(together)
    run(together, x, dy)
    assert shared_calls == [3]


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation runs on the CPU")
@pytest.mark.parametrize("has_kernel", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_steps_of_a_gpu(
    p: float, has_kernel: bool, monkeypatch: pytest.MonkeyPatch, shared_calls: list[int]
) -> None:
    cuda_emulation.use(monkeypatch)
    cuda_emulation.library().set_has_lora_linear(has_kernel)
    try:
        model = adapted(Attention(dtype=BF16), lora_dropout=p, r=8)
        alone, together = patched(model, False, backend="cuda"), patched(model, True, backend="cuda")
        x, dy = inputs(BF16, (2, 70))
        run(together, x, dy)
        found, expected = run(together, x, dy), run(alone, x, dy)
        oracle = run(patched(model, False).double(), x.double(), dy.double()) if not p else None
    finally:
        cuda_emulation.library().set_has_lora_linear(False)
    assert shared_calls == [3]
    assert all(torch.equal(found[name], expected[name]) for name in found if name != "x")
    exact = expected["x"].double() if oracle is None else oracle["x"]
    assert_close_as_eager(found["x"], exact, expected["x"] if oracle is not None else found["x"], "x")
