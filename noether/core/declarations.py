"""Whether callbacks fit together: every consumer finds its metric, measured before it and where it is due."""

from __future__ import annotations

from collections import Counter as Multiset
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from noether.core.callback import Callback, Declaration, OptionalKey, declaration_of, init_of
from noether.core.errors import NoetherError, suggest
from noether.core.metrics import keys_overlap
from noether.core.schedules.coverage import covers
from noether.core.tensors.stored_weights import names_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.core.run import Run
    from noether.core.state import TrainState


@dataclass(frozen=True)
class Misfit:
    """What is wrong with one callback among the others."""

    callback: Callback
    message: str


class DeclarationError(NoetherError, ValueError):
    """Callbacks do not fit together; `misfits` holds every reason."""

    def __init__(self, misfits: Sequence[Misfit]) -> None:
        self.misfits = tuple(misfits)
        super().__init__("\n".join(misfit.message for misfit in self.misfits))


def check_declarations(callbacks: Sequence[Callback], state: TrainState, run: Run) -> None:
    """Refuse callbacks that do not fit together.

    Args:
        callbacks: In the order in which they are called.
        state: What their memory begins from.
        run: Where the epochs lie, as far as it is known.

    Raises:
        DeclarationError: If two callbacks remember under one name or produce one key, or if what one consumes is
            produced by nobody, by a later one, or not where it is due.
    """
    declared = [declaration_of(callback) for callback in callbacks]
    misfits = [
        *_shared_names(callbacks, state),
        *_shared_keys(callbacks, declared),
        *_unfed(callbacks, declared, run),
    ]
    if misfits:
        raise DeclarationError(misfits)


def _shared_names(callbacks: Sequence[Callback], state: TrainState) -> Iterator[Misfit]:
    names = [(name, callback) for callback in callbacks for name in init_of(callback, state)]
    counted = Multiset(name for name, _ in names)
    for name in (name for name, times in counted.items() if times > 1):
        last = [callback for other, callback in names if other == name][-1]
        yield Misfit(
            last,
            f"{counted[name]} callbacks remember under the name {name!r}; give this one an id or a name of its own",
        )


def _shared_keys(callbacks: Sequence[Callback], declared: Sequence[Declaration]) -> Iterator[Misfit]:
    for (_, first), (callback, second) in combinations(zip(callbacks, declared, strict=True), 2):
        for key in second.produces or ():
            if any(keys_overlap(key, other) for other in first.produces or ()):
                yield Misfit(callback, f"{second.label} and {first.label} both produce {key!r}; drop one")


def _unfed(callbacks: Sequence[Callback], declared: Sequence[Declaration], run: Run) -> Iterator[Misfit]:
    for index, (callback, consumer) in enumerate(zip(callbacks, declared, strict=True)):
        for key in consumer.required:
            message = _why_unfed(key, consumer, declared[:index], declared[index + 1 :], run)
            if message:
                yield Misfit(callback, message)
        for key in consumer.consumes:
            later = _producers(key, declared[index + 1 :]) if isinstance(key, OptionalKey) else []
            if later and not _producers(key, declared[:index]):
                label = later[0].label
                yield Misfit(callback, f"{consumer.label} consumes '{key}' where it is current: list it after {label}")


def _producers(key: str, declared: Sequence[Declaration]) -> list[Declaration]:
    return [d for d in declared if any(keys_overlap(pattern, key) for pattern in d.produces or ())]


def _why_unfed(
    key: str, consumer: Declaration, before: Sequence[Declaration], after: Sequence[Declaration], run: Run
) -> str | None:
    # A callback that does not say what it produces may produce anything: then the first firing decides.
    unsaid = any(d.produces is None for d in before)
    producers = _producers(key, before)
    if not producers:
        later = _producers(key, after)
        if later:
            return f"{consumer.label} consumes {key!r}: list it after {later[0].label}, which produces it"
        return None if unsaid else f"{consumer.label} consumes {key!r}, which nobody produces{_known(key, before)}"
    # Stored weights are memory: their producer keeps them from before training on, whatever its gate.
    if unsaid or names_weights(key) or any(covers(p.gate, consumer.gate, run) is not False for p in producers):
        return None
    return (
        f"{consumer.label} consumes {key!r} where {producers[0].label} does not produce it: "
        f"{_when(consumer)} against {_when(producers[0])}; give both the same interval"
    )


def _known(key: str, declared: Sequence[Declaration]) -> str:
    keys = [pattern for d in declared for pattern in d.produces or ()]
    return f"; produced before it: {', '.join(keys) or 'nothing'}{suggest(key, keys)}"


def _when(declaration: Declaration) -> str:
    if declaration.gate is None:
        return "every event"
    when = "|".join(map(str, declaration.gate.schedule.members))
    return f"{when} and at the end" if declaration.gate.at_end else when
