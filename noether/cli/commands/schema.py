"""`noether schema`: a JSON schema of the configuration for editors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from noether.cli.options import find_path_problem
from noether.cli.output import echo
from noether.config.errors import error_at
from noether.config.json_schema import make_schema

if TYPE_CHECKING:
    from pathlib import Path


def write_schema(target: Path | None) -> None:
    """Write the schema to a file, or print it.

    Args:
        target: The file, which is replaced if it exists; its name ends in `.json`. None to print the schema.

    Raises:
        ConfigError: If `target` cannot be the path of a JSON file.
    """
    if target is not None and (problem := find_path_problem(target, ".json")) is not None:
        raise error_at(f"--to {target}", problem)
    text = json.dumps(make_schema(), indent=1)
    if target is None:
        echo(text)
        return
    target.write_text(f"{text}\n", encoding="utf-8")
    echo(f"wrote {target}; begin a YAML file with the line: # yaml-language-server: $schema={target}")
