"""Benchmarks: each prints a table of ratios measured in the same rounds; `python -m benchmarks` runs all of them."""
