"""noether's trainer: a loop over one state variable, and the objects that a configuration describes.

A line in here may touch the clock, the data iterator, the state variable, the step and the interpreter; files only
through the interpreter.
"""
