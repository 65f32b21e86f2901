"""Measures PEFT's layers and fastpeft's beside the frozen layer without an adapter; tables and plots read the rows."""
