"""What a dotted path in a configuration stands for, and whether it may stand there.

A configuration is data that somebody may have been sent, so a path is judged before anything of it is imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import sysconfig
import types
import typing
from collections.abc import Callable, Mapping, Sequence  # noqa: TC003 - the annotations of a dataclass are read at run time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from noether.config.structure import InvalidValueError
from noether.core.errors import suggest

ALLOWED = ("noether", "torch")
"""Prefixes that are always allowed, beside the modules under the working directory."""


@final
@dataclass(frozen=True)
class Kind:
    """An object named in a configuration with its checked settings, not made yet.

    Args:
        path: The dotted path as it was written.
        target: The class or function it stands for.
        settings: Keyword arguments, with defaults filled in.

    Example:
        >>> Kind("builtins.dict", dict, {"a": 1}).build([("b", 2)])
        {'b': 2, 'a': 1}
    """

    path: str
    target: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(self, *args: object) -> Any:
        """Return what the target makes of `args` and the settings."""
        return self.target(*args, **self.settings)


@final
@dataclass(frozen=True)
class Role:
    """What an object named in a configuration is expected to be.

    Args:
        name: What it is called, with its article.
        fits: Judges an object.
        expected: What would be right, for the message.
        given: Parameters that the caller gives when it builds the object; they are no settings.
    """

    name: str
    fits: Callable[[object], bool]
    expected: str
    given: tuple[str, ...] = ()


def resolve(path: object, role: Role, allow: Sequence[str] = (), run_dir: Path | None = None) -> Any:
    """Return the object at a dotted path, if it may be imported and fits the role.

    Args:
        path: `module.attribute`.
        role: What it is expected to be.
        allow: Prefixes that may be imported beside `ALLOWED` and the modules under the working directory.
        run_dir: Directory of a run, of which the configuration is a part: a module in it is not the user's own.

    Raises:
        InvalidValueError: Before anything is imported if the prefix is not allowed; else if there is no such thing, its
            module cannot be imported, or it does not fit.

    Example:
        >>> resolve("os.system", FUNCTION)
        Traceback (most recent call last):
        noether.config.structure.InvalidValueError: 'os.system': 'os' is not an allowed prefix (noether, torch, modules
        under the working directory); allow=('os',), or --allow os on the command line, allows it
    """
    if not isinstance(path, str) or "." not in path or not all(part.isidentifier() for part in path.split(".")):
        raise InvalidValueError(f"{path!r} is not a dotted path such as 'package.module.name'")
    target = _walked(path, lambda module: _judge(module, path, allow, run_dir))
    if not role.fits(target):
        raise InvalidValueError(f"{path!r} is {_described(target)}, expected {role.name}: {role.expected}")
    return target


def import_kind(path: str) -> Any:
    """Return the object at a dotted path that was judged when its configuration was loaded.

    Example:
        >>> import_kind("noether.core.errors.suggest").__name__
        'suggest'
    """
    return _walked(path, lambda _: None)


def _walked(path: str, judge: Callable[[str], None]) -> object:
    """Return the object at `path`; on the way every module has to be an allowed one (`torch.os.system` is not).

    So has the module that defines what a library only hands on (`torch.hub.urlopen`).
    """
    head, *parts = path.split(".")
    judge(path)
    found: object = _imported(head, path)
    done = head
    for part in parts:
        found = _part(found, done, part, path)
        done = f"{done}.{part}"
        if isinstance(found, types.ModuleType) and found.__name__ != done:
            judge(found.__name__)
    home = getattr(found, "__module__", None)
    if head in ALLOWED and isinstance(home, str):
        judge(home)
    return found


def _part(owner: object, done: str, part: str, path: str) -> object:
    """Return one attribute or submodule, as `from owner import part` finds them."""
    missing = InvalidValueError(f"{path!r}: {done!r} has no {part!r}{suggest(part, _public(owner))}")
    if part.startswith("__"):
        raise missing
    if hasattr(owner, part):
        return getattr(owner, part)
    if not isinstance(owner, types.ModuleType) or not hasattr(owner, "__path__"):
        raise missing
    if part not in {each.name for each in pkgutil.iter_modules(owner.__path__)}:
        raise missing
    return _imported(f"{owner.__name__}.{part}", path)


def _imported(module: str, path: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a module of the user's may raise anything
        raise InvalidValueError(f"{path!r}: importing {module!r} failed: {type(error).__name__}: {error}") from None


def _judge(module: str, path: str, allow: Sequence[str], run_dir: Path | None) -> None:
    """Raise unless the prefix of `module` is allowed; nothing is executed for it."""
    head, *rest = module.split(".")
    if any(f"{module}.".startswith(f"{prefix}.") for prefix in (*ALLOWED, *allow)):
        return
    files = _files(head)
    if files and all(map(_under_working_directory, files)):
        if run_dir is None or not any(_lies_in(run_dir, file, rest) for file in files):
            return
        raise InvalidValueError(
            f"{path!r} lies in {run_dir}, the directory of the run itself; --allow {head} allows it"
        )
    if files is None:
        raise InvalidValueError(f"{path!r}: there is no module {head!r}{suggest(head, ALLOWED)}")
    prefixes = ", ".join((*ALLOWED, *allow, "modules under the working directory"))
    hint = f"allow=({head!r},), or --allow {head} on the command line, allows it"
    raise InvalidValueError(f"{path!r}: {head!r} is not an allowed prefix ({prefixes}); {hint}")


def _files(head: str) -> list[str] | None:
    """Return the file or folders of a top-level module, without executing it; None if there is no such module."""
    here = str(Path.cwd())
    if here not in sys.path:
        # A console script does not see the working directory. At the end, so that nothing there hides a library.
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
    return list(spec.submodule_search_locations or ())  # empty for what is built into the interpreter


def _under_working_directory(file: str) -> bool:
    """Return whether a file is the user's own: below the working directory, but not a library installed there."""
    found, here = Path(file).resolve(), Path.cwd().resolve()
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    return found.is_relative_to(here) and not any(found.is_relative_to(each) for each in installed)


def _lies_in(run_dir: Path, file: str, rest: Sequence[str]) -> bool:
    """Return whether what lies at `rest` in a top-level module or package lies in the directory of a run."""
    found = Path(file)
    folder = found.parent if found.name == "__init__.py" else found
    return folder.joinpath(*rest).resolve().is_relative_to(run_dir.resolve())


def _public(owner: object) -> list[str]:
    names = [name for name in dir(owner) if not name.startswith("_")]
    # Not by way of `__getattr__`: some of torch's modules have an answer to every name.
    inside = pkgutil.iter_modules(inspect.getattr_static(owner, "__path__", None) or [])
    return [*names, *(each.name for each in inside)]


def _described(target: object) -> str:
    """Return what an object is, for a message: the role it would fit, or else its sort."""
    if isinstance(target, type):
        fitting = [role.name for role in (MODEL, DATASET, OPTIMIZER, CALLBACK) if role.fits(target)]
        return f"{fitting[0]} class" if fitting else "a class"
    if inspect.isroutine(target):
        return "a function"
    return "a module" if isinstance(target, types.ModuleType) else f"of type {type(target).__name__}"


def _makes(target: object, base: type) -> bool:
    """Return whether `target` is a subclass of `base`, or a function annotated to return one.

    Torch's own functions are none: some make a module by running source code, or any function, that they are given.
    """
    if isinstance(target, type):
        return issubclass(target, base)
    if _is_torchs(target):
        return False
    try:
        made = typing.get_type_hints(target).get("return") if inspect.isfunction(target) else None
    except Exception:  # noqa: BLE001 - evaluating an annotation can raise anything
        return False
    origin = typing.get_origin(made) or made
    return isinstance(origin, type) and issubclass(origin, base)


def _is_torchs(target: object) -> bool:
    return f"{getattr(target, '__module__', None)}.".startswith("torch.")


def _is_model(target: object) -> bool:
    import torch

    return _makes(target, torch.nn.Module)


def _is_dataset(target: object) -> bool:
    import torch

    return _makes(target, torch.utils.data.Dataset)


def _is_optimizer(target: object) -> bool:
    import torch

    return isinstance(target, type) and issubclass(target, torch.optim.Optimizer)


def _is_function(target: object) -> bool:
    return callable(target) and not isinstance(target, type)


def is_callback(target: object) -> bool:
    """Return whether `target` is a callback or makes one, by the definition in the core: `(state, event)` is called.

    Every subclass of `CallbackBase` is a frozen dataclass, and so is a callback that somebody wrote without it.
    """
    if isinstance(target, type):
        return dataclasses.is_dataclass(target) and "__call__" in dir(target)
    try:
        signature = inspect.signature(target)  # type: ignore[arg-type]  # what cannot be called raises
        taken = [each for each in signature.parameters.values() if each.kind is not each.KEYWORD_ONLY]  # its settings
        signature.replace(parameters=taken).bind("state", "event")
    except (TypeError, ValueError):
        return False
    return not _makes(target, type(None)) and not _is_torchs(target)


MODEL = Role("a model", _is_model, "a subclass of torch.nn.Module, or a function annotated to return one")
DATASET = Role(
    "a dataset", _is_dataset, "a subclass of torch.utils.data.Dataset, or a function annotated to return one"
)
OPTIMIZER = Role("an optimizer", _is_optimizer, "a subclass of torch.optim.Optimizer", given=("params",))
CALLBACK = Role(
    "a callback",
    is_callback,
    "a subclass of CallbackBase, or a function (state, event) -> (state, effects)",
)
FUNCTION = Role("a function", _is_function, "something to call that is not a class")
EFFECT = Role("a type of effect", lambda target: isinstance(target, type), "a class")
