"""noether's trainer: a loop over one state variable, and what a configuration builds for it.

A line in here may touch the clock, the data iterator, the state variable, the step and the interpreter; files only
through the interpreter.
"""
