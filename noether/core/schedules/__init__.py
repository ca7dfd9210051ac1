"""Schedules: whether, when and how often a callback fires, computed in closed form from the counters.

`schedule` holds the schedules that a user writes, `gate` reads one at events, `forecast` finds the firings of a run in
advance. A line here may touch its arguments only.
"""
