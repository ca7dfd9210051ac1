"""Data sets, models and losses that the shipped configurations train with."""
