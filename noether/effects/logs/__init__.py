"""Logs: files, console, progress bar, TensorBoard, Weights & Biases. Each reads the state and never changes it."""
