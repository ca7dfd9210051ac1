"""Every exception that noether defines derives from NoetherError.

A class that derives from `BaseException` alone is no error: like `GeneratorExit`, no `except Exception` catches it.
"""

import ast
import builtins
from pathlib import Path

import noether
from noether import NoetherError

ROOT = Path(noether.__file__).parent


def exception_bases():
    """Return the names of the bases of each exception class in the package, by class name; warnings left out."""
    classes = {
        node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }

    def is_exception(name):
        if name in classes:
            return any(map(is_exception, classes[name]))
        found = getattr(builtins, name, None)
        if isinstance(found, type):
            return issubclass(found, BaseException) and found is not BaseException and not issubclass(found, Warning)
        return name.endswith(("Error", "Exception", "Exit", "Interrupt"))

    return {name: bases for name, bases in classes.items() if is_exception(name)}


def test_every_exception_derives_from_the_common_base():
    classes = exception_bases()
    assert {"SettingsError", "ConfigError", "CheckpointError", "LawError"} <= set(classes)

    def derives(name):
        return name == "NoetherError" or any(map(derives, classes.get(name, ())))

    assert [name for name in sorted(classes) if not derives(name)] == []


def test_the_common_base_is_a_plain_exception():
    assert NoetherError.__bases__ == (Exception,)
