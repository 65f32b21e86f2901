"""Several processes, on one machine or many: torchrun --nproc_per_node 2 examples/distributed.py MODEL --engine fsdp2

On many machines torchrun gets --nnodes and --rdzv-endpoint besides, and nothing else changes.
"""

import argparse

import peft
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a causal language model: a folder, or a name on the hub")
parser.add_argument("--engine", choices=["ddp", "fsdp2"], default="ddp")
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

dist.init_process_group()
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
torch.manual_seed(0)  # the adapters start alike in all processes
model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
report = fastpeft.patch(model)
if arguments.engine == "ddp":
    trained = DistributedDataParallel(model)
else:
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    trained = fully_shard(model)

optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
torch.manual_seed(dist.get_rank())
tokens = torch.randint(5, 10, (4, 16), device=device)  # yours: each process has its own
for step in range(arguments.steps):
    loss = trained(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and step in (0, arguments.steps - 1):
        print(f"step {step + 1} of {dist.get_world_size()} processes: loss {loss.item():.4f}")
if dist.get_rank() == 0:
    print(report)
dist.destroy_process_group()
