"""``fastpeft compare``: every method of the field on one task, side by side: what it learns, and what it costs."""
