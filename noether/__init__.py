"""noether: callbacks of a training loop as pure functions `(state, event) -> (state, effects)`.

The stub `__init__.pyi` lists the public names; each is imported at its first use.
"""

import re as _re
from pathlib import Path as _Path
from typing import Any as _Any

from noether.core.callbacks.registry import SHIPPED as _SHIPPED
from noether.core.errors import suggest as _suggest
from noether.core.exports import read_exports as _read_exports

_EXPORTS = {**_read_exports(__name__), **_SHIPPED}
__all__ = list(_EXPORTS)  # the stub lists them


def __getattr__(name: str) -> _Any:
    """Return a public name, imported at its first use.

    Raises:
        AttributeError: If there is no such name; the message contains the nearest one.
    """
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(name)}", name=name)
    value = globals()[name] = _EXPORTS[name].load()
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _hint(name: str) -> str:
    """Return where noether defines `name`, or the nearest public name, for an error message."""
    if name.startswith("_"):
        return ""
    definition = _re.compile(rf"^(?:class|def) {_re.escape(name)}\b|^{_re.escape(name)}\b.* = ", _re.MULTILINE)
    root = _Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        if definition.search(file.read_text(encoding="utf-8")):
            module = ".".join(file.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
            return f"; there is {module}.{name}"
    return _suggest(name, _EXPORTS)
