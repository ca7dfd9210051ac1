"""All file access of a run goes through `Disk`, so the crash tests see all of it."""

import contextlib
import sys
import threading
from pathlib import Path

import pytest
import torch
from faults import PowerLoss
from safetensors.torch import save_file
from small_run import open_small_run, state_after, train

from noether import AfterUpdate, LogText, MeasurePeakMemory, SaveCheckpoint, SaveTensors
from noether.effects import CheckpointStore
from noether.effects.disk.calls import Disk

FILES = ("open", "os.", "shutil.", "tempfile.", "pathlib.", "glob.", "mmap.", "fcntl.")

_watchers = []  # functions called with every audit event about files; the hook itself cannot be removed


def _hook(event, arguments):
    if _watchers and event.startswith(FILES):
        _watchers[-1](event, arguments)


sys.addaudithook(_hook)


class Seam:
    """Makes calls, and knows whether this thread is inside one."""

    def __init__(self, call):
        self._call = call
        self._thread = threading.local()

    def __call__(self, function, *arguments):
        self._thread.inside = True
        try:
            return self._call(function, *arguments)
        finally:
            self._thread.inside = False

    @property
    def inside(self):
        return getattr(self._thread, "inside", False)


@contextlib.contextmanager
def record_other_access(folder, seam):
    """Yield a list of the audit events about files below a folder, or open files, outside of the seam."""
    found = []

    def watch(event, arguments):
        paths = [str(each) for each in arguments if isinstance(each, (str, bytes, Path))]
        by_number = event.startswith(("os.", "mmap.", "fcntl.")) and any(type(each) is int for each in arguments[:1])
        if not seam.inside and (any(path.startswith(str(folder)) for path in paths) or by_number):
            found.append((event, arguments))

    _watchers.append(watch)
    try:
        yield found
    finally:
        _watchers.pop()


def read_all(folder):
    """Return the content of all files below a folder, by relative path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_accesses_files_through_the_seam_only(tmp_path, asynchronous):
    power = PowerLoss(tmp_path)
    seam = Seam(power)
    effects = [
        LogText("hello"),
        MeasurePeakMemory(key="memory"),
        SaveTensors(name="outputs/first", tensors={"x": torch.arange(3)}),
        SaveCheckpoint(tag="extra"),
    ]
    with record_other_access(tmp_path, seam) as others:
        for first in (1, 4):  # the second resumes first, and prunes
            with open_small_run(tmp_path / "run", Disk(seam), asynchronous=asynchronous, borrowed=False) as directory:
                directory.resume()
                assert list(train(directory, range(first, first + 3), keep=1)) == [*range(first, first + 3)]
                directory.interpreter(effects, state_after(first + 2), AfterUpdate(samples=4))
        store = CheckpointStore(tmp_path / "run/checkpoints", "run", Disk(seam))
        store.load(store.find("latest"))
    assert others == []
    # Audit hooks do not see files that compiled code opens, but those would add content.
    assert power.content() == read_all(tmp_path) != {}


def test_access_outside_of_the_seam_is_detected(tmp_path):
    power = PowerLoss(tmp_path)
    with record_other_access(tmp_path, Seam(power)) as others:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/b").write_text("x")
        (tmp_path / "a/b").rename(tmp_path / "a/d")
    assert [event for event, _ in others] == ["os.mkdir", "open", "os.rename"]
    with record_other_access(tmp_path, Seam(power)) as others:
        save_file({"x": torch.ones(1)}, tmp_path / "a/c")
    assert power.content() != read_all(tmp_path)
