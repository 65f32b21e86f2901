"""QLoRA: a model loaded in 4 bits by bitsandbytes, adapted by PEFT, fused; W is decoded tile by tile, never whole."""

import argparse

import peft
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a causal language model: a folder, or a name on the hub")
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=quantization)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
print(fastpeft.patch(model))

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
tokens = torch.randint(5, 10, (4, 16), device=model.device)  # yours
for step in range(arguments.steps):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, arguments.steps - 1):
        print(f"step {step + 1}: loss {loss.item():.4f}")
