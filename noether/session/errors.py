"""What a session refuses, and what it warns about."""

from noether.core.errors import NoetherError


class SessionError(NoetherError, ValueError):
    """A session was set up or called in a way that cannot work; the message says what to write instead."""


class ResumeWarning(UserWarning):
    """A resumed run may see other batches than the uncut one."""
