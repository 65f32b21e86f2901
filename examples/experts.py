"""A mixture of experts: LoRA on the stacked weights of all experts and on the attention, with dropout on the experts.

Stacked weights are no layers, so PEFT finds them by the names of their parameters (target_parameters).
"""

import argparse

import peft
import torch
from transformers import AutoModelForCausalLM

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a Qwen3-MoE, Mixtral, OLMoE, …: a folder, or a name on the hub")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="runs/experts", help="where the adapter goes; plain PEFT loads it")
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(arguments.model)
config = peft.LoraConfig(
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    task_type="CAUSAL_LM",  # no lora_dropout, which PEFT refuses on experts
)
model = peft.get_peft_model(model, config)
print(fastpeft.patch(model, experts_dropout=0.05))
model.print_trainable_parameters()

model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
tokens = torch.randint(5, 10, (4, 16), device=model.device)  # yours
for step in range(arguments.steps):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, arguments.steps - 1):
        print(f"step {step + 1}: loss {loss.item():.4f}")
model.save_pretrained(arguments.out)
print(f"the adapter is in {arguments.out}")
