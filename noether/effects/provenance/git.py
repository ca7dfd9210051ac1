"""The state of the git repository that contains a directory: commit, branch, changes of tracked files."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from pathlib import Path

MAX_DIFF_BYTES: Final = 4 << 20
MAX_UNTRACKED: Final = 100
_MAX_STATUS_BYTES: Final = 16 << 20
_TIMEOUT_S: Final = 1.0

# git must not run programs that a repository names, take locks, ask for passwords, or fetch objects.
_GIT: Final = ("git", "--no-pager", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
_ENVIRONMENT: Final = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "LC_ALL": "C",
}
_STATUS: Final = ("status", "--porcelain=v2", "--branch", "--no-ahead-behind", "-z", "--ignore-submodules=dirty")
_DIFF: Final = (
    *("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--no-relative", "--src-prefix=a/", "--dst-prefix=b/"),
    *("--ignore-submodules=dirty", "HEAD"),
)


@final
@dataclass(frozen=True, kw_only=True)
class GitState:
    """The state of a git repository.

    Args:
        commit: Hash of the current commit; None before the first one.
        branch: Name of the current branch; None if none is checked out.
        dirty: Whether tracked files differ from the commit; None if git did not say.
        untracked: Files and folders that git neither tracks nor ignores, at most `MAX_UNTRACKED`.
        diff: Changes of tracked files since the commit, as `git diff HEAD` prints them; empty without any.
        problem: Facts that git did not give, with the reason, and what is cut; empty if the state is complete.
    """

    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    untracked: tuple[str, ...] = ()
    diff: bytes = b""
    problem: str = ""


def read_git_state(directory: Path, timeout_s: float = _TIMEOUT_S) -> GitState | None:
    """Return the state of the repository that contains a directory; None if there is none.

    Args:
        directory: The directory.
        timeout_s: Time limit in seconds; after it, git is killed, and `problem` says what is missing.
    """
    with suppress(OSError):
        if not any((folder / ".git").exists() for folder in (directory, *directory.parents)):
            return None
    deadline_s = time.monotonic() + timeout_s
    status, diff = _Command(_STATUS, directory, _MAX_STATUS_BYTES), _Command(_DIFF, directory, MAX_DIFF_BYTES)
    for command in (status, diff):
        command.join(deadline_s - time.monotonic())
    state = _parse_status(status.output) if status.is_complete else GitState(problem=status.problem)
    if not state.dirty or state.commit is None:
        return state
    problems = [state.problem]
    if diff.is_cut:
        problems.append(f"the diff is cut after {MAX_DIFF_BYTES >> 20} MiB")
    elif not diff.is_complete:
        problems.append(diff.problem)
    known = diff.output if diff.is_complete or diff.is_cut else b""
    return GitState(**{**vars(state), "diff": known, "problem": "; ".join(filter(None, problems))})


@final
@dataclass
class _Command:
    """A git command that a thread runs, so that the caller never waits for a git or a disk that hangs."""

    arguments: tuple[str, ...]
    directory: Path
    limit_bytes: int
    output: bytes = b""
    problem: str = ""
    is_complete: bool = False
    is_cut: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        self.problem = f"git {self.arguments[0]} took too long"
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the command, and kill it after `timeout_s` seconds."""
        self._thread.join(max(timeout_s, 0))
        if self._thread.is_alive() and (process := self._process) is not None:
            process.kill()

    def _run(self) -> None:
        try:
            with subprocess.Popen(  # noqa: S603  # a fixed command
                (*_GIT, *self.arguments),
                cwd=self.directory,
                env=os.environ | _ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            ) as process:
                self._process = process
                output = process.stdout.read(self.limit_bytes + 1) if process.stdout is not None else b""
                if len(output) > self.limit_bytes:
                    process.kill()
                    self.output, self.is_cut = output[: self.limit_bytes], True
                    self.problem = f"git {self.arguments[0]} printed more than {self.limit_bytes} bytes"
                    return
                errors = process.stderr.read().decode(errors="replace").strip() if process.stderr is not None else ""
        except OSError as error:
            self.problem = f"git cannot be run: {error.strerror}"
            return
        if process.returncode == 0:
            self.output, self.is_complete, self.problem = output, True, ""
        elif process.returncode > 0:
            self.problem = f"git {self.arguments[0]}: {errors.partition(chr(10))[0] or process.returncode}"


def _parse_status(output: bytes) -> GitState:
    """Return the state that `git status --porcelain=v2 --branch -z` printed."""
    fields = iter(output.decode(errors="replace").split("\0"))
    headers: dict[str, str] = {}
    untracked: list[str] = []
    dirty = False
    for each in fields:
        kind, _, rest = each.partition(" ")
        if kind == "#":
            name, _, headers[name] = rest.partition(" ")
        elif kind == "?":
            untracked.append(rest)
        elif kind:
            dirty = True
            if kind == "2":
                next(fields, None)  # a renamed file has its old name as one more field
    commit, branch = headers.get("branch.oid"), headers.get("branch.head")
    too_many = len(untracked) - MAX_UNTRACKED
    return GitState(
        commit=None if commit == "(initial)" else commit,
        branch=None if branch == "(detached)" else branch,
        dirty=dirty,
        untracked=tuple(untracked[:MAX_UNTRACKED]),
        problem=f"{too_many} more untracked files are left out" if too_many > 0 else "",
    )
