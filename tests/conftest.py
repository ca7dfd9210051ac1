"""What holds for all tests."""

from hypothesis import settings

# A deadline is a timed assertion: it fails on a busy machine, not on a wrong program.
settings.register_profile("noether", settings(), deadline=None)
settings.load_profile("noether")

# There are no doctests here, and several folders have a module of this name.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]
