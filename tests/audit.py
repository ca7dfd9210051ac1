"""What Python itself tells of what a piece of code does: imports, processes, files, code that is run."""

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

_watching: list[list[tuple[str, tuple[object, ...]]]] = []


def _hook(event, args):
    if _watching:
        _watching[-1].append((event, args))


# It can never be taken away again; while nobody watches it does nothing.
sys.addaudithook(_hook)


@contextmanager
def watched():
    """Give a list that holds `(event, arguments)` of everything that happens inside, once it is left."""
    events = []
    _watching.append(events)
    try:
        yield events
    finally:
        _watching.pop()


def dangers(events):
    """Return those events in which something is started, changed, written, connected or unpickled."""
    found = [event for event in events if event[0] in PROCESSES | CHANGES | OTHERS]
    return found + [(name, args) for name, args in events if name == "open" and _writes(args)]


def opened(events):
    """Return the files that were opened, by name."""
    return {os.fsdecode(args[0]) for name, args in events if name == "open" and not isinstance(args[0], int)}


def imported(events):
    """Return the modules that were not there and were looked for."""
    return {args[0] for name, args in events if name == "import"}


def ran(events):
    """Return whether code was run that was none before: an import, an `exec`, an `eval`."""
    return [event for event in events if event[0] in {"exec", "compile"}]


def _writes(args):
    _, mode, flags = args
    return any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & _WRITING)
