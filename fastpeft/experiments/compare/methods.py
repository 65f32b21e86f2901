"""The methods that are compared: what each one is, how a model is given it, at which learning rate it learns.

PEFT's implementation wherever PEFT has one; what it lacks comes from :mod:`fastpeft.methods`. docs/methods.md has each
one's equation. PEFT takes seconds to import; the functions that need it do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...methods import BitFit, Houlsby, LoReFT, Pfeiffer, apply
from ...methods.applied import HEADS
from ...methods.blocks import find_blocks
from ..four_bit import DENSE, to_four_bit
from .rows import FULL, UNTRAINED

Settings = Mapping[str, Any]
RANKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Situation:
    """What a method may depend on beside its own settings: the kind of the task, and the number of training steps."""

    kind: str
    steps: int


@dataclass(frozen=True)
class Adapted:
    """A model about to be trained by a method.

    Attributes:
        model: what is called, trained and evaluated.
        engine: whose code the method is: ``torch``, ``peft`` or ``fastpeft.methods``.
        save: writes what a user would keep of the training to a folder.
        merges: whether PEFT's ``merge_and_unload`` makes a plain model of it.
    """

    model: nn.Module
    engine: str
    save: Callable[[Path], object]
    merges: bool = False


@dataclass(frozen=True)
class Method:
    """A method as it is compared.

    Attributes:
        title: of a line in a table.
        line: what it is, in one line.
        adapt: freezes a model, adds what is trained.
        learning_rate: AdamW's at its peak; docs/compare.md says where it comes from.
        settings: what ``adapt`` is given.
        sweeps: other values of single settings that ``--grid`` tries.
        four_bit: whether its frozen weights are quantized.
    """

    title: str
    line: str
    adapt: Callable[[nn.Module, Settings, Situation], Adapted]
    learning_rate: float
    settings: Settings = field(default_factory=dict)
    sweeps: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    four_bit: bool = False

    def with_settings(self, **changed: Any) -> Method:
        """The same method with some settings changed."""
        return replace(self, settings={**self.settings, **changed})


def is_head(name: str) -> bool:
    """Whether a parameter of this name belongs to the task's own layers, which every method trains."""
    return any(part in HEADS for part in name.split("."))


def _train_only(model: nn.Module, wanted: Callable[[str], bool]) -> Adapted:
    """``model`` with the parameters whose names are ``wanted`` and the head trainable."""
    from safetensors.torch import save_file

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name) or is_head(name))

    def save(folder: Path) -> None:
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, str(folder / "model.safetensors"))

    return Adapted(model, "torch", save)


def _full(model: nn.Module, settings: Settings, situation: Situation) -> Adapted:
    return _train_only(model, lambda name: True)


def _untrained(model: nn.Module, settings: Settings, situation: Situation) -> Adapted:
    return _train_only(model, lambda name: False)


def _head(model: nn.Module, settings: Settings, situation: Situation) -> Adapted:
    if not any(is_head(name) for name, _ in model.named_parameters()):
        raise ValueError("the model has no head of its own: a language model predicts by its embeddings")
    return _train_only(model, lambda name: False)


def _top(model: nn.Module, settings: Settings, situation: Situation) -> Adapted:
    top = tuple(f"{block.name}." for block in find_blocks(model)[-settings["layers"] :])
    return _train_only(model, lambda name: name.startswith(top))


def _ours(config: Callable[..., Any]) -> Callable[[nn.Module, Settings, Situation], Adapted]:
    def adapt(model: nn.Module, settings: Settings, situation: Situation) -> Adapted:
        applied = apply(model, config(**settings))
        return Adapted(model, "fastpeft.methods", applied.save)

    return adapt


def _peft(
    config: Callable[[nn.Module, Settings, Situation], Any], *, four_bit: bool = False, merges: bool = True
) -> Callable[[nn.Module, Settings, Situation], Adapted]:
    def adapt(model: nn.Module, settings: Settings, situation: Situation) -> Adapted:
        import peft

        made = config(model, settings, situation)
        made.task_type = peft.TaskType.CAUSAL_LM if situation.kind == "language" else peft.TaskType.SEQ_CLS
        if four_bit:
            to_four_bit(model, lambda name: name not in DENSE)
        adapted = peft.get_peft_model(model, made)
        return Adapted(adapted, "peft", adapted.save_pretrained, merges)

    return adapt


def _targets(model: nn.Module, which: str) -> list[str] | str | None:
    """Of PEFT's ``target_modules``: None lets PEFT choose, which is q and v nearly everywhere."""
    if which == "all-linear":
        return "all-linear"
    if which == "attention":
        return [
            f"{block.name}.{name}"
            for block in find_blocks(model)
            for name, module in block.module.named_modules()
            if isinstance(module, nn.Linear) and "att" in name
        ]
    return None


def _lora(model: nn.Module, settings: Settings, situation: Situation) -> Any:
    import peft

    rank, others = settings["rank"], {k: v for k, v in settings.items() if k not in ("rank", "alpha", "targets")}
    return peft.LoraConfig(
        r=rank,
        lora_alpha=settings.get("alpha", 2 * rank),
        lora_dropout=0.05,
        target_modules=_targets(model, settings["targets"]),
        **others,
    )


def _adalora(model: nn.Module, settings: Settings, situation: Situation) -> Any:
    import peft

    rank, steps = settings["rank"], situation.steps
    first = (3 * rank + 1) // 2
    return peft.AdaLoraConfig(
        init_r=first,
        target_r=rank,
        lora_alpha=2 * first,  # PEFT divides it by the first rank
        lora_dropout=0.05,
        tinit=steps // 10,
        tfinal=steps // 5,
        total_step=max(steps, 1),
        target_modules="all-linear",
    )


def _vera(model: nn.Module, settings: Settings, situation: Situation) -> Any:
    import peft

    return peft.VeraConfig(r=settings["rank"], target_modules="all-linear", vera_dropout=0.05)


def _of_peft(name: str, **constant: Any) -> Callable[[nn.Module, Settings, Situation], Any]:
    """The configuration class of this name, with the method's settings as they are."""

    def make(model: nn.Module, settings: Settings, situation: Situation) -> Any:
        import peft

        return getattr(peft, name)(**constant, **settings)

    return make


def _norms(model: nn.Module, settings: Settings, situation: Situation) -> Any:
    import peft

    norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    return peft.LNTuningConfig(target_modules=norms)


def _prefix(model: nn.Module, settings: Settings, situation: Situation) -> Any:
    import peft

    return peft.PrefixTuningConfig(num_virtual_tokens=settings["tokens"])


def _prompt(model: nn.Module, settings: Settings, situation: Situation) -> Any:
    import peft

    return peft.PromptTuningConfig(num_virtual_tokens=settings["tokens"])


def _p_tuning(model: nn.Module, settings: Settings, situation: Situation) -> Any:
    import peft

    return peft.PromptEncoderConfig(num_virtual_tokens=settings["tokens"], encoder_hidden_size=settings["hidden"])


def _lora_method(title: str, line: str, learning_rate: float = 1e-3, **settings: Any) -> Method:
    sweeps = {"rank": RANKS, "alpha": (8, 16, 64), "targets": ("all-linear", "attention", "default")}
    return Method(title, line, _peft(_lora), learning_rate, {"rank": 16, "targets": "all-linear", **settings}, sweeps)


def _quantized(method: Method, title: str, line: str) -> Method:
    return replace(method, title=title, line=line, adapt=_peft(_lora, four_bit=True), four_bit=True)


_LORA = _lora_method("LoRA, r = 16", "low-rank updates of every linear layer's weight (Hu et al., 2021)")
_DORA = _lora_method(
    "DoRA, r = 16", "LoRA for each row's direction, its length by itself (Liu et al., 2024)", use_dora=True
)
_BOTTLENECKS, _TOKENS = {"bottleneck": (8, 16, 32, 64, 128)}, {"tokens": (5, 10, 20, 50)}

METHODS: Mapping[str, Method] = {
    UNTRAINED: Method("untrained", "the model as it comes, its new head drawn at random", _untrained, 0.0),
    FULL: Method("full fine-tuning", "every parameter is trained", _full, 3e-4),
    "head": Method("head alone", "the classifier on frozen features: linear probing", _head, 1e-1),
    "top": Method("top layer", "the last layers and the head", _top, 1e-3, {"layers": 1}, {"layers": (1, 2, 3)}),
    "lora": _LORA,
    "lora-r8": _lora_method("LoRA, r = 8", "LoRA at half the rank", rank=8),
    "lora-r32": _lora_method("LoRA, r = 32", "LoRA at twice the rank", rank=32),
    "lora-attention": _lora_method("LoRA, attention", "LoRA on attention's layers alone", targets="attention"),
    "lora-default": _lora_method(
        "LoRA, q and v", "LoRA on the layers that PEFT chooses, mostly q and v", targets="default"
    ),
    "rslora": _lora_method(
        "rsLoRA, r = 16", "LoRA scaled by alpha / sqrt(r), here by 4 (Kalajdzievski, 2023)", use_rslora=True, alpha=16
    ),
    "dora": _DORA,
    "dora-half": replace(_DORA.with_settings(rank=8), title="DoRA, r = 8", line="DoRA at half the rank of LoRA"),
    "qlora": _quantized(_LORA, "QLoRA, r = 16", "LoRA over a base in NF4, statistics nested (Dettmers et al., 2023)"),
    "qdora": _quantized(_DORA, "QDoRA, r = 16", "DoRA over a base in NF4"),
    "adalora": Method(
        "AdaLoRA, r = 16",
        "LoRA whose ranks go where they matter (Zhang et al., 2023)",
        _peft(_adalora),
        1e-2,
        {"rank": 16},
        {"rank": RANKS},
    ),
    "vera": Method(
        "VeRA, r = 256",
        "scales of frozen random factors, shared by all layers (Kopiczko et al., 2024)",
        _peft(_vera),
        3e-2,
        {"rank": 256},
        {"rank": (64, 128, 256, 512)},
    ),
    "lora-bitfit": _lora_method("LoRA + BitFit", "LoRA, and every bias", bias="all"),
    "ia3": Method(
        "(IA)³", "scales of keys, values and feed-forward (Liu et al., 2022)", _peft(_of_peft("IA3Config")), 3e-2
    ),
    "loha": Method(
        "LoHa, r = 16",
        "Hadamard products of two low-rank updates (Hyeon-Woo et al., 2022)",
        _peft(_of_peft("LoHaConfig", target_modules="all-linear", alpha=16)),
        9e-3,
        {"r": 16},
    ),
    "oft": Method(
        "OFT, blocks of 32",
        "orthogonal rotations of a layer's input (Qiu et al., 2023)",
        _peft(_of_peft("OFTConfig", target_modules="all-linear", r=0)),
        1e-3,
        {"oft_block_size": 32},
    ),
    "ln-tuning": Method("LayerNorm tuning", "the norms' scales and shifts (Zhao et al., 2024)", _peft(_norms), 1e-2),
    "prefix": Method(
        "prefix tuning",
        "learnt keys and values before the text (Li and Liang, 2021)",
        _peft(_prefix, merges=False),
        3e-2,
        {"tokens": 20},
        _TOKENS,
    ),
    "prompt": Method(
        "prompt tuning",
        "learnt embeddings before the text (Lester et al., 2021)",
        _peft(_prompt, merges=False),
        1e-1,
        {"tokens": 20},
        _TOKENS,
    ),
    "p-tuning": Method(
        "P-tuning",
        "learnt embeddings through a small network (Liu et al., 2021)",
        _peft(_p_tuning, merges=False),
        3e-3,
        {"tokens": 20, "hidden": 128},
        _TOKENS,
    ),
    "houlsby": Method(
        "Houlsby adapters",
        "bottlenecks after attention and feed-forward (Houlsby et al., 2019)",
        _ours(Houlsby),
        3e-3,
        {"bottleneck": 32},
        _BOTTLENECKS,
    ),
    "pfeiffer": Method(
        "Pfeiffer adapters",
        "one bottleneck after the feed-forward (Pfeiffer et al., 2020)",
        _ours(Pfeiffer),
        3e-3,
        {"bottleneck": 64},
        _BOTTLENECKS,
    ),
    "bitfit": Method("BitFit", "the biases alone (Ben Zaken et al., 2021)", _ours(BitFit), 3e-3),
    "loreft": Method(
        "LoReFT, r = 4",
        "low-rank edits of hidden states (Wu et al., 2024)",
        _ours(LoReFT),
        3e-3,
        {"rank": 4, "positions": "f4+l4"},
        {"rank": (1, 2, 4, 8, 16)},
    ),
}
