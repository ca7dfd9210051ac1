"""Every third-party package that noether imports is declared in pyproject.toml."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "ignite": "pytorch-ignite",
    "google": "protobuf",
    "PIL": "pillow",
    "IPython": "ipython",
}  # where the import name differs


def declared(requirements):
    return {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements}


def imported():
    for path in (ROOT / "noether").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                yield path.relative_to(ROOT), name.partition(".")[0]


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name for extra in project["optional-dependencies"].values() for name in declared(extra)}
    known = declared(project["dependencies"]) | extras
    missing = {
        f"{path} imports {name}"
        for path, name in imported()
        if name not in sys.stdlib_module_names and name != "noether" and DISTRIBUTIONS.get(name, name) not in known
    }
    assert not missing
