"""A whole GRPO iteration beside a plain loop of the same mathematics: `python -m bench.iteration`."""
