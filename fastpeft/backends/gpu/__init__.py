"""The backends for GPUs: cuda.py, put together in C++, and triton.py, put together in compose.py."""
