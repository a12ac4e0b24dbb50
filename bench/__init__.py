"""Benchmarks: `pytest bench/` from the repository root; the method is in README.md."""
