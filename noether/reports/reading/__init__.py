"""Reads a run directory: its configuration, summary, logs and checkpoints as Python values, also while it is written.

A line here may read files of runs; it never writes one, never takes a lock and never changes a run.
"""
