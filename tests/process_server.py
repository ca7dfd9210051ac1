"""Starts command lines in processes that are forked from one that has imported torch, which takes two seconds.

Run as a script, it is the server: `python process_server.py SOCKET`. It ends once its standard input is closed.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

PRELOADED = [
    "torch._dynamo",  # which the first optimizer imports, in more than a second
    "noether.cli.main",
    "noether.cli.commands.train",
    "noether.cli.commands.evaluate",
    "noether.cli.plan.command",
    "noether.training.runs.train",
    "noether.examples.digits",
]
FIXED_AT_START = ("PYTHON", "LC_", "LANG", "OMP_", "TORCH")
"""Beginnings of environment variables that Python or torch reads once, as it starts."""


def can_be_read(files, timeout=None):
    """Return those of the files that can be read, or have ended, after at most `timeout` seconds.

    Unlike `select`, `poll` takes files with numbers above 1023, which a process with many open files has.
    """
    waiting = {file if isinstance(file, int) else file.fileno(): file for file in files}
    poll = select.poll()
    for number in waiting:
        poll.register(number, select.POLLIN)
    return [waiting[number] for number, _ in poll.poll(None if timeout is None else timeout * 1000)]


class ForkedProcess:
    """A process of the server, with the part of the interface of `subprocess.Popen` that tests use.

    Args:
        arguments: What follows `python -m noether`.
        cwd: Its working directory.
        environment: All of its environment variables.
        stdout: `subprocess.PIPE`, or a file descriptor.
        new_session: Whether it gets a process group of its own.
    """

    def __init__(self, arguments, *, cwd, environment, stdout=subprocess.PIPE, new_session=False):
        self.args, self.returncode = ["noether", *map(str, arguments)], None
        (self.stdout, out), (self.stderr, err) = _open_output(stdout), _open_output(subprocess.PIPE)
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(_start_server())
        request = {
            "arguments": self.args[1:],
            "cwd": str(cwd),
            "environment": environment,
            "new_session": new_session,
        }
        content = json.dumps(request).encode()
        socket.send_fds(self._connection, [len(content).to_bytes(8, "little")], [out, err])
        self._connection.sendall(content)
        for descriptor, stream in ((out, self.stdout), (err, self.stderr)):
            if stream is not None:
                os.close(descriptor)
        self.pid = int.from_bytes(_receive(self._connection, 8), "little")

    def poll(self):
        """Return the exit code, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout=None):
        """Return the exit code; negative for a signal."""
        if self.returncode is None:
            if not can_be_read([self._connection], timeout):
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int.from_bytes(_receive(self._connection, 8), "little", signed=True)
            self._connection.close()
        return self.returncode

    def communicate(self, timeout=None):
        """Return everything that the process writes, once it has ended; empty texts at a second call."""
        texts = {}

        def read(name, stream):
            texts[name] = "" if stream is None or stream.closed else stream.read()

        readers = [
            threading.Thread(target=read, args=(name, getattr(self, name)), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        return texts["stdout"], texts["stderr"]

    def send_signal(self, number):
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def can_fork(environment):
    """Return whether a process of the server behaves as a new one with these further variables."""
    return not any(name.startswith(FIXED_AT_START) for name in environment)


def _open_output(target):
    """Return a stream to read and the descriptor to write to; no stream if the target is a descriptor already."""
    if target != subprocess.PIPE:
        return None, target if isinstance(target, int) else target.fileno()
    read, write = os.pipe()
    return os.fdopen(read, encoding="utf-8"), write


def _receive(connection, size):
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise ConnectionError("the server of processes has ended")
        content += part
    return content


@functools.cache
def _start_server():
    """Start the server of this test process and return the path of its socket."""
    path = Path(tempfile.mkdtemp()) / "socket"
    server = subprocess.Popen([sys.executable, __file__, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n"
    atexit.register(_stop_server, server)
    return str(path)


def _stop_server(server):
    server.communicate()  # closes its standard input
    shutil.rmtree(Path(server.args[-1]).parent)


# The server


def serve(path):
    """Fork a process for each connection, until the standard input is closed."""
    for name in PRELOADED:
        __import__(name)
    # As in tests/conftest.py.
    sys.modules["noether.training.runs.start_panel"]._BUILDING_AFTER_S = threading.TIMEOUT_MAX  # noqa: SLF001
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(path)
    listening.listen()
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    running = {}
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        ready = can_be_read([listening, ended, sys.stdin])
        if sys.stdin in ready:
            return
        if ended in ready:
            os.read(ended, 4096)
            _report_ended(running)
        if listening in ready:
            connection, _ = listening.accept()
            pid = _fork(connection, [listening, *running.values()])
            running[pid] = connection
            connection.sendall(pid.to_bytes(8, "little"))


def _report_ended(running):
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as connection, contextlib.suppress(OSError):
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))


def _fork(connection, inherited):
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 2)
    request = json.loads(_receive(connection, int.from_bytes(header, "little")))
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        return pid
    code = 1
    try:
        for each in (connection, *inherited):
            each.close()
        _become(request, descriptors)
        code = _run()
    finally:
        os._exit(code)


def _become(request, descriptors):
    """Give this process the state of a new interpreter."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    null = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate([null, *descriptors]):
        os.dup2(descriptor, number)
    os.closerange(3, 256)
    sys.argv = ["noether", *request["arguments"]]
    sys.path[0] = request["cwd"]


def _run():
    """Run the command line to the end of the interpreter, and return the exit code."""
    code = 0
    try:
        runpy.run_module("noether", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201  # as Python does
    except BaseException:  # noqa: BLE001  # as Python does
        traceback.print_exc()
        code = 1
    threading._shutdown()  # noqa: SLF001  # waits for threads, as Python does
    atexit._run_exitfuncs()  # noqa: SLF001  # the process ends without them otherwise
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
