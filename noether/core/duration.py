"""Durations as a person reads them."""

from datetime import timedelta


def format_duration(seconds: float) -> str:
    """Return a duration as `h:mm:ss`, whole seconds.

    Example:
        >>> format_duration(3661.5)
        '1:01:01'
    """
    return str(timedelta(seconds=int(seconds)))
