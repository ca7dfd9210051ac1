"""Reads runs back: their metrics, checkpoints and configuration, for Python, the command line and the report.

A line here may read files of runs and write the file that the user asked for. It never changes a run.
"""
