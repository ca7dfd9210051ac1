"""Benchmarks: each prints a table of ratios, measured side by side in one process; `python -m benchmarks` runs all."""
