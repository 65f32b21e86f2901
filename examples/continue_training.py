"""A checkpoint of an adapter, loaded and trained on: fused or not, the files are PEFT's."""

import argparse
import tempfile
from pathlib import Path

import peft
import torch
from transformers import AutoModel

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a folder, or a name on the hub")
arguments = parser.parse_args()

tokens = torch.randint(5, 10, (4, 8))


def train(model: torch.nn.Module, steps: int) -> list[float]:
    """The losses of some steps in which the first feature is drawn to one."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens).last_hidden_state[..., 0].sub(1.0).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


adapted = peft.get_peft_model(
    AutoModel.from_pretrained(arguments.model), peft.LoraConfig(r=8, target_modules="all-linear")
)
fastpeft.patch(adapted)
adapted.eval()  # no dropout: the same loss before and after
first = train(adapted, 5)
with tempfile.TemporaryDirectory() as folder:
    adapted.save_pretrained(folder)
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    base = AutoModel.from_pretrained(arguments.model)
    loaded = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
fastpeft.patch(loaded)
loaded.eval()
further = train(loaded, 5)
print(f"the checkpoint takes {size / 2**20:.2f} MiB")
print(f"the loss went from {first[0]:.4f} to {first[-1]:.4f}")
print(f"after reloading it went from {further[0]:.4f} to {further[-1]:.4f}")
