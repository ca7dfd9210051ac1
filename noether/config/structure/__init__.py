"""Turns plain values into typed settings: strict types, signatures as schemas, and every problem with its path.

A line here may touch the values it is given and the signatures of classes and functions; no file and no tensor.
"""
