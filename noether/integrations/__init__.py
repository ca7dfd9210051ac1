"""The same callbacks in loops that are not ours; each module is imported by whoever uses its framework.

`noether.config.load_callbacks` reads the list of a YAML file as one callback, which every adapter takes.
"""
