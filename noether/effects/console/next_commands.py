"""Commands to run next, chosen by the status, configuration and checkpoints of a run, and wrapped for a terminal."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, Final

from rich.cells import cell_len

from noether.core.iteration import COUNTERS, TrainingIteration

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

_RESUMABLE: Final = ("interrupted", "failed", "killed")
_BACKSLASH: Final = " \\"
_INDENT: Final = "  "


def suggest_commands(
    path: Path,
    status: str,
    *,
    config: Mapping[str, Any] | None = None,
    pointers: Collection[str] = (),
    at: TrainingIteration | None = None,
    allow: Sequence[str] = (),
) -> dict[str, str]:
    """Return the commands that a user may want to run next, by what they do.

    Args:
        path: The run directory.
        status: Its status, such as `running` or `killed`.
        config: Its configuration as plain values; None for a run of a user's own loop, which no command can continue or
            evaluate.
        pointers: The names of its pointers to checkpoints.
        at: The iteration that it has reached; None for its start.
        allow: Prefixes of modules that its configuration may import; the commands allow them again.

    Example:
        >>> from pathlib import Path
        >>> config = {"data": {"train": {}, "test": {}}, "trainer": {"max_epochs": 5}}
        >>> commands = suggest_commands(Path("runs/a"), "finished", config=config, pointers=["latest"])
        >>> for name, command in commands.items():
        ...     print(name, "|", command)
        evaluate | noether eval runs/a --data test
        show | noether show runs/a
        report | noether report runs/a
        continue | noether train --resume runs/a --set trainer.max_epochs=10
    """
    allowed = [word for prefix in allow for word in ("--allow", prefix)]
    resume = ["noether", "train", "--resume", str(path)]
    commands: dict[str, list[str]] = {}
    if status == "running":
        commands["follow"] = ["noether", "show", str(path), "--follow"]
    elif config is not None and status in _RESUMABLE:
        commands["resume"] = [*resume, *allowed]
    if config and pointers and (options := _evaluation_options(config, pointers)) is not None:
        commands["evaluate"] = ["noether", "eval", str(path), *options, *allowed]
    commands["show"] = ["noether", "show", str(path)]
    commands["report"] = ["noether", "report", str(path)]
    if config and pointers and (options := _continuation_options(config, status, at or TrainingIteration())):
        commands["continue"] = [*resume, *options, *allowed]
    return {name: shlex.join(words) for name, words in commands.items()}


def _evaluation_options(config: Mapping[str, Any], pointers: Collection[str]) -> list[str] | None:
    """Return the options to evaluate the best checkpoint, on `test` if there is that dataset; None without any."""
    datasets = [name for name, value in config.get("data", {}).items() if name != "train" and isinstance(value, dict)]
    if not datasets:
        return None
    best = next((name for name in pointers if name.startswith("best_model.")), None)
    options = [] if best is None else ["--checkpoint", best]
    return [*options, "--data", "test" if "test" in datasets else datasets[0]]


def _continuation_options(config: Mapping[str, Any], status: str, at: TrainingIteration) -> list[str]:
    """Return the options to continue a run: `--continue` after an early stop, or an end that is twice as late."""
    trainer = config.get("trainer", {})
    settings = ((f"max_{counter}s", getattr(at, counter)) for counter in COUNTERS)
    ends = [(name, trainer[name], done) for name, done in settings if isinstance(trainer.get(name), int)]
    if status == "stopped" and not any(done >= end for _, end, done in ends):
        return ["--continue"]
    if status not in {"finished", "stopped"} or not ends:
        return []
    name, end, _ = ends[0]
    return ["--set", f"trainer.{name}={2 * end}"]


def wrap_command(command: str, width: int) -> list[str]:
    r"""Return a command in lines of at most `width` characters, which a shell reads as one command.

    All lines but the last end with a backslash. An option and its value share a line, and no word is broken, so a long
    word makes a line that is wider than the terminal.

    Args:
        command: The command, quoted as by `shlex.join`.
        width: The width of the terminal.

    Example:
        >>> print(*wrap_command("noether train --resume runs/digits --set trainer.max_epochs=12", 40), sep="\n")
        noether train --resume runs/digits \
          --set trainer.max_epochs=12
    """
    first, *others = _join_options([shlex.quote(word) for word in shlex.split(command)])
    lines = [first]
    for number, part in enumerate(others, start=1):
        reserved = len(_BACKSLASH) if number < len(others) else 0
        if cell_len(lines[-1]) + 1 + cell_len(part) + reserved <= width:
            lines[-1] += f" {part}"
        else:
            lines[-1] += _BACKSLASH
            lines.append(_INDENT + part)
    return lines


def _join_options(words: Sequence[str]) -> Iterator[str]:
    """Yield words; an option and the word after it are one item."""
    rest = iter(words)
    for word in rest:
        value = next(rest, None) if word.startswith("--") else None
        yield word if value is None else f"{word} {value}"
