"""`noether plan`: prints the plan of a run as text or JSON, or draws it.

A line here may print and write the picture.
"""
