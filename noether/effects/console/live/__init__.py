"""The live display of a console: rows that a thread redraws on a terminal or in a notebook.

A line here may touch the console's stream, terminal or notebook, and the bars of other libraries; it changes no state.
"""
