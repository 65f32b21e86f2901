"""Supervised fine-tuning by TRL: one line in front of the trainer fuses every adapter that it makes."""

import argparse
import tempfile

import datasets
import peft
import torch
from trl import SFTConfig, SFTTrainer

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a causal language model: a folder, or a name on the hub")
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

texts = datasets.Dataset.from_dict({"text": ["the film is good", "the play was not bad"] * 16})  # yours

fastpeft.enable()
on_cpu = not torch.cuda.is_available()
with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        arguments.model,
        SFTConfig(folder, max_steps=arguments.steps, learning_rate=1e-3, report_to=[], use_cpu=on_cpu),
        train_dataset=texts,
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
print(f"the loss after {arguments.steps} steps: {trainer.state.log_history[-1]['train_loss']:.4f}")
print(fastpeft.patch(trainer.model))  # changes nothing: all of it is fused already
