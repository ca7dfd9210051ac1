"""Objects that a configuration names by dotted paths: which may be imported, and which role each can fill.

A line here may touch importlib and signatures; it runs no code of a module before it has checked that the module is
allowed.
"""
