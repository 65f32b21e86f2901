"""One module a backend, each with ``NAME``, ``refuses``, ``worth_a_warning`` and the ops."""
