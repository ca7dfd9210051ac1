"""`noether schema`: a JSON schema of the configuration for editors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from noether.cli.output import echo
from noether.config.json_schema import make_schema

if TYPE_CHECKING:
    from pathlib import Path


def write_schema(target: Path | None) -> None:
    """Write the schema to a file, or print it."""
    text = json.dumps(make_schema(), indent=1)
    if target is None:
        echo(text)
        return
    target.write_text(f"{text}\n", encoding="utf-8")
    echo(f"wrote {target}; begin a YAML file with the line: # yaml-language-server: $schema={target}")
