"""Requests of several tasks in one batch: each row goes through its own adapter, the base's products are shared."""

import argparse
import time

import peft
import torch
from transformers import AutoModel

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a folder, or a name on the hub")
arguments = parser.parse_args()

TASKS = ["reviews", "spam", "__base__", "reviews"]  # of the rows of the batch; __base__ has no adapter

model = AutoModel.from_pretrained(arguments.model)
config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)  # as if they had been trained
adapted = peft.get_peft_model(model, config, adapter_name="reviews")
adapted.add_adapter("spam", config)
fastpeft.patch(adapted)
adapted.eval()
tokens = torch.randint(5, 10, (len(TASKS), 8))

with torch.inference_mode():
    adapted(input_ids=tokens, adapter_names=TASKS)  # what libraries do once
    started = time.perf_counter()
    together = adapted(input_ids=tokens, adapter_names=TASKS).last_hidden_state
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    alone = [adapted(input_ids=tokens[i : i + 1], adapter_names=TASKS[i : i + 1])[0] for i in range(len(TASKS))]
    one_by_one = time.perf_counter() - started

print(f"largest difference to one request at a time: {(together - torch.cat(alone)).abs().max():.1e}")
print(f"{len(TASKS)} requests together took {1e3 * seconds:.2f} ms, one at a time {1e3 * one_by_one:.2f} ms")
