"""Objects that a configuration names by a dotted path, and the roles that they can fill."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence  # noqa: TC003 - the annotations of a dataclass are read at run time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from noether.config.errors import InvalidValueError
from noether.config.objects.import_policy import import_allowed

if TYPE_CHECKING:
    from pathlib import Path


@final
@dataclass(frozen=True)
class Kind:
    """An object named in a configuration, with its checked settings.

    Args:
        path: The dotted path as it was written.
        target: The class or function at that path.
        settings: Keyword arguments, with defaults filled in.
        instance: The object, if checking its settings constructed it already; None if not.

    Example:
        >>> Kind("builtins.dict", dict, {"a": 1}).build([("b", 2)])
        {'b': 2, 'a': 1}
    """

    path: str
    target: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    instance: Any = field(default=None, compare=False, repr=False)

    def build(self, *args: object) -> Any:
        """Return the object: `instance` if there is one, otherwise the target called with `args` and the settings."""
        return self.target(*args, **self.settings) if self.instance is None else self.instance


@final
@dataclass(frozen=True)
class Role:
    """What a setting expects the object at its dotted path to be.

    Args:
        name: The role with its article, for messages.
        fits: Returns whether an object fits.
        expected: Description of the objects that fit, for messages.
        given: Parameters that the caller passes when it builds the object; they are no settings.
    """

    name: str
    fits: Callable[[object], bool]
    expected: str
    given: tuple[str, ...] = ()


def resolve(path: object, role: Role, allow: Sequence[str] = (), run_dir: Path | None = None) -> Any:
    """Return the object at a dotted path, if it may be imported and fits the role.

    Args:
        path: `module.attribute`.
        role: The role that the object must fit.
        allow: As for `import_allowed`.
        run_dir: As for `import_allowed`.

    Raises:
        InvalidValueError: If `import_allowed` refuses the path, or the object does not fit the role.

    Example:
        >>> resolve("os.system", FUNCTION)
        Traceback (most recent call last):
        noether.config.errors.InvalidValueError: 'os.system': 'os' is not an allowed prefix (noether, torch, modules
        under the working directory); to allow it, pass allow=('os',), or --allow os on the command line
    """
    target = import_allowed(path, allow, run_dir)
    if not role.fits(target):
        raise InvalidValueError(f"{path!r} is {_describe(target)}, expected {role.name}: {role.expected}")
    return target


def _describe(target: object) -> str:
    """Return the role that an object fits, or else its type, for a message."""
    if isinstance(target, type):
        fitting = [role.name for role in (MODEL, DATASET, OPTIMIZER, CALLBACK) if role.fits(target)]
        return f"{fitting[0]} class" if fitting else "a class"
    if inspect.isroutine(target):
        return "a function"
    return "a module" if isinstance(target, types.ModuleType) else f"of type {type(target).__name__}"


def _constructs(target: object, base: type) -> bool:
    """Return whether `target` is a subclass of `base`, or a function annotated to return an instance of it.

    No function of torch counts: some make a module by running source code, or any function, passed to them.
    """
    if isinstance(target, type):
        return issubclass(target, base)
    if _is_from_torch(target):
        return False
    try:
        result = typing.get_type_hints(target).get("return") if inspect.isfunction(target) else None
    except Exception:  # noqa: BLE001 - evaluating an annotation can raise anything
        return False
    origin = typing.get_origin(result) or result
    return isinstance(origin, type) and issubclass(origin, base)


def _is_from_torch(target: object) -> bool:
    return f"{getattr(target, '__module__', None)}.".startswith("torch.")


# These import torch when they are called, because a configuration can be read without it.


def _is_model(target: object) -> bool:
    import torch

    return _constructs(target, torch.nn.Module)


def _is_dataset(target: object) -> bool:
    import torch

    return _constructs(target, torch.utils.data.Dataset)


def _is_optimizer(target: object) -> bool:
    import torch

    return isinstance(target, type) and issubclass(target, torch.optim.Optimizer)


def is_callback(target: object) -> bool:
    """Return whether `target` is a callback, that is called with `(state, event)`, or a class of callbacks.

    Every subclass of `CallbackBase` is a frozen dataclass; a class written without it has to be a dataclass too.
    """
    if isinstance(target, type):
        return dataclasses.is_dataclass(target) and "__call__" in dir(target)
    try:
        signature = inspect.signature(target)  # type: ignore[arg-type]  # raises if it is not callable
        # Keyword-only parameters are the settings of a function.
        positional = [each for each in signature.parameters.values() if each.kind is not each.KEYWORD_ONLY]
        signature.replace(parameters=positional).bind("state", "event")
    except (TypeError, ValueError):
        return False
    return not _constructs(target, type(None)) and not _is_from_torch(target)


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
FUNCTION = Role(
    "a function", lambda target: callable(target) and not isinstance(target, type), "a callable that is not a class"
)
EFFECT = Role("a type of effect", lambda target: isinstance(target, type), "a class")
