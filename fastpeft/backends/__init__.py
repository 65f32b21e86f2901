"""The backends: ways to compute the ops, on CPUs, on GPUs, in plain PyTorch; each is a class that base.py describes."""
