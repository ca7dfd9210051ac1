"""Datasets, models and losses that the shipped configurations use.

A line here may touch the arguments of its function, the packaged data and a cache directory.
"""
