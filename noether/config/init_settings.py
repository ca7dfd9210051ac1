"""The setting `run.init_from`: where a run takes its first weights from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from noether.core.errors import Problem, raise_problems

if TYPE_CHECKING:
    from collections.abc import Iterator


@final
@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """Where a run takes its first weights from, and which. In YAML a path alone may be written for it.

    Args:
        path: A checkpoint of noether, such as `runs/NAME/RUN_ID/checkpoints/newest`; a file with a state dict, which is
            `.safetensors` or saved by torch (`.pt`, `.pth.tar` and others); or a directory with `weights.safetensors`,
            `model.safetensors` or `pytorch_model.bin`, or with the index of several such files. A file
            of torch may hold tensors and plain values only.
        key: Dotted key of the state dict in a file of torch; None if it has only one, or one named `state_dict`,
            `model_state_dict` or `model`.
        prefix: First part of names in the file, such as `net.`; it is removed, and names without it are ignored. What
            wrappers such as `torch.compile` and DDP add to all names is removed in any case.
        into: Sub-module of the model that the file is of, such as `backbone`; the rest of the model starts as
            initialized. Empty for the whole model.
        leave_out: Patterns as in `fnmatch` of names in the model that start as initialized, such as a new head, and of
            names in the file to ignore.

    Raises:
        SettingsError: If the path is empty, or a pattern is given twice.

    Example:
        >>> InitSettings(path="pre.pt", leave_out=("head.*", "head.*"))
        Traceback (most recent call last):
        noether.core.errors.SettingsError: leave_out: ['head.*', 'head.*'] has duplicates; give each pattern once
    """

    path: str
    key: str | None = None
    prefix: str = ""
    into: str = ""
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def _problems(self) -> Iterator[Problem | None]:
        if not self.path.strip() or "\0" in self.path:
            yield Problem("path", f"{self.path!r} is not a path; give a file or a checkpoint such as 'pre.pt'")
        if len(set(self.leave_out)) < len(self.leave_out):
            yield Problem("leave_out", f"{list(self.leave_out)} has duplicates; give each pattern once")
