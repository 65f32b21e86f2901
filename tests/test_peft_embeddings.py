"""LoRA and DoRA on embeddings: PEFT's numbers and gradients, DoRA's norm kept, and nothing of the vocabulary's size."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import EmbeddingNF4
from largest import Largest
from oracle import Results, assert_close_as_eager
from peft.tuners.lora.layer import Embedding
from peft_layers import add_adapter, layer_of, lora_model, no_peft_forward, signed, tiny_llama_base, tokens, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import fastpeft
from fastpeft.dispatch import BackendRefusal
from fastpeft.experiments.memory import kept_bytes
from fastpeft.peft.embeddings import FusedEmbedding

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F16, F16), (F32, BF16), (torch.float64, F32)]
V, D = 301, 72
DORA = {"use_dora": True}
DRAWS = 4

per_dtype = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
lora_and_dora = pytest.mark.parametrize("config", [{}, DORA], ids=["lora", "dora"])


def drawn(*shape: int) -> Tensor:
    """Numbers of tokens."""
    return torch.randint(V, shape or (3, 11))


def results(model: nn.Module, ids: Tensor, dy: Tensor) -> Results:
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = layer_of(model)(ids)
    grads = torch.autograd.grad(y, list(learned.values()), dy.to(y.dtype), allow_unused=True)
    named = zip(learned, grads, strict=True)
    return {"y": y.detach()} | {name: grad for name, grad in named if grad is not None}


def assert_as_close_as_peft(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    autocast: torch.dtype | None = None,
    draw: Callable[[], Tensor] = drawn,
) -> None:
    """Fused, the one embedding of ``model`` is as close to float64 as PEFT's, in the dtypes of PEFT's."""
    exact, fused = copy.deepcopy(model).double(), copy.deepcopy(model)
    assert fastpeft.patch(fused).left_to_peft == {}
    found: list[list[Results]] = [[], [], []]
    for _ in range(DRAWS):
        ids = draw()
        dy = signed(*ids.shape, D)
        found[1].append(results(exact, ids, dy.double()))
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            found[2].append(results(model, ids, dy))
            with no_peft_forward(monkeypatch):
                found[0].append(results(fused, ids, dy))
    for name, like in found[2][-1].items():
        assert found[0][-1][name].dtype == like.dtype, name
        assert_close_as_eager(*([result[name] for result in some] for some in found), name)


def without_long_tails(model: peft.PeftModel) -> peft.PeftModel:
    """See :func:`peft_layers.signed`; A and B weigh as much as W."""
    for name, parameter in model.named_parameters():
        if "magnitude" not in name:
            parameter.data.copy_(signed(*parameter.shape) / (1 if "base_layer" in name else 2))
    return model


def embedding_model(dtype: torch.dtype, adapter_dtype: torch.dtype, **config: Any) -> peft.PeftModel:
    """PEFT around an embedding alone."""
    return without_long_tails(lora_model(nn.Embedding(V, D, dtype=dtype), adapter_dtype, **config))


def several(dtype: torch.dtype, adapter_dtype: torch.dtype, *configs: dict[str, Any]) -> peft.PeftModel:
    """Adapters ``default``, ``second``, … of ranks of their own, all active and all trained."""
    model = lora_model(nn.Embedding(V, D, dtype=dtype), adapter_dtype, **configs[0])
    names = ["default", "second", "third"][: len(configs)]
    for i, name in enumerate(names[1:], 1):
        add_adapter(model, name, adapter_dtype, **({"r": 2 + 3 * i} | configs[i]))
    model.base_model.set_adapter(names)
    return without_long_tails(model)


@per_dtype
@lora_and_dora
def test_one_adapter(
    config: dict[str, Any], dtype: torch.dtype, adapter_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = embedding_model(dtype, adapter_dtype, **config)
    assert_as_close_as_peft(model, monkeypatch)


@per_dtype
@pytest.mark.parametrize(
    "configs",
    [({}, {}), (DORA, DORA), ({}, DORA), (DORA, {}, DORA)],
    ids=["lora", "dora", "dora_on_lora", "dora_on_lora_on_dora"],
)
def test_several_adapters(
    configs: tuple[dict[str, Any], ...],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_as_close_as_peft(several(dtype, adapter_dtype, *configs), monkeypatch)


@pytest.mark.parametrize("autocast", [BF16, F16])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (F32, BF16), (BF16, BF16)])
@lora_and_dora
def test_autocast(
    config: dict[str, Any],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    autocast: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = embedding_model(dtype, adapter_dtype, **config)
    assert_as_close_as_peft(model, monkeypatch, autocast)


@pytest.mark.parametrize("scale", [BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding])
@pytest.mark.parametrize("dtype", [F32, BF16])
@lora_and_dora
def test_rows_that_the_base_layer_scales(
    config: dict[str, Any], dtype: torch.dtype, scale: type[nn.Embedding], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = without_long_tails(lora_model(scale(V, D, 0, embed_scale=D**0.5).to(dtype), **config))
    assert_as_close_as_peft(model, monkeypatch)


@pytest.mark.parametrize("settings", [{"padding_idx": 7}, {"scale_grad_by_freq": True}], ids=str)
@lora_and_dora
def test_settings_of_the_base_layer(
    config: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = without_long_tails(lora_model(nn.Embedding(V, D, **settings), **config))
    often = torch.tensor([7, 7, 7, 8, 9])  # the padding, and a row that counts as many times
    assert_as_close_as_peft(model, monkeypatch, draw=lambda: torch.cat([often, drawn(28)]))


def test_the_padding_has_no_gradient() -> None:
    model = lora_model(nn.Embedding(V, D, padding_idx=7), **DORA)
    fastpeft.patch(model)
    grad = results(model, torch.tensor([7, 8]), signed(2, D))["base_model.model.0.lora_embedding_A.default"]
    assert grad.any(dim=0).nonzero().flatten().tolist() == [8]


@pytest.mark.parametrize("shape", [(), (33,), (3, 1, 11), (0,), (2, 0)], ids=str)
@lora_and_dora
def test_shapes_of_the_input(config: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedding_model(F32, F32, **config)
    assert_as_close_as_peft(model, monkeypatch, draw=lambda: torch.randint(V, shape, dtype=torch.int32))


@pytest.mark.parametrize("scaling", [torch.tensor(0.75), torch.tensor([0.75]), 2], ids=["0d", "1d", "int"])
@lora_and_dora
def test_scaling_may_be_a_tensor_and_may_change(
    config: dict[str, Any], scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = embedding_model(F32, F32, **config)
    for factor in (1.0, 3.0):
        layer_of(model).scaling["default"] = scaling * factor
        assert_as_close_as_peft(model, monkeypatch)


@pytest.mark.parametrize("wanted", ["embedding_A", "embedding_B", "magnitude", "base_layer.weight"])
def test_every_parameter_decides_on_its_own_gradient(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedding_model(F32, F32, **DORA)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted in name)
    assert_as_close_as_peft(model, monkeypatch)


@pytest.mark.parametrize("kind", ["mica", "rslora and a dropout, which PEFT leaves out"])
def test_other_kinds_of_lora(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"init_lora_weights": "mica"} if kind == "mica" else {"use_rslora": True, "lora_dropout": 0.5}
    model = embedding_model(F32, F32, **config)
    nn.init.normal_(layer_of(model).lora_embedding_A["default"])
    assert_as_close_as_peft(model, monkeypatch)


@lora_and_dora
def test_the_base_layer_is_called_as_it_is(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubling(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = without_long_tails(lora_model(Doubling(V, D), **config))
    assert_as_close_as_peft(model, monkeypatch)
    layer_of(model).base_layer.register_forward_hook(lambda module, args, y: y + 1)
    assert_as_close_as_peft(model, monkeypatch)
    seen: list[Tensor] = []
    layer_of(model).base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    fastpeft.patch(model)
    ids = drawn()
    layer_of(model)(ids)
    assert torch.equal(seen[0], layer_of(model).base_layer(ids)), "what the base layer gave was written to"


def test_a_base_layer_of_4_bits_decodes_its_rows_by_itself() -> None:
    model, ids = lora_model(EmbeddingNF4(V, 64).to("cpu")), drawn()
    expected = model(ids)
    assert fastpeft.patch(model).left_to_peft == {}
    torch.testing.assert_close(model(ids), expected)


def test_no_more_is_kept_than_by_peft() -> None:
    """Of LoRA each token's number and its columns of A. Of DoRA also the base layer's result, for the magnitude's
    gradient, and ``c B``; PEFT keeps a product of that size, too, and all of ``W + s B A``."""
    ids = drawn(2, 50)
    for dtype in (F32, BF16):
        lora, dora = (embedding_model(dtype, F32, **config) for config in ({}, DORA))
        expected = [kept_bytes(model, lambda model=model: model(ids)) for model in (lora, dora)]
        for model in (lora, dora):
            fastpeft.patch(model)
        kept = [kept_bytes(model, lambda model=model: model(ids)) for model in (lora, dora)]
        numbers, columns, vectors = 8 * ids.numel(), 4 * 4 * ids.numel(), 2 * 4 * D
        assert kept[0] == expected[0] == numbers + columns
        assert kept[1] == numbers + columns + dtype.itemsize * ids.numel() * D + 4 * 4 * D + vectors
        assert kept[1] < expected[1] - dtype.itemsize * V * D


def test_nothing_of_the_vocabularys_size_is_made() -> None:
    """In the forward pass, that is; the gradient of A is as large as A."""
    model = lora_model(nn.Embedding(4 * V, D), **DORA)
    ids, largest = drawn(2, 50), Largest()
    with Largest() as stock:
        model(ids)
    fastpeft.patch(model)
    with largest:
        model(ids)
    assert largest.elements == ids.numel() * D < stock.elements == 4 * V * D


def test_the_norm_is_computed_once_a_step(norms: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedding_model(F32, F32, **DORA)
    fastpeft.patch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with no_peft_forward(monkeypatch):
        for _ in range(3):
            for _ in range(4):
                model(drawn()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(norms) == 3


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@lora_and_dora
def test_twenty_steps_then_saved_and_reloaded_in_plain_peft(
    config: dict[str, Any], tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norms: list[None]
) -> None:
    base = tiny_llama_base()
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    settings = {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"} | config
    stock = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    double, fused = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    assert sum(name.endswith("embed_tokens") for name in fastpeft.patch(fused).fused) == 1
    batches = [tokens() for _ in range(4)] * 5
    norms.clear()
    with no_peft_forward(monkeypatch):
        losses = train(fused, batches)
    assert len(norms) == 3 * (20 - 1) * bool(config)  # of each layer; patch found the first
    assert_close_as_eager(losses, train(double, batches), train(stock, batches), "loss curve")
    assert losses[-4:].mean() < losses[:4].mean()

    fused.eval().save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids, double_reloaded = tokens(), copy.deepcopy(reloaded).double()
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (fused, double_reloaded, reloaded)]
    assert_close_as_eager(*logits, "logits")


@lora_and_dora
def test_merged_and_unmerged_by_peft(config: dict[str, Any]) -> None:
    model, ids = embedding_model(F32, F32, **config), drawn()
    fastpeft.patch(model)
    before = model(ids)
    for safely in (False, True):
        layer_of(model).merge(safe_merge=safely)
        assert "merged" in repr(model)
        torch.testing.assert_close(model(ids), before)
        layer_of(model).unmerge()
        assert "fused by fastpeft" in repr(model)
        torch.testing.assert_close(model(ids), before)


@lora_and_dora
def test_one_graph_whatever_the_scaling(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one turns the number into a symbol, as in PEFT's own layers."""
    torch.compiler.reset()
    model = embedding_model(BF16, F32, **config)
    stock, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fastpeft.patch(model)
    layer_of(model).compile(fullgraph=True, backend="aot_eager")
    for i, scale in enumerate((1.0, 3.0, 0.5, -1.1)):
        for each in (model, stock, exact):
            layer_of(each).set_scale("default", scale)
        ids, dy = drawn(), signed(3, 11, D)
        with no_peft_forward(monkeypatch), torch._dynamo.config.patch(error_on_recompile=i > 1):
            compiled = results(model, ids, dy)
        oracle, eager = results(exact, ids, dy.double()), results(stock, ids, dy)
        for name in eager:
            assert_close_as_eager(compiled[name], oracle[name], eager[name], name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = embedding_model(F32, F32, **DORA), drawn()
    fastpeft.patch(model)
    head = nn.Linear(D, 5)
    learned = [p for p in model.parameters() if p.requires_grad]
    dummy = torch.ones((), requires_grad=True)  # a re-entrant checkpoint asks its arguments for a gradient

    def loss(factor: Tensor) -> Tensor:
        return head(factor * model(ids)).square().sum()

    expected = torch.autograd.grad(loss(dummy), learned)
    with no_peft_forward(monkeypatch):
        checkpoint(loss, dummy, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(learned, expected, strict=True))


def test_copies_stay_fused_and_unpatch_gives_pefts_class_back() -> None:
    model, ids = embedding_model(F32, F32, **DORA), drawn()
    attributes = set(vars(layer_of(model)))
    fastpeft.patch(model)
    expected = model(ids)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(layer_of(copied)) is FusedEmbedding
        assert torch.equal(copied(ids), expected)
    fastpeft.unpatch(model)
    assert type(layer_of(model)) is Embedding
    assert set(vars(layer_of(model))) == attributes


def test_enable_and_get_peft_model_fuse_embeddings() -> None:
    with fastpeft.enabled():
        assert type(layer_of(embedding_model(F32, F32))) is FusedEmbedding
    settings = peft.LoraConfig(target_modules=["0"])
    model = fastpeft.get_peft_model(nn.Sequential(nn.Embedding(V, D)), settings)
    assert "lora.Embedding" in repr(model) and "fused by fastpeft" in repr(model)


def test_what_runs_it_in_words() -> None:
    lora, dora = embedding_model(F32, F32), embedding_model(F32, F32, **DORA)
    rows = "torch looks rows up and adds the adapters' part"
    for model, backend, verdict in (
        (lora, None, rows),
        (lora, "triton", rows),
        (dora, None, f"{rows}; the fastest backend that accepts the call takes DoRA's norm"),
        (dora, "reference", f"{rows}; reference, asked for by name, takes DoRA's norm"),
    ):
        fastpeft.patch(model, backend=backend)
        assert list(fastpeft.explain(model).verdicts.values()) == [verdict]
    with pytest.raises(BackendRefusal, match=r"backend='cuda' cannot run base_model\.model\.0: "):
        fastpeft.patch(dora, backend="cuda")
