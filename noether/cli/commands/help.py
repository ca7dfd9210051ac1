"""`noether help`: the reference of the sections and settings of a configuration."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from noether.cli.output import echo
from noether.cli.setting_table import describe_default, print_settings, print_table, wrap
from noether.config.errors import InvalidValueError, error_at
from noether.config.reference import find_entry, read_sections, section_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.config.docstrings import Setting
    from noether.config.reference import Entry


def show_help(name: str | None, allow: Sequence[str]) -> None:
    """Print all sections, the settings of one section, one setting, or the settings of an object that YAML names.

    Raises:
        ConfigError: If no section, setting, callback or object has that name.
    """
    try:
        if name is None:
            _list_sections()
        elif name.startswith("callbacks."):
            _show_callback(name.removeprefix("callbacks."), allow)
        elif "." in name and name.partition(".")[0] not in {each.name for each in read_sections()}:
            _show_object(name, allow)
        else:
            _show_entry(name, find_entry(name))
    except InvalidValueError as error:
        raise error_at("noether help", str(error)) from error


def _list_sections() -> None:
    echo("The sections of a configuration\n")
    table = Table("section", "description", box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for each in read_sections():
        table.add_row(Text(each.name), Text(first_sentence(each.setting.text)))
    print_table(table)
    more = "`noether help trainer` lists the settings of a section, `noether help trainer.max_epochs` describes one"
    echo(f"\n{wrap(f'{more}; `noether callbacks` lists the callbacks.')}")


def _show_entry(name: str, entry: Entry) -> None:
    setting = entry.setting
    echo(f"{name}: {setting.kind}, {describe_default(setting)}\n")
    echo(wrap(_one_line(section_text(entry.name)) or setting.text))
    if entry.settings:
        echo("")
        print_settings(_summarize_settings(entry.settings))
        echo("\n" + wrap(f"`noether help {name}.{entry.settings[0].setting.name}` describes a setting in full."))
    echo(f"\n{example_of(name, entry)}")
    for line in _notes(name, entry):
        echo("\n" + wrap(line))


def _summarize_settings(entries: Sequence[Entry]) -> Iterator[Setting]:
    for each in entries:
        yield dataclasses.replace(each.setting, text=first_sentence(each.setting.text))


def _notes(name: str, entry: Entry) -> Iterator[str]:
    """Yield how to set a setting on the command line, whether a resumed run may change it, and what describes more."""
    is_scalar = not entry.settings and not entry.setting.type.startswith(("list", "mapping", "a "))
    if is_scalar and ".N." not in entry.name:
        yield f"On the command line: --set {name}={_value(entry)}"
    if entry.may_change:
        yield "A resumed run may change it."
    elif any(each.may_change for each in entry.settings):
        changed = ", ".join(each.setting.name for each in entry.settings if each.may_change)
        yield f"A resumed run may change {changed}, and keeps the others."
    else:
        yield "A resumed run keeps it: another value is refused."
    if name == "callbacks":
        yield "`noether callbacks` lists the callbacks; `noether help callbacks.LrCallback` describes one."
    if name.rpartition(".")[2] == "kind" or entry.setting.type.startswith("a "):
        yield "`noether help PATH`, such as `noether help torch.optim.AdamW`, lists the settings of an object."


def example_of(name: str, entry: Entry) -> str:
    """Return YAML that sets an entry.

    Example:
        >>> print(example_of("run.seed", find_entry("run.seed")))
        run:
          seed: 0
    """
    lines: list[str] = []
    names, steps = entry.name.split("."), name.split(".")
    if len(steps) < len(names):  # an index of a list was left out
        steps.insert(names.index("N"), "N")
    depth, item = 0, False
    for step, known in zip(steps, names, strict=True):
        if known == "N":
            item = True
            continue
        lines.append("  " * depth + ("- " if item else "") + f"{step}:")
        depth, item = depth + 1 + item, False
    return "\n".join([*lines[:-1], f"{lines[-1]} {_value(entry)}"])


def _value(entry: Entry) -> str:
    """Return an example of a value in YAML: the default, or a placeholder of its type."""
    setting = entry.setting
    if setting.default not in {None, "null", "{}", "[]"}:
        return str(setting.default)
    if " | " in setting.type or setting.type == "events":
        return setting.type.split(" | ")[0]
    if entry.settings and (inner := [each for each in entry.settings if each.setting.default is None]):
        return f"{{{', '.join(f'{each.setting.name}: {_value(each)}' for each in inner)}}}"
    words = {"section": "{...}", "mapping": "{...}", "whole number": "10", "true or false": "true"}
    return words.get(setting.type, f"<{setting.type}>")


def _show_callback(name: str, allow: Sequence[str]) -> None:
    """Print a callback, or one setting of it."""
    from noether.cli.commands.callbacks import show_kind
    from noether.config.descriptions import describe, known_kinds
    from noether.core.errors import suggest

    known = {*known_kinds(), *(alias for aliases in known_kinds().values() for alias in aliases)}
    kind, _, key = (name, "", "") if name in known else name.rpartition(".")
    if not key:
        show_kind(name, allow)
        return
    settings = {each.name: each for each in describe(kind, allow).settings}
    if key not in settings:
        raise InvalidValueError(f"{kind} has no setting {key!r}{suggest(key, settings)}")
    found = settings[key]
    echo(f"callbacks.{kind}.{key}: {found.kind}, {describe_default(found)}\n")
    echo(wrap(found.text))
    echo("\nA resumed run may change it.")


def _show_object(path: str, allow: Sequence[str]) -> None:
    """Print the settings of a class or function: the parameters of its signature."""
    from noether.config.descriptions import describe_object

    summary, settings = describe_object(path, allow)
    echo(path)
    if summary:
        echo(f"\n{wrap(summary)}")
    echo("")
    print_settings(settings)


def first_sentence(text: str) -> str:
    """Return the first sentence of a text.

    Example:
        >>> first_sentence("Largest norm, e.g. 1.5; larger ones are scaled. None for no clipping.")
        'Largest norm, e.g. 1.5; larger ones are scaled.'
    """
    return re.split(r"(?<=\.)(?<!e\.g\.) (?=[A-Z`])", _one_line(text), maxsplit=1)[0]


def _one_line(text: str) -> str:
    return " ".join(text.split())
