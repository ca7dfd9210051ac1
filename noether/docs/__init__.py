"""The API reference: an HTML page for each module. `python -m noether.docs FOLDER` makes it from the docstrings."""
