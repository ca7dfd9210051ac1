"""Processes that train one run together: their groups, what they reduce and gather, and how a failure ends all.

A line here may touch torch.distributed; all other rooms use what is here.
"""
