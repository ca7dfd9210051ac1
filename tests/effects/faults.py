"""Simulated faults of a disk: errors, kills and losses of power.

Each is a `call` for `noether.effects.disk.calls.Disk`.
"""

import errno
import os
from pathlib import Path

from noether.effects.disk.calls import fsync

ERRORS = ("ENOSPC", "EIO", "EACCES", "EDQUOT")
KINDS = ("kill", "torn", "short", *(f"{error} {how}" for error in ERRORS for how in ("once", "from then on")))


class Killed(BaseException):
    """The process ended here. No code of the library catches it, as none catches a SIGKILL."""


def call_without_fsync(function, *arguments):
    """Make a call, except for fsync, which a test without power losses does not need."""
    return None if function is fsync else function(*arguments)


class Faults:
    """Makes calls, and injects a fault into one of them once it is armed.

    Args:
        call: Makes the calls.
    """

    def __init__(self, call=call_without_fsync):
        self._call = call
        self.armed = False

    def arm(self, at=None, kind="kill"):
        """Start to count calls, and inject a fault.

        Args:
            at: Index of the call that fails, from 0; None for no fault.
            kind: One of `KINDS`. `torn` kills in the middle of a write; `short` writes half of the content.
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
            result = self._call(function, file, content[: len(content) // 2])
        elif self._kind == "short" or function is os.close:  # a close that fails still closes the file
            result = self._call(function, *arguments)
        if self._kind == "short":
            return result
        if self._kind in ("kill", "torn"):
            self._dead = True
            raise Killed
        number = getattr(errno, self._kind.split()[0])
        raise OSError(number, os.strerror(number))


def can_meet(name, kind):
    """Return whether a fault of this kind can occur in a call of this name."""
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


class PowerLoss:
    """Makes calls on real files, and tracks which content may survive a loss of power.

    It assumes what POSIX promises and no more: content survives after an fsync of its file, and a name after an fsync
    of its directory. Before that, a file may hold its old content, part of the new one, or zeros; and each change of a
    name may survive or not, independently of later changes.

    Args:
        root: A directory whose content is on the disk.
        after_change: Called after every call that changes something.
        skips_fsync: `(path, kind) -> bool`, with `file` or `directory` as kind: whether a mutant omits this fsync.
    """

    def __init__(self, root, after_change=lambda: None, skips_fsync=None):
        self._root, self._after_change = Path(root), after_change
        self._skips_fsync = skips_fsync or (lambda path, kind: False)
        self._tree = _scan(self._root)
        self._open = {}

    def __call__(self, function, *arguments):
        result = call_without_fsync(function, *arguments)
        change = self._CHANGES.get(function)
        if change is not None:
            change(self, result, *arguments)
            self._after_change()
        return result

    def survivors(self, random):
        """Return a tree that a loss of power may leave now: content by relative path, None for a directory."""
        found = {}
        _survive(self._tree, Path(), random, found)
        return found

    def content(self):
        """Return the content of all files, by relative path."""
        return dict(_files(self._tree, Path()))

    def damage(self, path, content):
        """Replace the content of a file, on the disk and in memory."""
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

    def _track_open(self, file, path, flags, mode=0):
        if flags & os.O_CREAT and self._at(path) is None:
            self._at(path.parent).set(path.name, _File())
        self._open[file] = (path, self._at(path))

    def _track_write(self, size, file, content):
        self._open[file][1].now += bytes(content)[:size]

    def _track_truncate(self, _, file, size):
        self._open[file][1].now = self._open[file][1].now[:size]

    def _track_fsync(self, _, file):
        path, node = self._open[file]
        if node is None or self._skips_fsync(path, "file" if isinstance(node, _File) else "directory"):
            return
        node.durable = node.now if isinstance(node, _File) else dict(node.now)
        node.pending = []

    def _track_mkdir(self, _, path, mode=0):
        self._at(path.parent).set(path.name, _Folder())

    def _track_rename(self, _, path, target):
        node = self._at(path)
        self._at(path.parent).set(path.name, None)
        self._at(target.parent).set(target.name, node)

    def _track_link(self, _, path, target):
        self._at(target.parent).set(target.name, self._at(path))

    def _track_remove(self, _, path):
        self._at(path.parent).set(path.name, None)

    _CHANGES = {  # noqa: RUF012  # a table
        os.open: _track_open,
        os.write: _track_write,
        os.ftruncate: _track_truncate,
        fsync: _track_fsync,
        os.mkdir: _track_mkdir,
        os.rename: _track_rename,
        os.link: _track_link,
        os.unlink: _track_remove,
        os.rmdir: _track_remove,
    }


def write_tree(survivors, root):
    """Write the surviving files and directories below a new root."""
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


def _scan(path):
    if path.is_file():
        return _File(path.read_bytes())
    return _Folder({each.name: _scan(each) for each in path.iterdir()})


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
