"""Base class of callbacks: settings are fields, memory is in the state, and hooks are pure."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self, dataclass_transform

from noether.core.callback import describe_effect_types
from noether.core.callbacks.hooks import find_hook_problems, find_mistyped
from noether.core.errors import Problem, raise_problems, suggest
from noether.core.event import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    AtEval,
    BeforeTraining,
    Event,
    check_reading,
    kind_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.effect import Effect
    from noether.core.state import Memory, TrainState

HOOKS: Final[dict[type[Event], str]] = {
    BeforeTraining: "before_training",
    AfterAccumulationStep: "after_accumulation_step",
    AfterUpdate: "after_update",
    AfterEpoch: "after_epoch",
    AfterTraining: "after_training",
    AtEval: "at_eval",
}


def _refuse_assignment(callback: CallbackBase, name: str, value: object) -> None:  # noqa: ARG001  # as in `object`
    raise FrozenInstanceError(
        f"cannot assign to field {name!r} of {type(callback).__name__}, which is frozen: a setting is a field of the "
        f"class, `{name}: ...`, without __init__; what a callback remembers is in the state, "
        "`state.remember(self.name, memory)`"
    )


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)  # for its own setting; subclasses get theirs below
class CallbackBase:
    """Base class of callbacks written as classes; a subclass overrides the hooks of the events that it handles.

    Each hook takes `(state, event)` and returns `(state, effects)`; a hook with nothing to do returns `state, ()`.
    Every subclass becomes a frozen dataclass with keyword-only fields, its settings, without a decorator. A subclass
    that logs lists the keys in `produces`; None means any key. One that requests an effect of yours lists its type in
    `effects`.

    Args:
        id: Name of the callback's memory; None for a name made of its class and settings.

    Example:
        >>> from noether import LogText, TrainState
        >>> class Greet(CallbackBase):
        ...     greeting: str = "hello"
        ...     def before_training(self, state, event):
        ...         return state, (LogText(self.greeting),)
        >>> Greet(greeting="go")(TrainState(), BeforeTraining())[1]
        (LogText(text='go'),)
    """

    id: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:  # options of a metaclass, such as ABCMeta
        super().__init_subclass__(**options)
        dataclass(frozen=True, kw_only=True)(cls)
        cls.__setattr__ = _refuse_assignment  # type: ignore[method-assign,assignment]  # mypy allows no change of a method
        readings = vars(cls).get("readings")
        if isinstance(readings, tuple):  # a property is checked on the instance
            raise_problems(check_reading(cls.__name__, name) for name in readings)

    def __new__(cls, *args: Any, **settings: Any) -> Self:  # noqa: ARG004  # `__init__` takes or refuses them
        """Return the instance to initialize.

        Raises:
            TypeError: If there is no such setting, naming the nearest.
        """
        known = list(inspect.signature(cls.__init__).parameters.values())[1:]
        takes_any = any(each.kind is each.VAR_KEYWORD for each in known)
        for name in () if takes_any else settings.keys() - {each.name for each in known}:
            names = [each.name for each in known]
            hint = suggest(name, names) or f"; it has {', '.join(names)}"
            raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        raise_problems(find_mistyped(self))  # those that follow may iterate the settings
        raise_problems(self.problems())

    def problems(self) -> Iterator[Problem | None]:
        """Yield each problem of hooks and settings; a subclass adds its own after `yield from super().problems()`."""
        unused = self._check_hooks()
        yield from find_hook_problems(self, self._hook_names()) if unused is None else (unused,)
        label = type(self).__name__
        readings: Any = self.readings
        if isinstance(readings, str):
            yield Problem("", f"{label}: readings is {readings!r}, not a tuple: write ({readings!r},)")
        else:
            yield from (check_reading(label, name) for name in readings)
        if problem := describe_effect_types(self.effects):
            yield Problem("", f"{label}: {problem}")

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the result of the hook for this type of event."""
        hook = HOOKS.get(type(event)) or HOOKS.get(kind_of(type(event)))
        if hook is None:
            return state, ()
        after: tuple[TrainState, Effects] = getattr(self, hook)(state, event)
        return after

    def before_training(self, state: TrainState, event: BeforeTraining) -> tuple[TrainState, Effects]:
        """Handle the start of training, or the resume of a run if `event.resumed`."""
        return state, ()

    def after_accumulation_step(self, state: TrainState, event: AfterAccumulationStep) -> tuple[TrainState, Effects]:
        """Handle the gradients of a micro-batch; a reducer refuses effects here."""
        return state, ()

    def after_update(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Handle an optimizer update."""
        return state, ()

    def after_epoch(self, state: TrainState, event: AfterEpoch) -> tuple[TrainState, Effects]:
        """Handle the end of an epoch."""
        return state, ()

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Handle the end of training."""
        return state, ()

    def at_eval(self, state: TrainState, event: AtEval) -> tuple[TrainState, Effects]:
        """Handle a standalone evaluation."""
        return state, ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return the initial memory of the callback by name; most callbacks have one memory, `self.name`."""
        return {}

    @cached_property
    def name(self) -> str:
        """Name of the callback in messages, and of its memory: `id`, or the class and `name_parts`."""
        return self.id or "/".join((type(self).__name__, *self.name_parts()))

    def name_parts(self) -> tuple[str, ...]:
        """Return the settings that distinguish two callbacks of one class, such as interval and metric key."""
        return ()

    def memory(self, state: TrainState) -> Memory:
        """Return the memory of this callback in `state`, or its initial memory if `state` has none."""
        name = self.name
        return state.callback_states[name] if name in state.callback_states else self.init(state)[name]

    @property
    def produces(self) -> tuple[str, ...] | None:
        """Patterns of the metric keys that it logs; None if it may log any key."""
        return None

    @property
    def consumes(self) -> tuple[str, ...]:
        """Metric keys that have to be current when it acts; an `OptionalKey` is read only where it is current."""
        return ()

    @property
    def readings(self) -> tuple[str, ...]:
        """Costly fields of `AfterUpdate` that it reads, such as `grad_norm`; see `READINGS`."""
        return ()

    @property
    def effects(self) -> tuple[type[Effect], ...]:
        """Types of effects of yours that it requests; a run starts only if each has a handler."""
        return ()

    def _listens(self, event_type: type[Event]) -> bool:
        # A class with its own `__call__` may act on any event.
        hooks = ("__call__", HOOKS.get(kind_of(event_type), "__call__"))
        return any(self.overrides(hook, CallbackBase) for hook in hooks)

    def _hook_names(self) -> tuple[str, ...]:
        """Return the names of the methods that noether calls and a subclass may define."""
        return (*HOOKS.values(), "init")

    def _check_hooks(self) -> Problem | None:
        """Return the problem of a class that overrides no hook, most often because a name is misspelt."""
        kind, hooks = type(self), (*HOOKS.values(), "__call__", "init")
        own = [name for name, value in vars(kind).items() if callable(value) and not hasattr(CallbackBase, name)]
        if not own or any(self.overrides(hook, CallbackBase) for hook in hooks):
            return None
        if any(find_hook_problems(self, self._hook_names())):  # it has a misspelt name, which is reported
            return None
        fix = f"define one of {', '.join(HOOKS.values())}, or __call__"
        return Problem("", f"{kind.__name__} does nothing, as noether never calls {', '.join(own)}: {fix}")

    @classmethod
    def overrides(cls, hook: str, base: type) -> bool:
        """Return whether the class has another `hook` than the one that it would inherit from `base`."""
        return getattr(cls, hook) is not getattr(base, hook)
