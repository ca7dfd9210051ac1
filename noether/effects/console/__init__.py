"""The console of a run: its panels, the live region and single lines, beside the bars of other libraries.

A line here may touch streams, terminals and notebooks; it reads the state and never changes it.
"""
