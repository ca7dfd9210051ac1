"""Commands that make sense for a run, from its status, configuration and checkpoints; and how a terminal wraps them."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, Final

from rich.cells import cell_len

from noether.core.iteration import COUNTERS, TrainingIteration

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

_RESUMABLE: Final = ("interrupted", "failed", "killed")
_CONTINUED: Final = " \\"
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
    """Return the commands that make sense for a run, by what they do.

    Args:
        path: The run directory.
        status: Its status, such as `running` or `killed`.
        config: Its configuration as plain values; None for a run of a program, which no command trains or evaluates.
        pointers: The names of its pointers to checkpoints.
        at: Where it is; None for its beginning.
        allow: Prefixes of modules that its `kind` may name.

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
    if config and pointers and (options := _evaluate(config, pointers)) is not None:
        commands["evaluate"] = ["noether", "eval", str(path), *options, *allowed]
    commands["show"] = ["noether", "show", str(path)]
    commands["report"] = ["noether", "report", str(path)]
    if config and pointers and (options := _continue(config, status, at or TrainingIteration())):
        commands["continue"] = [*resume, *options, *allowed]
    return {name: shlex.join(words) for name, words in commands.items()}


def _evaluate(config: Mapping[str, Any], pointers: Collection[str]) -> list[str] | None:
    """Return the options that evaluate the best checkpoint, on test data if there are any; None without such data."""
    datasets = [name for name, value in config.get("data", {}).items() if name != "train" and isinstance(value, dict)]
    if not datasets:
        return None
    best = next((name for name in pointers if name.startswith("best_model.")), None)
    options = [] if best is None else ["--checkpoint", best]
    return [*options, "--data", "test" if "test" in datasets else datasets[0]]


def _continue(config: Mapping[str, Any], status: str, at: TrainingIteration) -> list[str]:
    """Return the options that continue a run that ended: after a stop until its end, after its end twice as long."""
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
    r"""Return a command in lines of at most `width` characters, of which a shell makes one command again.

    A line that is continued ends with a backslash. An option stays with its value, and no word is broken: a longer one
    makes a longer line.

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
        reserved = len(_CONTINUED) if number < len(others) else 0
        if cell_len(lines[-1]) + 1 + cell_len(part) + reserved <= width:
            lines[-1] += f" {part}"
        else:
            lines[-1] += _CONTINUED
            lines.append(_INDENT + part)
    return lines


def _join_options(words: Sequence[str]) -> Iterator[str]:
    """Yield words, each option together with the word that follows it."""
    rest = iter(words)
    for word in rest:
        value = next(rest, None) if word.startswith("--") else None
        yield word if value is None else f"{word} {value}"
