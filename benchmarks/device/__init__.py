"""Fifteen minutes with a GPU: is it right, and against whom. `python -m benchmarks.device --list` says how."""
