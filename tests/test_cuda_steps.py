"""The CUDA backend's step where it has ``lora_linear``: on such a GPU, or with a stand-in for that kernel on the CPU.
What the step launches is counted; each launch costs the GPU microseconds, and the host more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import cuda_emulation
import pytest
import torch
from cases import Case
from devices import DEVICE, run
from gpu_suite import over_4_bits
from oracle import Expected, LoraInputs
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastpeft
from fastpeft import extension, ops, usual

M, K, N = 150, 72, 136  # tiles of lora_linear that end within it
FUSED = {
    "lora": Case(M, K, N),
    "without bias": Case(M, K, N, bias=False),
    "adapters": Case(M, K, N, ranks=(8, 3)),
    "odd rank": Case(M, K, N, ranks=(5,), adapter_dtype=torch.bfloat16),
    "many ranks": Case(M, K, N, ranks=(70,)),
    "many ranks, dropout": Case(M, K, N, ranks=(70,), dropout_p=0.3),
    "many ranks, dora": Case(M, K, N, ranks=(70,), dora=True),
    "many tokens": Case(8200, 16, 24),
    "dropout": Case(M, K, N, dropout_p=0.3),
    "transposed": Case(M, K, N, dropout_p=0.3, weight_layout="transposed"),
    "mixed": Case(M, K, N, ranks=(8, 3), dropout_p=0.3, mixed=True),
    "dora": Case(M, K, N, dora=True),
    "rows apart": Case(M, K, N, dora=True, x_layout="row_stride", dy_layout="row_stride"),
}
NF4 = ("nf4", 64, True)
# What torch does without a launch.
FREE = {"empty", "empty_strided", "view", "reshape", "_reshape_alias", "narrow", "slice", "select", "as_strided"}
FREE |= {"transpose", "t", "unsqueeze", "to", "_to_copy", "resolve_conj"}


@pytest.fixture(autouse=True)
def fuses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU the stand-in is taken."""
    if DEVICE == "cuda":
        if not extension.cuda().has_lora_linear(0):
            pytest.skip("this GPU has no lora_linear")
        yield
        return
    cuda_emulation.use(monkeypatch)
    cuda_emulation.library().set_has_lora_linear(True)
    yield
    cuda_emulation.library().set_has_lora_linear(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_the_fused_step_is_as_close_as_eager(case: Case, dtype: torch.dtype) -> None:
    Expected.of(lambda: replace(case, dtype=dtype).inputs()).assert_met_by(lambda i: run(i, "cuda"))


@pytest.mark.parametrize("dora", [False, True], ids=["qlora", "qdora"])
def test_the_fused_step_over_4_bits_is_as_close_as_eager(dora: bool) -> None:
    def make() -> LoraInputs:
        return over_4_bits(M, 128, NF4, torch.bfloat16, dora, N=N)

    Expected.of(make).assert_met_by(lambda i: run(i, "cuda"))


def launches_of(call: Callable[[], object]) -> tuple[int, list[str]]:
    """How many kernels of ours ``call`` launches, and the names of torch's."""
    library = cuda_emulation.library()
    before = library.launches()
    with pytest.MonkeyPatch.context() as patch, profile(activities=[ProfilerActivity.CPU]) as found:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # which conftest.py has it do
        call()
    names = [event.name.removeprefix("aten::") for event in found.events() if event.name.startswith("aten::")]
    return library.launches() - before, [name for name in names if name not in FREE]


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation counts")
@pytest.mark.parametrize(
    ("make", "forward", "backward"),
    [
        pytest.param(Case(M, K, N, dtype=torch.bfloat16).inputs, 2, 4, id="lora"),
        pytest.param(Case(M, K, N, dtype=torch.bfloat16, dropout_p=0.3).inputs, 2, 4, id="lora, dropout"),
        pytest.param(Case(M, K, N, dtype=torch.bfloat16, ranks=(8, 3)).inputs, 3, 7, id="two adapters"),
        pytest.param(Case(M, K, N, dtype=torch.bfloat16, dora=True).inputs, 2, 4, id="dora"),
        pytest.param(lambda: over_4_bits(M, 128, NF4, torch.bfloat16, N=N), 3, 5, id="qlora"),
        pytest.param(lambda: over_4_bits(M, 128, NF4, torch.bfloat16, True, N=N), 3, 5, id="qdora"),
    ],
)
def test_a_step_launches_nothing_but_its_kernels(make: Callable[[], LoraInputs], forward: int, backward: int) -> None:
    i = make()
    _, u, z = ops.lora_linear(*i.call().flat(), "cuda")
    needs = [True, False, False] + [True] * (2 * len(i.A) + len(i.c))
    assert launches_of(lambda: ops.lora_linear(*i.call().flat(), "cuda")) == (forward, [])
    assert launches_of(lambda: ops.lora_linear_backward(*i.backward_call(u, z, needs).flat(), "cuda")) == (backward, [])


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation counts")
@pytest.mark.parametrize(("p", "seeds"), [(0.0, []), (0.1, ["randint", "random_"])])
@pytest.mark.parametrize(("kind", "forward", "step"), [("LoRALinear", 2, 6), ("QLoRALinear", 3, 8)])
def test_a_layer_adds_no_launch_but_its_seeds(kind: str, forward: int, step: int, p: float, seeds: list[str]) -> None:
    linear = nn.Linear(128, N, dtype=torch.bfloat16)
    layer = getattr(fastpeft.nn, kind).from_linear(linear, r=8, alpha=16, dropout=p, backend="cuda")
    x, dy = torch.randn(M, 128, dtype=torch.bfloat16, requires_grad=True), torch.randn(M, N, dtype=torch.bfloat16)
    learned = [x, *(t for t in layer.parameters() if t.requires_grad)]
    assert launches_of(lambda: layer(x)) == (forward, seeds)
    assert launches_of(lambda: torch.autograd.grad(layer(x), learned, dy)) == (step, seeds)


@pytest.mark.parametrize("kind", ["LoRALinear", "DoRALinear", "QLoRALinear"])
def test_a_usual_call_is_one_step_of_cpp(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's way through checks, dispatch and autograd gives the same bits."""
    linear = nn.Linear(128, N, dtype=torch.bfloat16, device=DEVICE)
    layer = getattr(fastpeft.nn, kind).from_linear(linear, r=8, alpha=16, backend="cuda")
    x, dy = (torch.randn(M, n, dtype=torch.bfloat16, device=DEVICE) for n in (128, N))
    learned = [x.requires_grad_(), *(t for t in layer.parameters() if t.requires_grad)]

    def results() -> list[torch.Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, learned, dy)]

    with monkeypatch.context() as patch:
        patch.setattr(usual, "lora_linear", lambda *_: None)
        expected = results()
    monkeypatch.setattr(ops, "call_lora_linear", None)
    assert all(map(torch.equal, results(), expected))


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation counts")
def test_elsewhere_the_vendors_product_and_one_pass_take_its_place() -> None:
    cuda_emulation.library().set_has_lora_linear(False)
    i = Case(M, K, N, dtype=torch.bfloat16, dropout_p=0.3).inputs()
    _, u, z = ops.lora_linear(*i.call().flat(), "cuda")
    backward = i.backward_call(u, z, [True, False, False, True, True]).flat()
    assert launches_of(lambda: ops.lora_linear(*i.call().flat(), "cuda")) == (2, ["mm"])
    assert launches_of(lambda: ops.lora_linear_backward(*backward, "cuda")) == (4, ["mm"])


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation counts")
@pytest.mark.parametrize(("tokens", "ranks", "ours"), [(M, 70, 2), (2048, 8, 4), (8192, 8, 2)])
def test_torch_multiplies_by_many_ranks_and_sums_many_tokens(tokens: int, ranks: int, ours: int) -> None:
    i = Case(tokens, 16, 24, dtype=torch.bfloat16, ranks=(ranks,)).inputs()
    _, u, z = ops.lora_linear(*i.call().flat(), "cuda")
    backward = i.backward_call(u, z, [True, False, False, True, True]).flat()
    launches = [launches_of(lambda: ops.lora_linear(*i.call().flat(), "cuda"))]
    launches.append(launches_of(lambda: ops.lora_linear_backward(*backward, "cuda")))
    assert sum(count for count, _ in launches) == ours
    assert sum(names.count("mm") for _, names in launches) == {2: 4, 4: 2}[ours]


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation counts")
def test_what_torch_launches_is_counted() -> None:
    a = torch.ones(3, 3)
    assert launches_of(lambda: torch.mm(a.t(), a).view(9).to(torch.bfloat16).neg_()) == (0, ["mm", "copy_", "neg_"])
