"""A tiny Llama, or mixture of experts, trained by engines for many processes: by fastpeft, by plain PEFT, and by plain
PEFT in float64.

``torchrun --nproc_per_node 2 tests/engine_program.py ENGINE/METHOD ...`` prints for each pair, as a line of JSON, the
loss of each step over all processes for each of the three, how many calls of layers were fused, for how many sets of
layers at once, and how many went to PEFT, and for which reasons. engines.py starts it and judges.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from peft_experts import moe
from peft_layers import tiny_llama, tiny_llama_base, tokens
from test_peft_four_bit import four_bit_llama
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fastpeft
from fastpeft import usual
from fastpeft.peft.fused_experts import FusedParamWrapper
from fastpeft.peft.layers import FusedForward, operands_or_reason

STEPS = 20
COLUMNWISE = ["q_proj", "v_proj", "gate_proj"]  # with those that are sharded by row PEFT 0.21 raises as it trains
# All else is in 4 bits; "shared" is LoRA whose layers share inputs.
DENSE: dict[str, dict[str, Any]] = {"lora": {}, "shared": {}, "dora": {"use_dora": True}}


def shard(model: Any, **options: Any) -> nn.Module:
    """FSDP2, block by block."""
    for block in model.base_model.model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp1(model: nn.Module, policy: Callable[..., bool], use_orig_params: bool) -> nn.Module:
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=device)


class Run(NamedTuple):
    """A model as its engine trains it; ``step`` leaves no gradients behind."""

    model: Callable[..., Any]
    backward: Callable[[Tensor], object]
    step: Callable[[], object]


def by_torch(wrap: Callable[[Any], nn.Module], model: nn.Module) -> Run:
    wrapped = wrap(model)
    optimizer = sgd(wrapped)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Run(wrapped, Tensor.backward, step)


def by_deepspeed(stage: int, model: nn.Module) -> Run:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles one; gloo does as well
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # not even the smallest is kept whole
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    return Run(engine, engine.backward, engine.step)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


WRAPS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp-static": lambda model: DistributedDataParallel(model, static_graph=True),
    "ddp-unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "ddp-views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "fsdp2": shard,
    "fsdp2-mixed": lambda model: shard(
        model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ),
    "fsdp1": lambda model: fsdp1(
        model, functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}), True
    ),
    "fsdp1-adapters": lambda model: fsdp1(model, fsdp_auto_wrap_policy(model), False),
    "tensor-parallel": lambda model: model,  # it is loaded so
}
ENGINES: dict[str, Callable[[Any], Run]] = {
    **{name: functools.partial(by_torch, wrap) for name, wrap in WRAPS.items()},
    "zero2": functools.partial(by_deepspeed, 2),
    "zero3": functools.partial(by_deepspeed, 3),
}


def made(engine: str, method: str, exact: bool) -> peft.PeftModel:
    """The same model in each process and each time; ``exact``: in float64."""
    torch.manual_seed(0)
    if engine == "tensor-parallel":
        model = peft.get_peft_model(
            tiny_llama_base() if exact else tensor_parallel(),
            peft.LoraConfig(r=4, lora_alpha=8, target_modules=COLUMNWISE, **DENSE[method]),
        )
        return model.double() if exact else model
    if method == "experts":
        model = moe()
        if exact:  # torch has no grouped products in float64
            model.double().base_model.model.set_experts_implementation("eager")
        return model
    if method in DENSE:
        model = tiny_llama(**DENSE[method])
        return model.double() if exact else model
    model = four_bit_llama(method)
    if not exact:
        return model
    decoded = four_bit_llama(method, decoded=True)
    decoded.load_state_dict({n: p for n, p in model.named_parameters() if "lora_" in n}, strict=False)
    return decoded


def tensor_parallel() -> LlamaForCausalLM:
    """The model of :func:`tiny_llama_base`, its layers shared out as transformers plans it."""
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)
        tiny_llama_base().save_pretrained(folders[0])  # the first process does
        dist.barrier()
        config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
        model = LlamaForCausalLM.from_pretrained(folders[0], distributed_config=config)
        dist.barrier()
    return model


def train(run: Run, own_batches: bool) -> list[float]:
    """The mean loss over the processes; ``own_batches``: each has others."""
    torch.manual_seed(100 + own_batches * dist.get_rank())
    batches, losses = [tokens() for _ in range(4)] * (STEPS // 4), []
    for ids in batches:
        logits = run.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits.double(), ids[:, 1:].flatten())  # transformers rounds it to float32
        run.backward(loss)
        run.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def counted() -> tuple[Counter[str], set[str]]:
    """From now on the calls of layers that are fused, and that go to PEFT, and why they do."""
    counts: Counter[str] = Counter()
    reasons: set[str] = set()
    for kind, name in itertools.product((FusedForward, FusedParamWrapper), ("_run", "_by_peft")):
        own = getattr(kind, name)

        def counting(self: Any, *args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Tensor:
            counts[name] += 1
            if name == "_by_peft":
                reasons.add(str(operands_or_reason(self)))
            return own(self, *args, **kwargs)

        setattr(kind, name, counting)
    compute = usual.lora_shared_linear

    def counting_shared(*args: Any) -> list[Tensor] | None:
        found = compute(*args)
        counts["shared"] += found is not None
        return found

    usual.lora_shared_linear = counting_shared
    return counts, reasons


def results(engine: str, method: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for who in ("exact", "stock", "fused"):
        model = made(engine, method, who == "exact")
        if who == "fused":
            fastpeft.patch(model, share_inputs=method == "shared")
        run = ENGINES["ddp" if who == "exact" else engine](model)
        found[who] = train(run, engine != "tensor-parallel")
    return found


def main(*pairs: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    counts, reasons = counted()
    for pair in pairs:
        counts.clear()
        reasons.clear()
        found = results(*pair.split("/"))
        if dist.get_rank() == 0:
            found |= {"pair": pair, "calls": counts["_run"], "left": counts["_by_peft"], "reasons": sorted(reasons)}
            found["shared"] = counts["shared"]
            print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
