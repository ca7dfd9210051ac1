"""The HTML report of runs: one file that needs no network, with charts, tables and text.

A line here may read runs, and write the file that the user names.
"""
