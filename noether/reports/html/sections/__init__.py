"""The sections of a report, one file each: functions from runs to HTML and charts.

A line here may read runs; everything that comes from a run is escaped.
"""
