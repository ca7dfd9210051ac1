"""The only code that touches the world: a table from effect type to handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from noether.core.effect import Effect, LogScalars
from noether.core.errors import NoetherError, suggest
from noether.core.tensors.tree import FrozenDict
from noether.effects.disk.encoding import NUMBER_TYPES
from noether.effects.merging import merge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from noether.core.event import Event
    from noether.core.state import TrainState

    Handler = Callable[[Any, TrainState, Event], None]
    Measure = Callable[[Any, TrainState, Event], Mapping[str, float]]


_NONE: Final[tuple[Handler, ...]] = ()


class UnhandledEffectError(NoetherError, LookupError):
    """Something was asked for that nobody does."""


class Interpreter:
    """Carries effects out: calls every handler of an effect's type with `(effect, state, event)`.

    Args:
        handlers: Handlers by type of effect, called in their order.
        measures: By type of effect, what turns it into scalars that are logged with those of its event.
        check: Called first with every event, with effects or without: raises what went wrong in the background.

    Example:
        >>> from noether import AfterTraining, LogText, TrainState
        >>> interpreter = Interpreter({LogText: [lambda effect, state, event: print(effect.text)]})
        >>> interpreter([LogText("done")], TrainState(), AfterTraining())
        done
    """

    def __init__(
        self,
        handlers: Mapping[type[Effect], Sequence[Handler]],
        measures: Mapping[type[Effect], Measure] | None = None,
        check: Callable[[Event], None] = lambda event: None,  # noqa: ARG005  # what it is called with
    ) -> None:
        self._handlers = {effect_type: tuple(each) for effect_type, each in handlers.items()}
        self._measures = dict(measures or {})
        self._unmeasured = self._handlers.keys() - self._measures.keys()
        self._check_background = check

    def __call__(self, effects: Sequence[Effect], state: TrainState, event: Event) -> None:
        """Carry out the effects of one event, merged, on the settled state; nothing on a rank other than 0.

        Handlers of `LogScalars` are given numbers: the tensors among the values are read here, in one transfer.

        Raises:
            UnhandledEffectError: If nobody handles one of them; then none is carried out.
        """
        self._check_background(event)
        if not effects:
            return
        measured = False
        for effect in effects:
            if type(effect) not in self._unmeasured:
                self._check(type(effect))
                self._check(LogScalars)  # as which it is logged
                measured = True
        if event.run.rank != 0:
            return
        if measured:
            effects = [each for effect in effects for each in self._measured(effect, state, event)]
        for effect in map(_on_host, merge(effects)):
            for handler in self._handlers[type(effect)]:
                handler(effect, state, event)

    def handling(self, effect_type: type[Effect], *handlers: Handler) -> Interpreter:
        """Return the interpreter in which `handlers` are called, after its own, for effects of this type.

        Example:
            >>> from dataclasses import dataclass
            >>> from noether import AfterTraining, Effect, TrainState
            >>> @dataclass(frozen=True)
            ... class Ring(Effect):
            ...     times: int
            >>> interpreter = Interpreter({}).handling(Ring, lambda ring, state, event: print("ding " * ring.times))
            >>> interpreter([Ring(2)], TrainState(), AfterTraining())
            ding ding
        """
        handled = {**self._handlers, effect_type: (*self._handlers.get(effect_type, _NONE), *handlers)}
        return Interpreter(handled, self._measures, self._check_background)

    def _measured(self, effect: Effect, state: TrainState, event: Event) -> tuple[Effect, ...]:
        """Return an effect with what was measured for it, or without itself where nobody handles it otherwise."""
        measure = self._measures.get(type(effect))
        if measure is None:
            return (effect,)
        own = (effect,) if type(effect) in self._handlers else ()
        return (*own, LogScalars(FrozenDict(measure(effect, state, event))))

    def _check(self, effect_type: type[Effect]) -> None:
        if effect_type not in self._handlers and effect_type not in self._measures:
            known = [known.__name__ for known in dict.fromkeys((*self._handlers, *self._measures))]
            raise UnhandledEffectError(
                f"nobody handles the effect {effect_type.__name__}{suggest(effect_type.__name__, known)}; "
                f"register it with interpreter.handling({effect_type.__name__}, handler). "
                f"Handled: {', '.join(known) or 'none'}"
            )


def _on_host(effect: Effect) -> Effect:
    """Return scalars as numbers; those on an accelerator come over together."""
    if not isinstance(effect, LogScalars) or NUMBER_TYPES.issuperset(map(type, effect.values.values())):
        return effect
    numbers = dict(effect.values)
    away = [key for key, value in numbers.items() if isinstance(value, torch.Tensor) and value.is_cuda]
    if away:
        stacked = torch.stack([torch.as_tensor(numbers[key]).detach().double() for key in away]).tolist()
        numbers |= dict(zip(away, stacked, strict=True))
    read = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in numbers.items()}
    return LogScalars(FrozenDict(read), effect.quiet)
