"""What holds for all tests."""

from hypothesis import settings

# A deadline is a timed assertion: it fails on a busy machine, not on a wrong program.
settings.register_profile("noether", settings(), deadline=None)
settings.load_profile("noether")
