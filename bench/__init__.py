"""Benchmarks: `python -m bench` from the repository root; the method is in README.md."""
