"""Refuses calls that read or change the world, made by one thread while it runs a callback."""

from __future__ import annotations

import datetime as dt
import dis
import gc
import io
import math
import random
import sys
import threading
from types import BuiltinMethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np
import torch

from noether.testing.functions import is_library

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
_SETTING: Final = _Kind("changes a setting of the process", "a callback changes nothing but the state that it returns")
_RANK: Final = _Kind("reads the rank of the process", "take it from the event: event.run.rank, event.run.world_size")

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
    ("sys", "settrace"): _SETTING,
    ("sys", "setswitchinterval"): _SETTING,
    ("_locale", "setlocale"): _SETTING,
    ("atexit", "register"): _SETTING,
}
_STREAM: Final[type] = io.IOBase.__bases__[0]  # the class in C: testing for the abstract one takes longer
_GENERATORS: Final = (random.Random, torch.Generator, np.random.RandomState)
_OBJECTS: Final = {"sqlite3": _IO, "mmap": _IO}
"""Modules in C, all methods of whose objects are forbidden."""
_NATIVE_WRITERS: Final = frozenset({"serialize_file", "tofile"})
_METHODS_OF_DATES: Final = {
    "now": _CLOCK, "utcnow": _CLOCK, "today": _CLOCK, "fromtimestamp": _ZONE, "astimezone": _ZONE,
}  # fmt: skip
_ARGUMENTS_OF_PURE_CALLS: Final = {
    "time.strftime": 2, "time.gmtime": 1, "time.asctime": 1, "datetime.fromtimestamp": 2, "datetime.astimezone": 1,
}  # fmt: skip
"""Functions that read no clock and no time zone if they get this many arguments."""

_READS_OF_ENVIRONMENT: Final = ("__getitem__", "__iter__", "__len__")
_READS_OF_RANK: Final = ("is_initialized", "get_rank", "get_world_size", "get_node_local_rank")
_SETTINGS_OF_LOGGING: Final = (
    "basicConfig", "disable", "captureWarnings", "addLevelName", "FileHandler.__init__", "Handler.setLevel",
    *(f"Logger.{name}" for name in ("setLevel", "addHandler", "removeHandler", "addFilter", "removeFilter")),
)  # fmt: skip
_PYTHON_FUNCTIONS: Final = {
    **{("os", f"_Environ.{name}"): _ENVIRONMENT for name in ("__setitem__", "__delitem__")},
    **{("os", f"_Environ.{name}"): _ENVIRONMENT for name in _READS_OF_ENVIRONMENT},
    **{("torch.distributed.distributed_c10d", name): _RANK for name in _READS_OF_RANK},
    **{("logging", name): _SETTING for name in _SETTINGS_OF_LOGGING},
    ("logging.config", "dictConfig"): _SETTING,
    ("logging.config", "fileConfig"): _SETTING,
    ("platform", "uname"): _PROCESS,
    ("torch.cuda.random", "manual_seed"): _RANDOM,
    ("torch.cuda.random", "manual_seed_all"): _RANDOM,
    ("torch.serialization", "_open_zipfile_writer_file.__init__"): _IO,
    ("torch.serialization", "_open_zipfile_reader.__init__"): _IO,
    ("safetensors.torch", "load_file"): _IO,
    ("safetensors.numpy", "load_file"): _IO,
}
"""Functions in Python that reach the world through native code, by module and qualified name."""
_ALLOWED_IN_PACKAGES: Final = frozenset(
    [("os", f"_Environ.{name}") for name in _READS_OF_ENVIRONMENT]
    + [("torch.distributed.distributed_c10d", name) for name in _READS_OF_RANK]
)
"""Functions that installed packages may call, as for their own settings; torch does so at a first use."""

_AUDIT_EVENTS: Final = (
    "open", "socket.", "subprocess.", "os.", "shutil.", "tempfile.", "urllib.", "sqlite3.", "http.", "ftplib.",
    "smtplib.", "glob.", "pathlib.", "mmap.", "fcntl.", "ctypes.dlopen", "webbrowser.", "syslog.", "pty.", "winreg.",
)  # fmt: skip
"""Beginnings of the names of audit events (docs.python.org/3/library/audit_events.html)."""
_DIAGNOSTICS: Final = frozenset({"logging", "warnings", "traceback", "linecache"})
"""Modules that may do anything: what they write is for the developer, and no result depends on it."""
_LOADERS: Final = ("importlib.", "zipimport", "inspect", "matplotlib.font_manager")
"""Modules that read what is installed: modules, their source, fonts."""
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
    previous: Any = sys.getprofile()
    written, collects = _bytes_written(), gc.isenabled()
    gc.disable()  # a collection calls finalizers and the callbacks of others, such as hypothesis, which reads a clock
    _watches.append(watch)
    sys.setprofile(watch.profile)
    try:
        return function(*arguments)
    finally:
        if sys.getprofile() != watch.profile:  # then the calls since were not seen
            watch.found = watch.found or error_type(f"{name} {_SETTING.does}: sys.setprofile(); {_SETTING.hint}")
        sys.setprofile(None)
        _watches.remove(watch)
        if previous is not None:
            # The profiler of `cProfile` is no function, and can only be enabled again.
            (sys.setprofile if callable(previous) else type(previous).enable)(previous)
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
        if call.startswith("logging.") and frame is not None:
            frame = frame.f_back  # user code may not configure what is itself a diagnostic
        while frame is not None and frame is not self._boundary:
            module = frame.f_globals.get("__name__", "")
            if module in _DIAGNOSTICS:
                self.has_diagnostics = True
                return
            if module == "matplotlib" or module.startswith(_LOADERS):
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
        return None if _is_in_memory(owner) else (_IO, f"{function.__qualname__}()")
    module = type(owner).__module__
    if module in _OBJECTS or (module == "_csv" and not _is_in_memory(_stream_of_writer(owner))):
        return _OBJECTS.get(module, _IO), f"{module.lstrip('_')}.{function.__qualname__}()"
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
    if (name == "print" and _prints_into_memory(frame)) or (name == "urandom" and _has_seed(frame)):
        return None
    public = {"posix": "os.", "nt": "os.", "io": "", "_io": "", "builtins": ""}.get(module, f"{module.lstrip('_')}.")
    return _forbid_unless_pure(kind, f"{public}{name}", frame)


def _forbid_unless_pure(kind: _Kind | None, name: str, frame: FrameType) -> _Forbidden:
    """Return the kind and the call of a function, unless it is pure with as many arguments as it is called with."""
    if kind is None:
        return None
    enough = _ARGUMENTS_OF_PURE_CALLS.get(name)
    return None if enough is not None and _count_arguments(frame) >= enough else (kind, f"{name}()")


def _count_arguments(frame: FrameType) -> float:
    """Return with how many arguments a call that begins is made; infinity if that is unknown."""
    operation, count = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
    known = dis.opname[operation].startswith("CALL") and "EX" not in dis.opname[operation]
    return count if known else math.inf


_python_calls: dict[int, tuple[CodeType, _Forbidden]] = {}  # by id; a code object is slow to hash


def _find_python_call(frame: FrameType) -> _Forbidden:
    """Return the kind and the name of a call of a function in Python if it is forbidden."""
    code = frame.f_code
    if id(code) not in _python_calls:
        module = frame.f_globals.get("__name__", "")
        kind = _PYTHON_FUNCTIONS.get((module, code.co_qualname))
        found = None if kind is None else (kind, f"{module}.{code.co_qualname.replace('_Environ.', 'environ.')}()")
        # A profile function does not see calls of classes, such as this one.
        if "datetime64" in code.co_names:
            values = *code.co_consts, *frame.f_locals.values()
            if any(isinstance(each, str) and each in {"now", "today"} for each in values):
                found = _CLOCK, "numpy.datetime64('now' or 'today')"
        _python_calls[id(code)] = code, found
    found = _python_calls[id(code)][1]
    if found is None or _is_in_memory(frame.f_locals.get("name_or_buffer")):  # given to torch
        return None
    if not _is_called_by_package(frame):
        return found
    return None if (frame.f_globals.get("__name__", ""), code.co_qualname) in _ALLOWED_IN_PACKAGES else found


def _is_called_by_package(frame: FrameType) -> bool:
    """Return whether an installed package, and not the tested code, calls a function, perhaps through `os`."""
    caller = frame.f_back
    while caller is not None and caller.f_globals.get("__name__", "") in {"os", "collections.abc"}:
        caller = caller.f_back
    module = "" if caller is None else caller.f_globals.get("__name__", "")
    package = module.partition(".")[0]
    return package != "noether" and package not in sys.stdlib_module_names and is_library(module)


def _is_in_memory(stream: Any) -> bool:
    return isinstance(stream, (io.StringIO, io.BytesIO)) and stream not in {sys.stdout, sys.stderr}


def _stream_of_writer(writer: Any) -> Any:
    """Return the stream of a writer of `csv`, which holds its method `write`."""
    methods = (each for each in gc.get_referents(writer) if isinstance(each, BuiltinMethodType))
    return next((each.__self__ for each in methods), None)


def _prints_into_memory(frame: FrameType) -> bool:
    """Return whether a call of `print` that begins writes to a local variable that is a stream in memory."""
    before = [each for each in dis.get_instructions(frame.f_code) if each.offset <= frame.f_lasti]
    values = [each for each in before if each.opname not in {"KW_NAMES", "PRECALL"}][:-1]
    if values and values[-1].opname == "LOAD_CONST" and values[-1].argval == ("file",):  # since Python 3.13
        values.pop()
    return bool(values) and _is_in_memory(frame.f_locals.get(values[-1].argval))


def _has_seed(frame: FrameType | None) -> bool:
    """Return whether the entropy is for `RandomState(seed)`, which then replaces it."""
    while frame is not None and frame.f_globals.get("__name__", "") in {"random", "secrets"}:
        frame = frame.f_back
    return frame is not None and "RandomState" in frame.f_code.co_names and _count_arguments(frame) > 0


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
