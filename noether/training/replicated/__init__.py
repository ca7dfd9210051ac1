"""The step of several ranks that hold the same model: each takes a share of the samples, and all make one update.

A line here may touch what the step may, and the ranks of the run.
"""
