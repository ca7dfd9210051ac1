"""Disks that fail, die or lose power where a test wants it; each is a `call` of `noether.effects.disk.calls.Disk`."""

import errno
import os
from pathlib import Path

from noether.effects.disk.calls import fsync

ERRORS = ("ENOSPC", "EIO", "EACCES", "EDQUOT")
KINDS = ("kill", "torn", "short", *(f"{error} {how}" for error in ERRORS for how in ("once", "from then on")))


class Killed(BaseException):
    """The process ended here: no code of its own sees this, as none sees a SIGKILL."""


def plainly(function, *arguments):
    """Make a call, but wait for no disk: nobody takes the power away from a test."""
    return None if function is fsync else function(*arguments)


class Faults:
    """Makes calls, and at one of them does something else, once it is armed.

    Args:
        call: What makes the calls.
    """

    def __init__(self, call=plainly):
        self._call = call
        self.armed = False

    def fail(self, at=None, kind="kill"):
        """Count calls from now on.

        Args:
            at: At which one to fail, counted from 0; None for none.
            kind: One of `KINDS`. `torn` kills in the middle of a write; `short` takes half of one.
        """
        self._at, self._kind, self._dead = at, kind, False
        self.armed, self.names = True, []

    def __call__(self, function, *arguments):
        if not self.armed:
            return self._call(function, *arguments)
        if self._dead:
            raise Killed
        number = len(self.names)
        self.names.append(function.__name__)
        if number == self._at or (self._at is not None and number > self._at and self._kind.endswith("from then on")):
            return self._fail(function, *arguments)
        return self._call(function, *arguments)

    def _fail(self, function, *arguments):
        if self._kind in ("torn", "short") and function is os.write:
            file, content = arguments
            took = self._call(function, file, content[: len(content) // 2])
        elif self._kind == "short" or function is os.close:  # a close that fails has closed all the same
            took = self._call(function, *arguments)
        if self._kind == "short":
            return took
        if self._kind in ("kill", "torn"):
            self._dead = True
            raise Killed
        number = getattr(errno, self._kind.split()[0])
        raise OSError(number, os.strerror(number))


def meets(name, kind):
    """Return whether a call of this name can meet a fault of this kind."""
    return name == "write" or kind not in ("torn", "short")


class _File:
    def __init__(self, content=b""):
        self.durable, self.now = content, content


class _Folder:
    def __init__(self, entries=()):
        self.durable = dict(entries)
        self.now = dict(self.durable)
        self.pending = []

    def set(self, name, node):
        self.pending.append((name, node))
        self.now.pop(name, None)
        if node is not None:
            self.now[name] = node


class Power:
    """Makes calls on real files, and knows what of them is left when the power goes.

    What POSIX promises and nothing beyond: content is there once its file was flushed, and a name once its directory
    was. Until then a file may hold what it held, part of what was written, or zeros, and each change of a name may be
    there or not, whatever came after it.

    Args:
        root: A directory whose content is on the disk.
        after: Called after every call that changes something.
        skipped: Judges a path and what is there, `file` or `directory`: whether it is not flushed. For mutants.
    """

    def __init__(self, root, after=lambda: None, skipped=None):
        self._root, self._after = Path(root), after
        self._skipped = skipped or (lambda path, kind: False)
        self._tree = _scanned(self._root)
        self._open = {}

    def __call__(self, function, *arguments):
        done = plainly(function, *arguments)
        change = self._CHANGES.get(function)
        if change is not None:
            change(self, done, *arguments)
            self._after()
        return done

    def survivors(self, random):
        """Return one of the trees that a loss of power may leave now: content or None by relative path."""
        found = {}
        _survive(self._tree, Path(), random, found)
        return found

    def content(self):
        """Return the content of all files, by relative path."""
        return dict(_files(self._tree, Path()))

    def damage(self, path, content):
        """Let a file hold something else, as if it had always been so."""
        path.write_bytes(content)
        file = self._at(path)
        file.durable = file.now = content

    def _at(self, path):
        if not path.is_relative_to(self._root):
            return None
        node = self._tree
        for part in path.relative_to(self._root).parts:
            node = node.now.get(part) if node is not None else None
        return node

    def _opened(self, file, path, flags, mode=0):
        if flags & os.O_CREAT and self._at(path) is None:
            self._at(path.parent).set(path.name, _File())
        self._open[file] = (path, self._at(path))

    def _written(self, took, file, content):
        self._open[file][1].now += bytes(content)[:took]

    def _truncated(self, _, file, size):
        self._open[file][1].now = self._open[file][1].now[:size]

    def _flushed(self, _, file):
        path, node = self._open[file]
        if node is None or self._skipped(path, "file" if isinstance(node, _File) else "directory"):
            return
        node.durable = node.now if isinstance(node, _File) else dict(node.now)
        node.pending = []

    def _made(self, _, path, mode=0):
        self._at(path.parent).set(path.name, _Folder())

    def _renamed(self, _, path, target):
        node = self._at(path)
        self._at(path.parent).set(path.name, None)
        self._at(target.parent).set(target.name, node)

    def _removed(self, _, path):
        self._at(path.parent).set(path.name, None)

    _CHANGES = {  # noqa: RUF012  # a table
        os.open: _opened,
        os.write: _written,
        os.ftruncate: _truncated,
        fsync: _flushed,
        os.mkdir: _made,
        os.rename: _renamed,
        os.unlink: _removed,
        os.rmdir: _removed,
    }


def restored(survivors, root):
    """Write what survived into a new directory."""
    for path, content in survivors.items():
        if content is None:
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).write_bytes(content)


def _files(node, path):
    if isinstance(node, _File):
        yield path, node.now
        return
    for name, each in node.now.items():
        yield from _files(each, path / name)


def _scanned(path):
    if path.is_file():
        return _File(path.read_bytes())
    return _Folder({each.name: _scanned(each) for each in path.iterdir()})


def _survive(node, path, random, found):
    if isinstance(node, _File):
        found[path] = random.choice(_contents(node, random))
        return
    found[path] = None
    entries = dict(node.durable)
    likely = random.choice((0.0, 0.5, 1.0))
    for name, there in node.pending:
        if random.random() < likely:
            entries.pop(name, None)
            if there is not None:
                entries[name] = there
    for name, there in entries.items():
        _survive(there, path / name, random, found)


def _contents(file, random):
    if file.now == file.durable:
        return [file.now]
    least = len(file.durable) if file.now.startswith(file.durable) else 0
    torn = file.now[: random.randrange(least, len(file.now) + 1)]
    return [file.durable, file.now, torn, file.durable + bytes(max(0, len(file.now) - len(file.durable)))]
