"""One base model, an adapter for each task: switching costs no copy of the model and no reload."""

import argparse
import time

import peft
import torch
from transformers import AutoModel

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a folder, or a name on the hub")
arguments = parser.parse_args()

model = AutoModel.from_pretrained(arguments.model)
adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"), adapter_name="reviews")
adapted.add_adapter("spam", peft.LoraConfig(r=8, target_modules="all-linear"))  # from disk: load_adapter(path, "spam")
fastpeft.patch(adapted)
adapted.eval()

base = sum(p.nbytes for name, p in adapted.named_parameters() if "lora_" not in name)
adapter = sum(p.nbytes for name, p in adapted.named_parameters() if ".spam." in name)
print(f"the base takes {base / 2**20:.1f} MiB, each further task {adapter / 2**20:.2f} MiB")

tokens = torch.randint(5, 10, (1, 8))
with torch.inference_mode():
    for task in ("reviews", "spam", "reviews"):
        started = time.perf_counter()
        adapted.set_adapter(task)
        switched = time.perf_counter()
        adapted(input_ids=tokens)
        print(
            f"{task}: switched in {1e3 * (switched - started):.2f} ms, "
            f"answered in {1e3 * (time.perf_counter() - switched):.2f} ms"
        )
