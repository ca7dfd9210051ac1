"""`python -m noether.docs FOLDER`: write the API reference into a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from noether.cli.output import echo
from noether.docs.api_reference import write_reference


def main(arguments: list[str]) -> int | str:
    """Write the reference; return what `sys.exit` takes."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        return "usage: python -m noether.docs FOLDER"
    try:
        count = write_reference(Path(arguments[0]))
    except ModuleNotFoundError as error:  # pdoc, or a framework that an integration imports
        return f"the API reference needs {error.name}: pip install 'noether[dev]'"
    except OSError as error:
        return f"cannot write the API reference: {error}"
    echo(f"wrote {count} pages; start at {Path(arguments[0]) / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
