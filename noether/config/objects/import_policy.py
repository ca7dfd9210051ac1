"""Decides which dotted paths a configuration may import, and imports them.

A configuration may come from a stranger, so each path is checked before any part of it is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import sysconfig
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noether.config.errors import InvalidValueError
from noether.core.errors import suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ALLOWED = ("noether", "torch")
"""Prefixes that are always allowed, beside the modules under the working directory."""
_METRICS = ("aggregation", "classification", "clustering", "nominal", "regression", "retrieval", "segmentation")
ALLOWED_METRICS = tuple(f"torchmetrics.{part}" for part in _METRICS)
"""Parts of torchmetrics that are always allowed: they compute on what they get. Others load what settings name."""
_LIBRARIES = (*ALLOWED, "torchmetrics")


def import_allowed(path: object, allow: Sequence[str] = (), run_dir: Path | None = None) -> Any:
    """Return the object at a dotted path, if the configuration may import it.

    Args:
        path: `module.attribute`.
        allow: Prefixes that may be imported beside `ALLOWED` and the modules under the working directory.
        run_dir: Directory of the run that the configuration belongs to; modules in it are not the user's and not
            imported.

    Raises:
        InvalidValueError: Before any import if the prefix is not allowed; otherwise if the path leads nowhere or its
            module cannot be imported.
    """
    if not isinstance(path, str) or "." not in path or not all(part.isidentifier() for part in path.split(".")):
        raise InvalidValueError(f"{path!r} is not a dotted path such as 'package.module.name'")

    # torchmetrics has its classes under short paths too, such as torchmetrics.F1Score: where they are defined counts.
    is_short = path.startswith("torchmetrics.") and path.count(".") == 1 and not _is_of_user("torchmetrics")
    return _walk(
        path, lambda module: None if is_short and module == path else _check_module(module, path, allow, run_dir)
    )


def import_path(path: str) -> Any:
    """Return the object at a dotted path that was checked when its configuration was loaded.

    Example:
        >>> import_path("noether.core.errors.suggest").__name__
        'suggest'
    """
    return _walk(path, lambda _: None)


def _walk(path: str, check: Callable[[str], None]) -> object:
    """Return the object at `path`, checking every module on the way, so that `torch.os.system` is refused.

    The module that defines the object is checked too, so that an object that a library only re-exports is refused
    (`torch.hub.urlopen`).
    """
    head, *parts = path.split(".")
    check(path)
    found: object = _import_module(head, path)
    walked = head
    for part in parts:
        found = _attribute(found, walked, part, path)
        walked = f"{walked}.{part}"
        if isinstance(found, types.ModuleType) and found.__name__ != walked:
            check(found.__name__)
    home = getattr(found, "__module__", None)
    if head in _LIBRARIES and isinstance(home, str):
        check(home)
    return found


def _attribute(owner: Any, owner_path: str, part: str, path: str) -> object:
    """Return one attribute or submodule, as `from owner import part` finds it."""
    if not part.startswith("__"):
        if hasattr(owner, part):
            return getattr(owner, part)
        is_package = isinstance(owner, types.ModuleType) and hasattr(owner, "__path__")
        if is_package and part in {each.name for each in pkgutil.iter_modules(owner.__path__)}:
            return _import_module(f"{owner.__name__}.{part}", path)
    raise InvalidValueError(f"{path!r}: {owner_path!r} has no {part!r}{suggest(part, _public_names(owner))}")


def _import_module(module: str, path: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a module of the user may raise anything
        if module == "torchmetrics" and isinstance(error, ModuleNotFoundError) and error.name == module:
            install = "torchmetrics is not installed; run: pip install 'noether[metrics]'"
            raise InvalidValueError(f"{path!r}: {install}") from None
        raise InvalidValueError(f"{path!r}: importing {module!r} failed: {type(error).__name__}: {error}") from None


def _check_module(module: str, path: str, allow: Sequence[str], run_dir: Path | None) -> None:
    """Raise unless the prefix of `module` is allowed; no code of the module runs."""
    head, *rest = module.split(".")
    metrics = ALLOWED_METRICS if head == "torchmetrics" and not _is_of_user(head) else ()
    if any(f"{module}.".startswith(f"{prefix}.") for prefix in (*ALLOWED, *metrics, *allow)):
        return
    files = _module_files(head)
    if _is_of_user(head):
        if run_dir is None or not any(_is_in_run(run_dir, file, rest) for file in files or ()):
            return
        where = f"is in {run_dir}, the directory of the run itself"
        raise InvalidValueError(f"{path!r} {where}; to import it, add --allow {head} on the command line")
    if files is None:
        raise InvalidValueError(f"{path!r}: there is no module {head!r}{suggest(head, ALLOWED)}")
    prefixes = ", ".join((*ALLOWED, *metrics, *allow, "modules under the working directory"))
    hint = f"to allow it, pass allow=({head!r},), or --allow {head} on the command line"
    raise InvalidValueError(f"{path!r}: {head!r} is not an allowed prefix ({prefixes}); {hint}")


def _module_files(head: str) -> list[str] | None:
    """Return the file or folders of a top-level module without running it, or None if there is no such module."""
    here = str(Path.cwd())
    if here not in sys.path:
        # A console script does not see the working directory. At the end, so that no file there hides a library.
        sys.path.append(here)
    try:
        spec = importlib.util.find_spec(head)
    except (ImportError, ValueError):  # the script that runs has no spec
        file = getattr(sys.modules.get(head), "__file__", None)
        return [file] if file else []
    if spec is None:
        return None
    if spec.has_location and spec.origin:
        return [spec.origin]
    return list(spec.submodule_search_locations or ())  # empty for a module built into the interpreter


def _is_of_user(head: str) -> bool:
    """Return whether a top-level module is one under the working directory, which may have the name of a library."""
    files = _module_files(head)
    return bool(files) and all(map(_belongs_to_user, files or ()))


def _belongs_to_user(file: str) -> bool:
    """Return whether a file lies under the working directory and is no library installed there."""
    found, here = Path(file).resolve(), Path.cwd().resolve()
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    return found.is_relative_to(here) and not any(found.is_relative_to(each) for each in installed)


def _is_in_run(run_dir: Path, file: str, rest: Sequence[str]) -> bool:
    """Return whether the path `rest` in a top-level module or package leads into the directory of a run."""
    found = Path(file)
    folder = found.parent if found.name == "__init__.py" else found
    return folder.joinpath(*rest).resolve().is_relative_to(run_dir.resolve())


def _public_names(owner: object) -> list[str]:
    names = [name for name in dir(owner) if not name.startswith("_")]
    # Without `__getattr__`, because some modules of torch answer to every name.
    submodules = pkgutil.iter_modules(inspect.getattr_static(owner, "__path__", None) or [])
    return [*names, *(each.name for each in submodules)]
