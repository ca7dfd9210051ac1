"""Refuses calls that read or change the world, made by one thread while it runs a callback."""

from __future__ import annotations

import datetime as dt
import dis
import gc
import io
import random
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

_Result = TypeVar("_Result")


class _Kind(NamedTuple):
    """A kind of forbidden call: what it does, and what to write instead."""

    does: str
    hint: str


_CLOCK: Final = _Kind("reads the clock", "take the time from the event: event.time_s")
_ZONE: Final = _Kind("reads the time zone of the machine", "give the time zone: datetime.fromtimestamp(..., tz=UTC)")
_IO: Final = _Kind("does I/O", "return an effect instead")
_PROCESS: Final = _Kind("reads the state of the process", "take it from event.run, or from a setting of the callback")
_ENVIRONMENT: Final = _Kind("uses environment variables", "take it from event.run.config, or from a setting")
_RANDOM: Final = _Kind(
    "draws from a global random generator",
    "make a generator from the seed: torch.Generator().manual_seed(state.seed)",
)

# A call of a function in C, by the module of the function. It is of the first kind, unless the dict has another kind
# for the function; None allows it.
_TIMES: Final = {"strptime": None, "localtime": _ZONE, "ctime": _ZONE, "mktime": _ZONE}
_SYSTEM: Final = {
    **dict.fromkeys(("fspath", "_path_normpath", "_path_splitroot", "WIFEXITED", "WEXITSTATUS", "strerror")),
    **dict.fromkeys(("getpid", "getppid", "getuid", "geteuid", "getgid", "getegid", "getcwd", "getlogin"), _PROCESS),
    **dict.fromkeys(("uname", "cpu_count", "times", "getloadavg", "sched_getaffinity", "getpgid"), _PROCESS),
    **dict.fromkeys(("putenv", "unsetenv"), _ENVIRONMENT),
    "urandom": _RANDOM,
}
_MODULES: Final[dict[str, tuple[_Kind, dict[str, _Kind | None]]]] = {
    "time": (_CLOCK, _TIMES),
    "posix": (_IO, _SYSTEM),
    "nt": (_IO, _SYSTEM),
    "resource": (_PROCESS, {}),
    "_socket": (_IO, {}),
    "_posixsubprocess": (_IO, {}),
    "fcntl": (_IO, {}),
    "select": (_IO, {}),
    "_io": (_IO, {"text_encoding": None, "open_code": _IO}),
    "io": (_IO, {"text_encoding": None}),
    "_signal": (_IO, {}),
    "_uuid": (_RANDOM, {}),
}
_FUNCTIONS: Final = {
    ("builtins", "print"): _IO,
    ("builtins", "input"): _IO,
    ("builtins", "open"): _IO,
    ("_thread", "start_new_thread"): _IO,
    ("_thread", "start_joinable_thread"): _IO,
    ("_thread", "get_native_id"): _PROCESS,
    ("gc", "collect"): _PROCESS,
    ("gc", "get_objects"): _PROCESS,
    ("sys", "getrefcount"): _PROCESS,
}
_STREAM: Final[type] = io.IOBase.__bases__[0]  # the class in C: testing for the abstract one takes longer
_GENERATORS: Final = (random.Random, torch.Generator, np.random.RandomState)
_NATIVE_WRITERS: Final = frozenset({"serialize_file", "tofile"})
_METHODS_OF_DATES: Final = {
    "now": _CLOCK, "utcnow": _CLOCK, "today": _CLOCK, "fromtimestamp": _ZONE, "astimezone": _ZONE,
}  # fmt: skip
_ARGUMENTS_OF_PURE_CALLS: Final = {
    "time.strftime": 2, "time.gmtime": 1, "time.asctime": 1, "datetime.fromtimestamp": 2, "datetime.astimezone": 1,
}  # fmt: skip
"""Functions that read no clock and no time zone if they get this many arguments."""

_PYTHON_FUNCTIONS: Final = {
    **{("os", f"_Environ.{name}"): _ENVIRONMENT for name in ("__getitem__", "__setitem__", "__delitem__", "__iter__")},
    ("torch.serialization", "_open_zipfile_writer_file.__init__"): _IO,
    ("torch.serialization", "_open_zipfile_reader.__init__"): _IO,
    ("safetensors.torch", "load_file"): _IO,
    ("safetensors.numpy", "load_file"): _IO,
}
"""Functions in Python that reach the world through native code, by module and qualified name."""

_AUDIT_EVENTS: Final = (
    "open", "socket.", "subprocess.", "os.", "shutil.", "tempfile.", "urllib.", "sqlite3.", "http.", "ftplib.",
    "smtplib.", "glob.", "pathlib.", "mmap.", "fcntl.", "ctypes.dlopen", "webbrowser.", "syslog.", "pty.", "winreg.",
)  # fmt: skip
"""Beginnings of the names of audit events (docs.python.org/3/library/audit_events.html)."""
_DIAGNOSTICS: Final = frozenset({"logging", "warnings", "traceback", "linecache"})
"""Modules that may do anything: what they write is for the developer, and no result depends on it."""
_IMPORTS: Final = ("importlib.", "zipimport")
_NATIVE_OPERATIONS: Final = "/proc/thread-self/io"
"""Where Linux counts how much a thread has read and written."""


def watch_call(name: str, error_type: type[Exception], function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Return `function(*arguments)`; raise where it reads a clock, does I/O, or uses another global.

    It watches this thread only, with its profile function and an audit hook, and replaces nothing. A profile function
    sees each call of a function in C, under whatever name it is called; what C code calls it does not see. Imports are
    left alone, and so are `logging` and `warnings`.

    Args:
        name: Name of the function, for messages.
        error_type: The error to raise; it is raised even if the function catches it.
        function: The function.
        arguments: Its arguments.

    Raises:
        Exception: An `error_type` that names the forbidden call and says what to write instead.
    """
    watch = _Watch(name, error_type, sys._getframe())  # noqa: SLF001  # the frame at which a search of the stack ends
    if not _hooks:  # once, because Python cannot remove an audit hook
        sys.addaudithook(_audit)
        _hooks.append(_audit)
    previous, written, collects = sys.getprofile(), _bytes_written(), gc.isenabled()
    gc.disable()  # a collection calls finalizers and the callbacks of others, such as hypothesis, which reads a clock
    _watches.append(watch)
    sys.setprofile(watch.profile)
    try:
        return function(*arguments)
    finally:
        sys.setprofile(previous)
        _watches.remove(watch)
        if collects:
            gc.enable()
        if watch.found is None and not watch.has_diagnostics and _bytes_written() != written:
            watch.found = error_type(f"{name} {_IO.does}: native code wrote to a file; {_IO.hint}")
        if watch.found is not None:
            raise watch.found


class _Watch:
    """Watches one call of a function, in the thread that created the watch."""

    def __init__(self, name: str, error_type: type[Exception], boundary: FrameType) -> None:
        self._name = name
        self._error_type = error_type
        self._boundary = boundary
        self.thread = threading.get_ident()
        self.found: Exception | None = None
        self.has_diagnostics = False

    def profile(self, frame: FrameType, what: str, argument: Any) -> None:
        """Raise if the call that begins is forbidden; the profile function of the thread."""
        if what == "c_call":
            forbidden = _find_c_call(argument, frame)
        elif what == "call":
            forbidden = _find_python_call(frame)
        else:
            return
        if forbidden is not None:
            self.refuse(*forbidden, frame)

    def refuse(self, kind: _Kind, call: str, frame: FrameType | None) -> None:
        """Raise the error of a forbidden call, unless it is part of an import or of a diagnostic."""
        while frame is not None and frame is not self._boundary:
            module = frame.f_globals.get("__name__", "")
            if module in _DIAGNOSTICS:
                self.has_diagnostics = True
                return
            if module.startswith(_IMPORTS):
                return
            frame = frame.f_back
        self.found = self.found or self._error_type(f"{self._name} {kind.does}: {call}; {kind.hint}")
        raise self.found


_Forbidden = tuple[_Kind, str] | None
_watches: list[_Watch] = []
_hooks: list[Any] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watches or not event.startswith(_AUDIT_EVENTS):
        return
    thread = threading.get_ident()
    watch = next((each for each in reversed(_watches) if each.thread == thread), None)
    if watch is not None:
        watch.refuse(_IO, f"{event}{arguments[:1]}", sys._getframe(1))  # noqa: SLF001  # where the event happened


def _find_c_call(function: Any, frame: FrameType) -> _Forbidden:
    """Return the kind and the name of a call of a function in C if it is forbidden."""
    owner, name = getattr(function, "__self__", None), function.__name__
    if owner is None or type(owner) is ModuleType:
        return _find_function(function.__module__, name, frame)
    if name in _NATIVE_WRITERS:
        return _IO, f"{name}()"
    if isinstance(owner, _STREAM):
        in_memory = isinstance(owner, (io.StringIO, io.BytesIO)) and owner not in {sys.stdout, sys.stderr}
        return None if in_memory else (_IO, f"{function.__qualname__}()")
    if isinstance(owner, dt.date) or (isinstance(owner, type) and issubclass(owner, dt.date)):
        return _forbid_unless_pure(_METHODS_OF_DATES.get(name), function.__qualname__, frame)
    if isinstance(owner, _GENERATORS) and _is_global_generator(owner):
        return _RANDOM, f"{function.__qualname__}()"
    return None


def _find_function(module: str | None, name: str, frame: FrameType) -> _Forbidden:
    if module is None:
        return None
    if name in _NATIVE_WRITERS:
        return _IO, f"{module}.{name}()"
    usual, others = _MODULES.get(module, (None, {}))
    kind = others.get(name, usual) if usual is not None else _FUNCTIONS.get((module, name))
    public = {"posix": "os.", "nt": "os.", "io": "", "_io": "", "builtins": ""}.get(module, f"{module.lstrip('_')}.")
    return _forbid_unless_pure(kind, f"{public}{name}", frame)


def _forbid_unless_pure(kind: _Kind | None, name: str, frame: FrameType) -> _Forbidden:
    """Return the kind and the call of a function, unless it is pure with as many arguments as it is called with."""
    if kind is None:
        return None
    enough = _ARGUMENTS_OF_PURE_CALLS.get(name)
    if enough is not None:
        operation, count = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
        if not dis.opname[operation].startswith("CALL") or "EX" in dis.opname[operation] or count >= enough:
            return None
    return kind, f"{name}()"


_python_calls: dict[int, tuple[CodeType, _Forbidden]] = {}  # by id; a code object is slow to hash


def _find_python_call(frame: FrameType) -> _Forbidden:
    """Return the kind and the name of a call of a function in Python if it is forbidden."""
    code = frame.f_code
    if id(code) not in _python_calls:
        module = frame.f_globals.get("__name__", "")
        kind = _PYTHON_FUNCTIONS.get((module, code.co_qualname))
        found = None if kind is None else (kind, f"{module}.{code.co_qualname.replace('_Environ.', 'environ.')}()")
        # A profile function does not see calls of classes, such as this one.
        if "datetime64" in code.co_names and not {"now", "today"}.isdisjoint(code.co_consts):
            found = _CLOCK, "numpy.datetime64('now' or 'today')"
        _python_calls[id(code)] = code, found
    return _python_calls[id(code)][1]


def _is_global_generator(generator: Any) -> bool:
    numpy_random = sys.modules.get("numpy.random.mtrand")
    return generator in {random._inst, torch.default_generator, getattr(numpy_random, "_rand", None)}  # noqa: SLF001  # the global one has no public name


def _bytes_written() -> bytes:
    """Return the line in which Linux says how many bytes this thread has written; empty on other systems."""
    try:
        with open(_NATIVE_OPERATIONS, "rb", buffering=0) as file:  # noqa: PTH123  # twice for each call of a callback
            return next((line for line in file.readall().splitlines() if line.startswith(b"wchar")), b"")
    except OSError:
        return b""
