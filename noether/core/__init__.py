"""States, events, effects, callbacks and their composition, as pure functions and immutable values.

A line here may touch its arguments and out-of-place torch: no I/O, no clock, no global, no configuration. Every other
room imports this one; it imports none of them.
"""
