"""Descriptions of callbacks from their docstrings and signatures: settings, documentation, YAML."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from noether.config.bounds import find_bounds
from noether.config.compatibility import current_path, translation_of
from noether.config.docstrings import SECTION, Setting, argument_texts, docstring_of, inherited_texts, make_setting
from noether.config.errors import InvalidValueError
from noether.config.objects.callables import is_from
from noether.config.objects.function_callback import FunctionCallbackFactory
from noether.config.objects.import_policy import import_allowed
from noether.config.objects.kinds import CALLBACK, OPTIMIZER, resolve
from noether.config.structure.signatures import parameters
from noether.core.callback import declaration_of
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.callbacks.registry import ALIASES, EXPORTS, SHIPPED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PREFIX = "noether.core.callbacks"
_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@final
@dataclass(frozen=True)
class Description:
    """The description of a callback.

    Args:
        kind: Its dotted path.
        aliases: Its other names.
        summary: The first sentence of its documentation.
        text: Its documentation without the sections that the other fields contain.
        settings: Required settings, then optional ones; within each group its own before inherited ones.
        renamed: New name of a setting by an older name that YAML may use.
        yaml: An example entry of `callbacks`.
    """

    kind: str
    aliases: tuple[str, ...]
    summary: str
    text: str
    settings: tuple[Setting, ...]
    renamed: Mapping[str, str]
    yaml: str


def known_kinds() -> dict[str, tuple[str, ...]]:
    """Return the names of all callbacks that noether ships, sorted, each with its aliases.

    Example:
        >>> known_kinds()["LrCallback"]
        ('LR',)
    """
    canonical = {alias: EXPORTS[alias].load().__name__ for alias in ALIASES}
    return {name: tuple(alias for alias in ALIASES if canonical[alias] == name) for name in sorted(SHIPPED)}


def describe(kind: str, allow: Sequence[str] = ()) -> Description:
    """Return the description of a callback.

    Args:
        kind: The name of a callback of noether, or a dotted path.
        allow: Prefixes of modules that the path may begin with, in addition to those that are always allowed.

    Raises:
        InvalidValueError: If there is no such callback.

    Example:
        >>> describe("ReduceLROnPlateauCallback").settings[2]
        Setting(name='factor', type='number', default='0.1', text='Factor for the learning rate, in (0, 1).',
                bounds='above 0 and below 1')
    """
    path = kind if "." in kind else f"{PREFIX}.{kind}"
    try:
        target = resolve(path, CALLBACK, allow)
    except InvalidValueError:
        path = current_path(path)
        target = resolve(path, CALLBACK, allow)
    aliases = known_kinds().get(getattr(target, "__name__", ""), ()) if path.startswith(f"{PREFIX}.") else ()
    if path.removeprefix(f"{PREFIX}.") in aliases:
        path = f"{PREFIX}.{target.__name__}"
    doc = docstring_of(target if isinstance(target, type) else inspect.unwrap(target))
    settings = _settings(target)
    text = re.sub(r"\n{3,}", "\n\n", SECTION.sub("", _YAML.sub("", doc))).strip()
    return Description(
        kind=path,
        aliases=aliases,
        summary=" ".join(text.partition("\n\n")[0].split()),
        text=text,
        settings=settings,
        renamed=translation_of(target).renamed,
        yaml=_example(path, target, doc, settings),
    )


def describe_object(path: str, allow: Sequence[str] = ()) -> tuple[str, tuple[Setting, ...]]:
    """Return the summary and the settings of a class or function that YAML may name, from docstring and signature.

    Args:
        path: Its dotted path.
        allow: As for `describe`.

    Raises:
        InvalidValueError: If there is no such object, or it cannot be called.

    Example:
        >>> describe_object("noether.examples.digits.ConvNet")[1][0].name
        'width'
    """
    target = import_allowed(path, allow)
    if not callable(target):
        raise InvalidValueError(f"{path!r} is of type {type(target).__name__}; name a class or a function")
    doc = docstring_of(target)
    texts = argument_texts(doc)
    summary = " ".join(doc.partition("\n\n")[0].split())
    given = OPTIMIZER.given if OPTIMIZER.fits(target) else ()
    return summary, tuple(make_setting(each, texts) for each in parameters(target).values() if each.name not in given)


def _settings(target: Any) -> tuple[Setting, ...]:
    """Return the settings of a class or a function: required before optional, own before inherited."""
    if not isinstance(target, type):
        texts = inherited_texts(PeriodicCallback) | argument_texts(docstring_of(inspect.unwrap(target)))
        return tuple(make_setting(each, texts) for each in parameters(FunctionCallbackFactory(target)).values())
    known, settings = parameters(target), dict[str, Setting]()
    texts = inherited_texts(target)
    for owner in target.__mro__:
        own = [name for name in vars(owner).get("__annotations__", {}) if name in known and name not in settings]
        settings |= {name: make_setting(known[name], texts) for name in own}
    if is_from(target, "noether"):  # a constructor of the user's is not called for a description
        settings = {
            name: dataclasses.replace(each, bounds=str(find_bounds(target, name, known[name].annotation)))
            for name, each in settings.items()
        }
    return tuple(sorted(settings.values(), key=lambda setting: setting.default is not None))


def _example(path: str, target: Any, doc: str, settings: Sequence[Setting]) -> str:
    """Return the YAML in a docstring, or else an entry with the required settings."""
    example = _YAML.search(doc)
    if example:
        return example[1].rstrip()
    # YAML cannot give an interval to a function that has one from a decorator.
    has_interval = not isinstance(target, type) and declaration_of(target).gate is not None
    takes_interval = not has_interval and any(each.name == "every_n_epochs" for each in settings)
    interval = ["every_n_epochs: 1"] if takes_interval else []
    required = [f"{each.name}: <{each.type}>" for each in settings if each.default is None]
    return "\n  ".join((f"- kind: {path}", *interval, *required))
