"""The measuring harness: PEFT and fastpeft side by side with the frozen base, in rows that tables and plots read."""
