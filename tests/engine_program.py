"""A tiny Llama trained by an engine for many processes: by fastpeft, by plain PEFT, and by plain PEFT in float64.

``torchrun --nproc_per_node 2 tests/engine_program.py ENGINE METHOD`` prints, as JSON, the loss of each step over all
processes for each of the three, how many calls of layers were fused and how many went to PEFT. test_engines.py judges.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.distributed as dist
from peft_layers import tiny_llama, tokens
from test_peft_four_bit import four_bit_llama
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastpeft
from fastpeft.peft.layers import FusedForward

STEPS = 20
DENSE: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}}  # all else is in 4 bits


def shard(model: Any, **options: Any) -> nn.Module:
    """FSDP2, block by block."""
    for block in model.base_model.model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


ENGINES: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp-static": lambda model: DistributedDataParallel(model, static_graph=True),
    "ddp-unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "ddp-views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "fsdp2": shard,
    "fsdp2-mixed": lambda model: shard(
        model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ),
}


def made(method: str, exact: bool) -> peft.PeftModel:
    """The same model in each process and each time; ``exact``: in float64."""
    torch.manual_seed(0)
    if method in DENSE:
        model = tiny_llama(**DENSE[method])
        return model.double() if exact else model
    model = four_bit_llama(method)
    if not exact:
        return model
    decoded = four_bit_llama(method, decoded=True)
    decoded.load_state_dict({n: p for n, p in model.named_parameters() if "lora_" in n}, strict=False)
    return decoded


def train(model: nn.Module) -> list[float]:
    """The mean loss over the processes, each of which has batches of its own."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    torch.manual_seed(100 + dist.get_rank())
    batches, losses = [tokens() for _ in range(4)] * (STEPS // 4), []
    for ids in batches:
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits.double(), ids[:, 1:].flatten())  # transformers rounds it to float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def counted() -> Counter[str]:
    """From now on the calls of layers that are fused, and that go to PEFT."""
    counts: Counter[str] = Counter()
    for name in ("_run", "_by_peft"):
        own = getattr(FusedForward, name)

        def counting(self: Any, *args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Tensor:
            counts[name] += 1
            return own(self, *args, **kwargs)

        setattr(FusedForward, name, counting)
    return counts


def main(engine: str, method: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for who in ("exact", "stock", "fused"):
        model = made(method, who == "exact")
        if who == "fused":
            fastpeft.patch(model)
            counts = counted()
        found[who] = train(ENGINES["ddp" if who == "exact" else engine](model))
    if dist.get_rank() == 0:
        print(json.dumps({**found, "calls": counts["_run"], "left": counts["_by_peft"]}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
