"""Runs from start to end: `train`, resuming, the run directory's services, interruption by signals.

A line here may open run directories, install signal handlers and call the trainer; it prints nothing.
"""
