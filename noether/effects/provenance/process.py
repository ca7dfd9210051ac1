"""Facts about the process that trains a run: command line, machine, packages, code."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.core.text import escape_controls
from noether.effects.provenance.git import read_git_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from noether.effects.provenance.git import GitState

_SECRET: Final = re.compile(
    r"(?i)(^|[^a-z])(token|secret|password|passwd|passphrase|pwd|credentials?|(api|access|private|secret)[_-]?key)$"
)
_LOGIN_IN_URL: Final = re.compile(r"(?<=://)[^/\s@]+@")
_TOP_LEVEL: Final = re.compile(r"^(\w+)(?:/__init__)?\.py,", re.MULTILINE)
_MASK: Final = "***"
_VALID_S: Final = 5.0


def describe_process(devices: Iterable[torch.device], store: Callable[[bytes, str], str]) -> dict[str, Any]:
    """Return facts about this process, as plain values.

    It reads no environment variable, and masks values in the command line whose names say that they are secret.

    Args:
        devices: The devices of the model.
        store: Writes content under a name that follows from it, with a suffix such as `.diff`; returns its path in the
            run directory.

    Returns:
        `started_s` (seconds since 1970), `command`, `directory`, `git`, `python`, `platform`,
        `host`, `cpus`, `devices` and `packages`.

    Example:
        >>> facts = describe_process([torch.device("cpu")], lambda content, suffix: f"artifacts/changes{suffix}")
        >>> "torch" in facts["packages"], facts["python"] == platform.python_version()
        (True, True)
    """
    directory = Path.cwd()
    code, packages = read_code_and_packages(directory, int(time.monotonic() // _VALID_S))
    return {
        "started_s": round(time.time(), 3),
        "command": escape_controls(command_line(sys.orig_argv)),
        "directory": escape_controls(str(directory)),
        "git": None if code is None else _describe_code(code, store),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": {str(device): _device_name(device) for device in sorted(set(devices), key=str)},
        "packages": packages,
    }


@lru_cache(maxsize=1)
def read_code_and_packages(directory: Path, _period: int) -> tuple[GitState | None, Mapping[str, str]]:
    """Return the git state of a directory and the imported packages; cached for a period, because runs may be short."""
    return read_git_state(directory), dict(_imported_packages())


def _describe_code(state: GitState, store: Callable[[bytes, str], str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"commit": state.commit, "branch": state.branch, "dirty": state.dirty, "diff": None}
    if state.diff:
        entry["diff"] = store(state.diff, ".diff")
    if state.untracked:
        entry["untracked"] = list(map(escape_controls, state.untracked))
    if state.problem:
        entry["problem"] = escape_controls(state.problem)
    return entry


def command_line(words: Sequence[str]) -> str:
    """Return a command line as text for a shell, with the values of secrets masked.

    A value is masked if its name ends with token, secret, password, passphrase, credentials, or with api, access,
    private or secret key. A login in a URL is masked, too.

    Example:
        >>> command_line(["/usr/bin/python3", "/usr/bin/noether", "train", "a.yaml", "--set", "data.api_key=abc"])
        'noether train a.yaml --set data.api_key=***'
        >>> command_line(["python3", "train.py", "--hub-token", "abc", "--from=https://me:abc@host", "max_tokens=3"])
        "python3 train.py --hub-token *** '--from=https://***@host' max_tokens=3"
    """
    words = list(words)
    if len(words) > 1 and Path(words[1]).name == "noether":
        del words[0]
    if words:
        words[0] = Path(words[0]).name
    return " ".join(word if word.endswith(_MASK) else shlex.quote(word) for word in _mask_secrets(words))


def _mask_secrets(words: Sequence[str]) -> Iterator[str]:
    masks_next = False
    for word in words:
        name, equals, _ = word.partition("=")
        if masks_next:
            yield _MASK
        elif equals and _SECRET.search(name):
            yield f"{shlex.quote(name)}={_MASK}"
        else:
            yield _LOGIN_IN_URL.sub(f"{_MASK}@", word)
        masks_next = not equals and word.startswith("-") and _SECRET.search(word) is not None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        content = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine()
    found = re.search(r"^model name\s*: (.+)$", content, re.MULTILINE)
    return found[1] if found else platform.machine()


def _imported_packages() -> Iterator[tuple[str, str]]:
    """Yield name and version of each package that is imported now, sorted by name.

    Names and versions come from the folders `NAME-VERSION.dist-info`, because `importlib.metadata` takes a tenth of a
    second to read all files in them.
    """
    imported = {name.partition(".")[0] for name in sys.modules}
    found: dict[str, str] = {}
    for folder in map(Path, sys.path):
        for path in folder.glob("*.dist-info"):
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            if name in imported or not imported.isdisjoint(_module_names(path)):
                found.setdefault(name.lower().replace("_", "-"), version)  # the first on the path is the imported one
    yield from sorted(found.items())


def _module_names(path: Path) -> Iterable[str]:
    """Return the names of the modules that a distribution installs."""
    with suppress(OSError):
        return (path / "top_level.txt").read_text(encoding="utf-8").split()
    with suppress(OSError):
        return _TOP_LEVEL.findall((path / "RECORD").read_text(encoding="utf-8"))
    return ()
