"""Experiments on real models and real data: what a newcomer runs to see for himself."""
