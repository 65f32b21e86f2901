"""Direct preference optimisation by TRL: the reference is the same model with its adapters switched off."""

import argparse
import tempfile

import datasets
import peft
import torch
from trl import DPOConfig, DPOTrainer

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a causal language model: a folder, or a name on the hub")
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

pairs = datasets.Dataset.from_dict(  # yours
    {"prompt": ["the film is", "the play was"] * 16, "chosen": ["good", "good"] * 16, "rejected": ["bad", "bad"] * 16}
)

fastpeft.enable()
on_cpu = not torch.cuda.is_available()
with tempfile.TemporaryDirectory() as folder:
    trainer = DPOTrainer(
        arguments.model,
        args=DPOConfig(folder, max_steps=arguments.steps, learning_rate=1e-3, report_to=[], use_cpu=on_cpu),
        train_dataset=pairs,
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
print(f"the loss after {arguments.steps} steps: {trainer.state.log_history[-1]['train_loss']:.4f}")
print(fastpeft.patch(trainer.model))  # changes nothing: all of it is fused already
