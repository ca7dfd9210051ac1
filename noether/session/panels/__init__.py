"""The panels at the start and at the end of a run, as plain dataclasses that `effects/console` draws.

A line here may touch states, callbacks and the summary, to read.
"""
