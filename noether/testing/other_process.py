"""A process with another hash seed, which calls functions for this one; texts hash differently there."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.testing.transport import decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable

_SEEDS: Final = ("101", "202", "303")
"""Hash seeds; two processes use two that this process does not have."""
_START: Final = "from noether.testing.other_process import serve; serve()"
_SIZE_BYTES: Final = 8
_processes: dict[int, list[subprocess.Popen[bytes]]] = {}  # by the id of the process that started them


def call_in_other_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returns in two processes with other hash seeds, as JSON.

    The processes start at the first call, which takes as long as importing torch, and serve later calls too.

    Args:
        function: A function of a module of noether; its result is a JSON value.
        arguments: Any values, functions and classes included.

    Returns:
        One result for each process; none if the arguments cannot be sent, because they contain an object of the
        operating system, such as an open file.
    """
    try:
        call = encode((function, arguments))
    except Exception:  # noqa: BLE001  # what an object raises that cannot be sent is unknown
        return []
    settings = json.dumps({"path": sys.path, "threads": torch.get_num_threads()}).encode()
    processes = _start_processes()
    for process in processes:
        _write(process.stdin, settings)
        _write(process.stdin, call)
    answers = [json.loads(_read(process.stdout)) for process in processes]
    return [answer["result"] for answer in answers if "result" in answer]


def serve() -> None:
    """Answer calls that arrive at the standard input until it is closed: the other end of `call_in_other_processes`."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a callback prints is no answer
    while settings := _read(sys.stdin.buffer):
        chosen, call = json.loads(settings), _read(sys.stdin.buffer)
        sys.path[:] = chosen["path"]
        torch.set_num_threads(chosen["threads"])
        try:
            function, arguments = decode(call)
            answer = {"result": function(*arguments)}
        except Exception as error:  # noqa: BLE001  # a callback may raise anything, and so may making it from its bytes
            answer = {"error": repr(error)}
        _write(answers, json.dumps(answer).encode())


def _start_processes() -> list[subprocess.Popen[bytes]]:
    """Return the processes that serve this one; start them at the first call."""
    if os.getpid() not in _processes:
        seeds = [seed for seed in _SEEDS if seed != os.environ.get("PYTHONHASHSEED")][:2]
        _processes[os.getpid()] = [
            subprocess.Popen(  # noqa: S603  # this Python, with a constant program
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            for seed in seeds
        ]
        atexit.register(_end_processes)
    return _processes[os.getpid()]


def _end_processes() -> None:
    for process in _processes.pop(os.getpid(), []):
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.wait()


def _write(stream: Any, data: bytes) -> None:
    stream.write(len(data).to_bytes(_SIZE_BYTES, "big") + data)
    stream.flush()


def _read(stream: Any) -> bytes:
    """Return the next message of a stream; empty at its end."""
    size = stream.read(_SIZE_BYTES)
    data: bytes = stream.read(int.from_bytes(size, "big"))
    return data
