"""Python's audit events of a piece of code: imports, processes, files, and executed code."""

import os
import sys
from contextlib import contextmanager

PROCESSES = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
}
CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
OTHERS = {"pickle.find_class", "ctypes.dlopen", "socket.connect", "urllib.Request"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_recordings: list[list[tuple[str, tuple[object, ...]]]] = []


def _hook(event, args):
    if _recordings:
        _recordings[-1].append((event, args))


# A hook cannot be removed; it does nothing while no test records.
sys.addaudithook(_hook)


@contextmanager
def record_audit():
    """Yield a list that receives `(event, arguments)` of every audit event until the context ends."""
    events = []
    _recordings.append(events)
    try:
        yield events
    finally:
        _recordings.pop()


def dangerous_events(events):
    """Return the events that start, change, write, connect or unpickle something."""
    found = [event for event in events if event[0] in PROCESSES | CHANGES | OTHERS]
    return found + [(name, args) for name, args in events if name == "open" and _writes(args)]


def opened_paths(events):
    """Return the paths of the files that were opened."""
    return {os.fsdecode(args[0]) for name, args in events if name == "open" and not isinstance(args[0], int)}


def imported_modules(events):
    """Return the modules that were searched for because they were not imported yet."""
    return {args[0] for name, args in events if name == "import"}


def executions(events):
    """Return the events that compile or execute code: an import, an `exec`, an `eval`."""
    return [event for event in events if event[0] in {"exec", "compile"}]


def _writes(args):
    _, mode, flags = args
    return any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & _WRITING)
