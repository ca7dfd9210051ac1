"""Objects that a configuration names by a dotted path, and the roles that they can fill."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from noether.config.errors import InvalidValueError
from noether.config.objects.callables import is_foreign, is_from, is_lambda
from noether.config.objects.import_policy import import_allowed
from noether.config.structure.signatures import signature_parameters
from noether.core.callables import accepts, describe_deferred, describe_misfit, may_accept, signature_of

if TYPE_CHECKING:
    from pathlib import Path


class Entry:
    """Base of the objects named in a configuration; `build` returns the object."""

    def build(self) -> Any:
        """Return the object."""
        raise NotImplementedError


@final
@dataclass(frozen=True)
class Kind(Entry):
    """An object named in a configuration, with its checked settings.

    Args:
        path: The dotted path as it was written; empty for a dataclass that a setting's annotation names.
        target: The class or function at that path.
        settings: Keyword arguments, with defaults filled in.
        instance: The object, if checking its settings constructed it already; None if not.

    Example:
        >>> Kind("builtins.dict", dict, {"a": 1}).build([("b", 2)])
        {'b': 2, 'a': 1}
    """

    path: str
    target: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    instance: Any = field(default=None, compare=False, repr=False)

    def build(self, *args: object) -> Any:
        """Return the object: `instance` if there is one, otherwise the target called with `args` and the settings.

        An object named in the settings, or in a list or mapping there, is built first.
        """
        return self.target(*args, **build_nested(self.settings)) if self.instance is None else self.instance


def build_nested(value: Any) -> Any:
    """Return a setting with every object built that is named in it, or in a list or mapping there.

    Example:
        >>> build_nested({"sizes": [Kind("builtins.int", int), 2]})
        {'sizes': [0, 2]}
    """
    if isinstance(value, Mapping):
        return {key: build_nested(each) for key, each in value.items()}
    if type(value) in {list, tuple, set, frozenset}:  # no named tuple
        return type(value)(map(build_nested, value))
    return value.build() if isinstance(value, Entry) else value


@final
@dataclass(frozen=True)
class Role:
    """What a setting expects the object at its dotted path to be.

    Args:
        name: The role with its article, for messages.
        fits: Returns whether an object fits.
        expected: Description of the objects that fit, for messages.
        given: Parameters that the caller passes when it builds the object; they are no settings.
        passed_by_name: Keyword parameters that the caller passes when it calls the object, unless settings have them.
        arguments: What the caller passes when it calls the object, if that is a function.
        has_names: Whether text without a dot is the name of an object of noether, which its reader checks.
    """

    name: str
    fits: Callable[[object], bool]
    expected: str
    given: tuple[str, ...] = ()
    passed_by_name: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    has_names: bool = False

    def in_words(self, annotation: object) -> str:
        """Return what YAML has for a setting of this role: the type of `annotation` in words."""
        if annotation is Kind:
            return f"{self.name}: `kind` and settings"
        return f"{'name or ' if self.has_names else ''}dotted path of {self.name}"


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
        message = f"{path!r} is {_describe(target, role)}, expected {role.name}: {role.expected}"
        raise InvalidValueError(f"{message}{_hint(path, target, role)}")
    return target


def _hint(path: object, target: object, role: Role) -> str:
    """Return what to write in place of a class, of a function, or of an object of torch that takes other arguments."""
    if role is PART and inspect.isroutine(target) and not is_foreign(target):
        return "; for the function itself, annotate the parameter as Callable; for what it returns, annotate its return"
    if not role.arguments or role is CALLBACK:
        return ""
    if is_from(target, "torch") and (isinstance(target, type) or not inspect.isroutine(target)):
        if "outputs" not in role.arguments:  # such as a scheduler of torch, which is no function of progress
            return f"; write a function of yours: def name({', '.join(role.arguments)})"
        call = f"{getattr(target, '__name__', type(target).__name__)}()(outputs, batch[1])"
        return f"; call it in a function of yours, such as def loss(outputs, batch): return {{'loss': {call}}}"
    if isinstance(target, type) and can_serve(target, role):
        return f"; for an instance of the class, write {{kind: {path}}}"
    return ""


def check_constructible(path: str, target: object) -> None:
    """Refuse a class of torch that takes its parts by position, which YAML cannot give.

    Raises:
        InvalidValueError: If it does.

    Example:
        >>> import torch
        >>> check_constructible("torch.nn.Sequential", torch.nn.Sequential)
        Traceback (most recent call last):
        noether.config.errors.InvalidValueError: 'torch.nn.Sequential' takes its arguments by position, which YAML
        cannot give: name a function of yours that returns it, def make() -> Sequential
    """
    if not isinstance(target, type) or not is_from(target, "torch"):
        return
    kinds = {each.kind for each in signature_parameters(target)}
    if kinds == {inspect.Parameter.VAR_POSITIONAL}:
        raise InvalidValueError(
            f"{path!r} takes its arguments by position, which YAML cannot give: name a function of yours that returns "
            f"it, def make() -> {target.__name__}"
        )


def _describe(target: object, expected: Role) -> str:
    """Return the role that an object fits, or else its type and why a function does not fit the expected role."""
    if isinstance(target, type):
        fitting = [role.name for role in (MODEL, DATASET, OPTIMIZER, CALLBACK) if role.fits(target)]
        return f"{fitting[0]} class" if fitting else "a class"
    if deferred := describe_deferred(target):
        return f"{deferred}, but its result is needed at once"
    if inspect.isroutine(target):
        if is_lambda(target):
            return "a lambda, which has no name"
        misfit = describe_misfit(target, *expected.arguments) if expected.arguments else None
        return f"a function, which {misfit}" if misfit else "a function"
    return "a module" if isinstance(target, types.ModuleType) else f"of type {type(target).__name__}"


def _constructs(target: object, base: type) -> bool:
    """Return whether `target` is a subclass of `base`, or a function annotated to return an instance of it.

    No function of torch counts: some make a module by running source code, or any function, passed to them.
    """
    if isinstance(target, type):
        return issubclass(target, base)
    if is_from(target, "torch"):
        return False
    if isinstance(target, functools.partial) and not target.args:
        return _constructs(target.func, base)
    try:
        result = typing.get_type_hints(target).get("return") if inspect.isfunction(target) else None
    except Exception:  # noqa: BLE001 - evaluating an annotation can raise anything
        return False
    origin = typing.get_origin(result) or result
    return isinstance(origin, type) and issubclass(origin, base)


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
    """Return whether `target` is a callback of noether or the user, called with `(state, event)`, or a class of them.

    Every subclass of `CallbackBase` is a frozen dataclass; a class written without it has to be a dataclass too.
    """
    if isinstance(target, type):
        if is_foreign(target) or not dataclasses.is_dataclass(target) or "__call__" not in dir(target):
            return False
        return _is_called_with(target.__call__, "self", "state", "event")
    if is_foreign(target) or is_lambda(target) or _is_built_model(target) or _constructs(target, type(None)):
        return False
    return _is_called_with(target, "state", "event")


def _is_called_with(target: Any, *arguments: str) -> bool:
    """Return whether a callable takes the arguments and returns its result at once.

    Many functions of noether take two arguments: there, the parameters also have these names.
    """
    if not accepts(target, *arguments) or describe_deferred(target):
        return False
    return not is_from(target, "noether") or tuple(inspect.signature(target).parameters)[: len(arguments)] == arguments


def _is_built_model(target: object) -> bool:
    import torch

    return isinstance(target, torch.nn.Module)


def _is_part(target: object) -> bool:
    is_own_class = isinstance(target, type) and not is_foreign(target) and not is_from(target, "noether")
    return is_own_class or _is_dataset(target) or _is_model(target)


def _reads_outputs(target: object) -> bool:
    takes_outputs = may_accept(target, "outputs", "batch") and not _is_loss_of_torch(target)
    return _is_function(target) and takes_outputs and not describe_deferred(target)


def _counts_samples(target: object) -> bool:
    return _is_function(target) and may_accept(target, "batch") and not describe_deferred(target)


def _is_handler(target: object) -> bool:
    return _is_function(target) and may_accept(target, "effect", "state", "event") and not describe_deferred(target)


def _is_function(target: object) -> bool:
    return callable(target) and not isinstance(target, type)


def can_serve(target: Any, role: Role) -> bool:
    """Return whether `target`, or an instance of it if it is a class, can be called as `role` says, with settings."""
    if not callable(target) or not role.arguments:
        return callable(target)
    called: Any = target
    if isinstance(target, type):
        method = "forward" if _is_model(target) else "__call__"
        if is_foreign(target) or method not in dir(target):
            return False
        called = functools.partial(getattr(target, method), target)
    if describe_deferred(called) or _is_loss_of_torch(target):
        return False
    try:
        positional = [each for each in signature_of(called).parameters.values() if each.kind is not each.KEYWORD_ONLY]
        inspect.Signature(positional[: len(role.arguments)]).bind(*role.arguments)
    except TypeError:
        return False
    except ValueError:  # a function written in C
        return True
    return True


def takes_settings(target: Any) -> bool:
    """Return whether a configuration, which may come from a stranger, gives settings to a function or class.

    It does to those of the user, to datasets, models and functions of `torch.nn.functional`. Others, such as
    `torch.hub.load`, could run code that the settings name.
    """
    if isinstance(target, type):
        return _is_part(target)
    functional = sys.modules.get("torch.nn.functional")
    is_known = any(target is each for each in vars(functional).values()) if functional else False
    in_examples = str(getattr(target, "__module__", "")).startswith("noether.examples.")
    return is_known or in_examples or not (is_foreign(target) or is_from(target, "noether"))


def _is_loss_of_torch(target: object) -> bool:
    """Return whether `target` is a loss module of torch, which is called with (outputs, targets)."""
    return type(target).__module__ == "torch.nn.modules.loss"


MODEL = Role("a model", _is_model, "a subclass of torch.nn.Module, or a function annotated to return one")
DATASET = Role(
    "a dataset", _is_dataset, "a subclass of torch.utils.data.Dataset, or a function annotated to return one"
)
OPTIMIZER = Role("an optimizer", _is_optimizer, "a subclass of torch.optim.Optimizer", given=("params",))
CALLBACK = Role(
    "a callback",
    is_callback,
    "a subclass of CallbackBase, or a function (state, event) -> (state, effects)",
    arguments=("state", "event"),
)
PART = Role("a part of another object", _is_part, "a class of yours, a dataset or a model")
FUNCTION = Role("a function", _is_function, "a callable that is not a class")
SETTING_FUNCTION = Role("a function", callable, "a callable")
OUTPUT_FUNCTION = Role(
    "a function",
    _reads_outputs,
    "a callable that is not a class, called with (outputs, batch)",
    arguments=("outputs", "batch"),
)
METRIC = dataclasses.replace(OUTPUT_FUNCTION, has_names=True)
FACTOR = Role(
    "a function of progress",
    lambda target: _is_function(target) and may_accept(target, "progress") and not describe_deferred(target),
    "a callable that is not a class, called with (progress) in [0, 1]",
    arguments=("progress",),
    has_names=True,
)
BATCH_FUNCTION = Role(
    "a function of one batch",
    _counts_samples,
    "a callable that is not a class, called with (batch)",
    arguments=("batch",),
)
HANDLER = Role(
    "a function",
    _is_handler,
    "a callable that is not a class, called with (effect, state, event)",
    arguments=("effect", "state", "event"),
    passed_by_name=("directory", "services"),
)
SAMPLER = Role(
    "a sampler",
    lambda target: callable(target) and not describe_deferred(target),
    "a class of samplers, or a function that returns the indices of the samples of an epoch",
    given=("dataset", "data_source", "seed", "epoch", "generator"),
)
EFFECT = Role("a type of effect", lambda target: isinstance(target, type), "a class")
