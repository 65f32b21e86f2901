"""A mixture of experts with LoRA on the stacked weights, shaped like Qwen3-MoE's: ``python -m fastpeft.bench.experts``.

The frozen experts of transformers, PEFT as it comes (``target_parameters``) and fastpeft by each backend that runs
here, on the same tokens sent to the same experts; of LoRA first whether fastpeft computes what PEFT does, as in
parity.py. ``--method qlora``: bitsandbytes has packed the experts of all but PEFT's, which cannot train these.
``--method dora`` and ``qdora``: without PEFT, which has no DoRA there. Rows are appended to
``bench/results/<machine>-experts.jsonl``, those of other methods than LoRA to ``<machine>-experts-<method>.jsonl``, and
the table beside them is drawn from the newest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

from fastpeft import dispatch
from fastpeft.experiments.memory import kept_bytes, peak_bytes
from fastpeft.experiments.models import FOUR_BIT_METHODS, METHODS
from fastpeft.experiments.timing import interleave, ratios, summary

from . import parity
from .cases import DEVICES, DTYPES, RANK, SEED
from .contestants import BASE, FASTPEFT, PEFT
from .measure import Run, record_kernels
from .table import spread

TOKENS = (64, 256, 1024, 2048, 4096)
ROUNDS = 20
PHASES = {"forward": "forward, with autograd", "step": "forward and backward"}
PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")
DORA_METHODS = ("dora", "qdora")
EXPERTS_METHODS = ("lora", "qlora", *DORA_METHODS)


class Shape(NamedTuple):
    """Experts, how many of them a token goes to, and an expert's sizes."""

    experts: int
    chosen: int
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        return f"{self.experts} experts of {self.hidden}×{self.intermediate}, {self.chosen} a token"


SHAPES = {"small": Shape(32, 4, 512, 256), "qwen3-30b": Shape(128, 8, 2048, 768)}


class Block:
    """One contestant's experts on one case's tokens. Its phases are what the clock times."""

    def __init__(
        self, who: str, shape: Shape, tokens: int, dtype: str, method: str, device: str, backend: str | None = None
    ) -> None:
        torch.manual_seed(SEED)
        kind = DTYPES[dtype]
        self.model = _adapted(who, _frozen(shape, device).to(kind), method, backend)
        self.experts: Any = next(m for name, m in self.model.named_modules() if name.rpartition(".")[2] == "experts")
        generator = torch.Generator(device).manual_seed(SEED)
        x, dy = (torch.randn(tokens, shape.hidden, generator=generator, device=device) for _ in range(2))
        scores = torch.randn(tokens, shape.experts, generator=generator, device=device).softmax(1)
        weights, self.index = scores.topk(shape.chosen)
        self.dy = dy.to(kind)
        self.learned = [x.to(kind).requires_grad_(), (weights / weights.sum(1, keepdim=True)).to(kind).requires_grad_()]
        self.adapters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.learned += self.adapters

    def forward(self) -> Tensor:
        x, weights, *_ = self.learned
        y: Tensor = self.experts(x, self.index, weights)
        return y

    def step(self) -> None:
        for tensor in self.learned:
            tensor.grad = None
        self.forward().backward(self.dy)
        torch.autograd.graph.increment_version(self.adapters)  # as an optimizer does: DoRA's norm is stale

    def in_float64(self) -> Block:
        """The same, there, where torch has no grouped products."""
        self.model.double()
        for module in self.model.modules():
            config: Any = getattr(module, "config", None)
            if config is not None:
                config._experts_implementation = "eager"
        self.dy = self.dy.double()
        self.learned[:2] = [t.detach().double().requires_grad_() for t in self.learned[:2]]
        return self

    def results(self) -> dict[str, Tensor]:
        """What comes out, and the gradients, those of all A and of all B together."""
        self.step()
        grads = {"dx": self.learned[0].grad, "dweights": self.learned[1].grad}
        for name in ("lora_A", "lora_B"):
            some = [p.grad.flatten() for key, p in self.model.named_parameters() if name in key and p.grad is not None]
            grads[f"d{name[-1]}"] = torch.cat(some)
        return {"y": self.forward().detach()} | {name: grad for name, grad in grads.items() if grad is not None}

    def memory(self) -> dict[str, int]:
        """Bytes that the forward pass keeps, and the most that there are in a step, weights included."""
        peak = peak_bytes(self.model, torch.optim.SGD(self.learned), self.step)
        return {"kept": kept_bytes(self.model, self.forward), "peak": peak}


def _frozen(shape: Shape, device: str) -> nn.Module:
    """Transformers' experts as it runs them unless asked otherwise, by grouped products."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {"hidden_size": shape.hidden, "moe_intermediate_size": shape.intermediate, "num_experts": shape.experts}
    with torch.device(device):
        experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, experts_implementation="grouped_mm"))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[2] ** -0.5)
    return nn.ModuleDict({"experts": experts}).requires_grad_(False)


def _adapted(who: str, base: nn.Module, method: str, backend: str | None) -> nn.Module:
    import peft
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    import fastpeft

    model, experts = base, base.get_submodule("experts")
    if who != BASE.name:
        config = peft.LoraConfig(r=RANK, target_modules=[], target_parameters=list(PARAMETERS), init_lora_weights=False)
        model = peft.get_peft_model(base, config)
    if method in FOUR_BIT_METHODS and who != PEFT.name:
        for name in PARAMETERS:
            replace_parameter_4bit(experts, name.rpartition(".")[2], compress_statistics=True)
    if who == FASTPEFT.name:
        report = fastpeft.patch(model, backend=backend, experts_dora=method in DORA_METHODS)
        if report.left_to_peft:
            raise RuntimeError(f"fastpeft did not fuse the experts:\n{report}")
    return model


def backends(shape: Shape, dtype: str, device: str) -> list[str]:
    """Those with kernels for such experts on this machine."""
    weight = torch.empty(1, shape.intermediate, shape.hidden, device=device, dtype=DTYPES[dtype])
    ours = [each for each in dispatch.BACKENDS if each.name != "reference" and each.device == device]
    return [each.name for each in ours if not (each.unavailable() or each.refuses(weight[0], weight, []))]


def measure(
    shape: Shape, tokens: Sequence[int], dtypes: Sequence[str], method: str, device: str, rounds: int, run: Run
) -> Iterator[dict[str, Any]]:
    """A row for every dtype, number of tokens, backend and phase."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    names = [who.name for who in ((BASE, FASTPEFT) if method in DORA_METHODS else (BASE, PEFT, FASTPEFT))]
    for dtype, count in product(dtypes, tokens):
        case = shape, count, dtype, method, device
        for backend in backends(shape, dtype, device):
            blocks = {name: Block(name, *case, backend if name == FASTPEFT.name else None) for name in names}
            verdict = None
            if method == "lora":
                truth = Block(PEFT.name, *case).in_float64().results()
                verdict = parity.judge(truth, blocks[PEFT.name].results(), blocks[FASTPEFT.name].results())
            memory = {name: block.memory() for name, block in blocks.items()}
            for phase in PHASES:
                samples = interleave({name: getattr(block, phase) for name, block in blocks.items()}, rounds, wait)
                wall = {name: each.wall for name, each in samples.items()}
                yield {
                    **run.facts(),
                    "shape": shape._asdict(),
                    "rank": RANK,
                    "method": method,
                    "dtype": dtype,
                    "tokens": count,
                    "phase": phase,
                    "backend": backend,
                    "parity": verdict,
                    "rounds": len(wall[FASTPEFT.name]),
                    "seconds": {name: summary(each) for name, each in wall.items()},
                    **{f"over_{name}": summary(ratios(wall[FASTPEFT.name], wall[name])) for name in names[:-1]},
                    "bytes": memory,
                }


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of each and fastpeft's over the others', with quartiles; MiB kept for the backward pass and at the
    most."""
    first, labels = found[0], {BASE.name: "base", PEFT.name: "PEFT", FASTPEFT.name: "fastpeft"}
    who = [name for name in labels if name in first["seconds"]]
    others = who[:-1]
    method = first.get("method", "lora")
    where = first["machine"].get("gpu") or f"{first['machine']['cpu']}, {first['threads']} threads"
    packed = f" {' and '.join(labels[name] for name in who if name != PEFT.name)} hold the weights in NF4."
    lines = [
        f"{where}, {first['run'][:10]}, commit {str(first['commit'])[:9]}, PEFT {first['versions']['peft']}. "
        f"{Shape(**first['shape'])}; {METHODS[method]} of rank {first['rank']} on both stacks of weights; medians over "
        f"{first['rounds']} rounds, in ms. Kept: MiB for the backward pass; peak: the most MiB in a step, weights "
        f"included; {' / '.join(labels[name] for name in who)}.{packed if method in FOUR_BIT_METHODS else ''}",
        "",
        f"| dtype | tokens | backend | | {' | '.join(labels[name] for name in who)} | "
        f"{' | '.join(f'/ {labels[name]}' for name in others)} | kept | peak |",
        f"|---|---:|---|---|{'---:|' * (len(who) + len(others) + 2)}",
    ]
    for row in found:
        times = " | ".join(f"{row['seconds'][name]['median'] * 1e3:.2f}" for name in who)
        passed = (row.get("parity") or {"passed": True})["passed"]  # of LoRA it was asked
        over = " | ".join(spread(row[f"over_{name}"]) if passed else "parity fails" for name in others)
        memory = " | ".join(
            " / ".join(f"{row['bytes'][name][kind] / 2**20:.1f}" for name in who) for kind in ("kept", "peak")
        )
        what = f"{row['dtype']} | {row['tokens']} | {row.get('backend', 'cpu')} | {PHASES[row['phase']]}"
        lines.append(f"| {what} | {times} | {over} | {memory} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--rounds", type=click.IntRange(min=2), default=ROUNDS, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench/results"))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="small", show_default=True)
@click.option(
    "--tokens", type=click.IntRange(min=1), multiple=True, help=f"Repeatable.  [{', '.join(map(str, TOKENS))}]"
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Repeatable.  [fp32, bf16]")
@click.option("--method", type=click.Choice(EXPERTS_METHODS), default="lora", show_default=True)
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)
def command(
    rounds: int, out: Path, shape: str, tokens: Sequence[int], dtypes: Sequence[str], method: str, device: str
) -> None:
    """Times experts with adapters against PEFT's and against the frozen ones."""

    def rows(run: Run) -> Iterator[dict[str, Any]]:
        return measure(SHAPES[shape], tokens or TOKENS, dtypes or ("fp32", "bf16"), method, device, rounds, run)

    record_kernels("experts" if method == "lora" else f"experts-{method}", rows, markdown, out, device)


if __name__ == "__main__":
    command()
