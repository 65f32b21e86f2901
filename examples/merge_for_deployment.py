"""An adapter merged into the weights: what is deployed is a plain model, which answers no slower than the base."""

import argparse
import copy
import statistics
import time

import peft
import torch
from transformers import AutoModel

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a folder, or a name on the hub")
parser.add_argument("--out", default="runs/merged", help="where the merged model goes")
arguments = parser.parse_args()


def milliseconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """The median of a request's times."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        model(input_ids=tokens)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


base = AutoModel.from_pretrained(arguments.model).eval()
config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)  # as if it had been trained
adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
fastpeft.patch(adapted)
merged = copy.deepcopy(adapted).merge_and_unload().eval()
merged.save_pretrained(arguments.out)
print(f"the merged model is in {arguments.out}")

tokens = torch.randint(5, 10, (1, 8))
with torch.inference_mode():
    expected, found = (model(input_ids=tokens).last_hidden_state for model in (adapted, merged))
    print(f"largest difference after merging: {(expected - found).abs().max():.1e}")
    for name, model in {"base": base, "with its adapter": adapted, "merged": merged}.items():
        print(f"{name}: {milliseconds(model, tokens):.2f} ms a request")
