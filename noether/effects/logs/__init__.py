"""Logs of a run: JSON Lines files, summary, console, TensorBoard, Weights & Biases, and peak memory.

A line here may touch files, streams and devices; it reads the state and never changes it.
"""
