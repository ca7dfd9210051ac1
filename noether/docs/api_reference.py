"""Renders docstrings and signatures with pdoc."""

from __future__ import annotations

import pkgutil
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import noether

if TYPE_CHECKING:
    from collections.abc import Iterable

PACKAGES: Final = ("noether", "noether.core.callbacks", "noether.testing")
"""Packages whose public names are documented on the page of the package."""


class _Annotation(str):
    """An annotation as the source has it."""

    __slots__ = ()
    __repr__ = str.__str__


def find_modules() -> list[str]:
    """Return the names of all modules of noether, without importing other modules than packages.

    Example:
        >>> find_modules()[0]
        'noether'
    """
    found = pkgutil.walk_packages(noether.__path__, "noether.")
    return ["noether", *sorted(each.name for each in found if not each.name.endswith("__main__"))]


def write_reference(folder: Path, modules: Iterable[str] | None = None) -> int:
    """Write a page for each module, an index and the data of the search, which finds public names.

    The pages load nothing from a network. Types are shown as the source writes them.

    Args:
        folder: Where to write; existing pages are replaced.
        modules: Names of the modules; by default all modules of noether.

    Returns:
        The number of pages of modules.
    """
    from pdoc import doc, doc_types, render

    folder.mkdir(parents=True, exist_ok=True)

    def keep_annotation(annotation: Any, *_: Any) -> Any:
        return _Annotation(annotation) if isinstance(annotation, str) else annotation

    render.configure(docformat="google", show_source=False, template_directory=Path(__file__).parent / "templates")
    # pdoc evaluates annotations, which fails for names that are imported for type checkers only.
    with (
        mock.patch.object(doc, "safe_eval_type", keep_annotation),
        mock.patch.object(doc_types, "safe_eval_type", keep_annotation),
        warnings.catch_warnings(),
    ):
        # The stubs only list names. pdoc mistakes a class for the wrapped function if its instances have `__wrapped__`.
        warnings.filterwarnings("ignore", "Error parsing type stubs for noether")
        warnings.filterwarnings("ignore", r"Cannot determine where noether\.core\.wrappers\.")
        documented = {name: doc.Module(_import_whole(name)) for name in modules or find_modules()}
        for name, module in documented.items():
            _write(folder / f"{name.replace('.', '/')}.html", render.html_module(module, documented))
        _write(folder / "index.html", render.html_index(documented))
        public = {name: module for name, module in documented.items() if name in PACKAGES}
        _write(folder / "search.js", render.search_index(public))
    return len(documented)


def _import_whole(name: str) -> Any:
    """Import a module and its lazy exports: pdoc shows only names that are already in the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the frameworks that integrations import
        module = import_module(name)
    for each in getattr(module, "__all__", ()):
        getattr(module, each)
    return module


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
