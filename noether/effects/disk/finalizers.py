"""Finalizers that run only in the process that registered them, and not in its forked children."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def finalize(owner: object, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Call a function when `owner` is garbage-collected or Python exits; not in a forked child process.

    A child inherits files, buffers and thread locks. The parent still uses the files, and a lock that another thread of
    the parent held at the fork is never released in the child.

    Args:
        owner: The object; `function` and `arguments` hold no reference to it, which would keep it alive.
        function: The function.
        arguments: Its arguments.

    Returns:
        A function that calls it now; every later call is a no-op.

    Example:
        >>> class Owner: ...
        >>> owner = Owner()
        >>> finalizer = finalize(owner, print, "released")
        >>> del owner
        released
        >>> finalizer()
    """
    process_id = os.getpid()

    def call() -> None:
        if os.getpid() == process_id:
            function(*arguments)

    return weakref.finalize(owner, call)
