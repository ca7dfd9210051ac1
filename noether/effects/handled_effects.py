"""Types of effects that have a handler, and messages about those that callbacks request without one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from noether.core.callback import declaration_of, label_of, leaves_of, parts_of
from noether.core.effect import Effect, MeasurePeakMemory, SaveCheckpoint
from noether.effects.run_logs import LOG_EFFECTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from noether.core.callback import Callback

HANDLED_EFFECTS: Final[tuple[type[Effect], ...]] = (*LOG_EFFECTS, SaveCheckpoint, MeasurePeakMemory)
"""The types of effects that a run directory handles."""


def find_unhandled(callback: Callback, handles: Callable[[type[Effect]], bool]) -> Iterator[str]:
    """Yield a message for each type of effect that a callback declares and that has no handler.

    Args:
        callback: The callback; each member of a composed callback is checked.
        handles: Returns whether a type has a handler, such as `Interpreter.handles`.

    Example:
        >>> from noether.core.callbacks.base import CallbackBase
        >>> class Ring(Effect): ...
        >>> class Bell(CallbackBase):
        ...     effects = (Ring,)
        >>> list(find_unhandled(Bell(), lambda effect_type: effect_type is Ring))
        []
        >>> (message,) = find_unhandled(Bell(), lambda effect_type: False)
        >>> message.partition(":")[0]
        'Bell requests the effect Ring, which has no handler'
    """
    seen: set[type[Effect]] = set()
    inside = (each for part in parts_of(callback) for each in (*leaves_of(part), part))
    for each in inside:  # the name of the innermost callback is the most precise one
        missing = [kind for kind in declaration_of(each).effects if kind not in seen and not handles(kind)]
        seen.update(missing)
        yield from describe_unhandled(label_of(each), missing)


def describe_unhandled(label: str, effect_types: Iterable[type[Effect]]) -> Iterator[str]:
    """Yield a message for each type of effect that a callback requests and that has no handler: what to write.

    Args:
        label: The name of the callback.
        effect_types: The types of effects without a handler.
    """
    for kind in effect_types:
        module = "my_module" if kind.__module__ in {"__main__", "builtins"} else kind.__module__
        name = kind.__name__
        handler = f"handle_{re.sub('(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()}"
        yield (
            f"{label} requests the effect {name}, which has no handler: write a function {handler}(effect, state, "
            f"event), and name it in YAML, run.handlers: {{{module}.{name}: {module}.{handler}}}, or in Python, "
            f"interpreter=directory.interpreter.with_handlers({module}.{name}, {handler})"
        )
