"""Checks that callbacks fit together: a producer of each consumed metric comes first, and is due with the consumer."""

from __future__ import annotations

from collections import Counter as Multiset
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from noether.core.callback import (
    Callback,
    Declaration,
    OptionalKey,
    SkippableKey,
    declaration_of,
    memory_names,
    parts_of,
)
from noether.core.errors import NoetherError, suggest
from noether.core.metric_keys import keys_overlap
from noether.core.schedules.window import ALWAYS
from noether.core.tensors.stored_weights import names_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.core.run import Run
    from noether.core.schedules.base import OneCounter
    from noether.core.schedules.gate import Gate
    from noether.core.state import TrainState


@dataclass(frozen=True)
class Misfit:
    """Why one callback does not fit the others."""

    callback: Callback
    message: str


class DeclarationError(NoetherError, ValueError):
    """Callbacks do not fit together; `misfits` lists every reason."""

    def __init__(self, misfits: Sequence[Misfit]) -> None:
        self.misfits = tuple(misfits)
        super().__init__("\n".join(misfit.message for misfit in self.misfits))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.misfits,), vars(self)


def check_declarations(callbacks: Sequence[Callback], state: TrainState, run: Run) -> None:
    """Raise an error if callbacks do not fit together.

    Args:
        callbacks: In the order in which they are called.
        state: The state that their memory is initialized from.
        run: The run; its sizes of epochs and batches are used if they are known.

    Raises:
        DeclarationError: If two callbacks have a memory of the same name or produce the same key; or if no callback
            before a consumer produces its key, or the key is not current when the consumer is due.
    """
    # Those inside of a decorated reducer are checked one by one; a misfit names the callback that the caller passed.
    parts = [(callback, part) for callback in callbacks for part in parts_of(callback)]
    owners, declared = [callback for callback, _ in parts], [declaration_of(part) for _, part in parts]
    misfits = [
        *_duplicate_names(callbacks, state),
        *_duplicate_keys(owners, declared),
        *_missing_metrics(owners, declared, run),
    ]
    if misfits:
        raise DeclarationError(misfits)


def _duplicate_names(callbacks: Sequence[Callback], state: TrainState) -> Iterator[Misfit]:
    names = [(name, callback) for callback in callbacks for name in memory_names(callback, state)]
    counted = Multiset(name for name, _ in names)
    for name in (name for name, times in counted.items() if times > 1):
        last = [callback for other, callback in names if other == name][-1]
        yield Misfit(
            last,
            f"{counted[name]} callbacks have a memory named {name!r}; give this one another id or name",
        )


def _duplicate_keys(callbacks: Sequence[Callback], declared: Sequence[Declaration]) -> Iterator[Misfit]:
    for (_, first), (callback, second) in combinations(zip(callbacks, declared, strict=True), 2):
        for key in second.produces or ():
            if any(keys_overlap(key, other) for other in first.produces or ()):
                other = ", or watch another metric_key" if hasattr(callback, "metric_key") else ""
                yield Misfit(callback, f"{second.label} and {first.label} both produce {key!r}; remove one{other}")


def _missing_metrics(callbacks: Sequence[Callback], declared: Sequence[Declaration], run: Run) -> Iterator[Misfit]:
    for index, (callback, consumer) in enumerate(zip(callbacks, declared, strict=True)):
        for key in consumer.required:
            message = _missing_text(key, consumer, declared[:index], declared[index + 1 :])
            if message:
                yield Misfit(callback, message)
                continue
            message = _stale_text(key, consumer, declared[:index], run)
            if message:
                hint = ", or set missing: skip" if getattr(callback, "missing", None) == "raise" else ""
                yield Misfit(callback, message + hint)
        for key in consumer.consumes:
            later = _producers(key, declared[index + 1 :]) if isinstance(key, OptionalKey) else []
            if later and not _producers(key, declared[:index]):
                label = later[0].label
                message = f"{consumer.label} reads '{key}', which {label} logs later at the same event"
                yield Misfit(callback, f"{message}: list it after {label}")


def _producers(key: str, declared: Sequence[Declaration]) -> list[Declaration]:
    return [d for d in declared if any(keys_overlap(pattern, key) for pattern in d.produces or ())]


def _missing_text(
    key: str, consumer: Declaration, before: Sequence[Declaration], after: Sequence[Declaration]
) -> str | None:
    """Return why no callback before the consumer can produce `key`, or None if one can."""
    if _producers(key, before):
        return None
    later = _producers(key, after)
    if later:
        return f"{consumer.label} consumes '{key}': list it after {later[0].label}, which produces it"
    if _may_log_any_key(before):
        return None
    produced = [pattern for d in before for pattern in d.produces or ()]
    known = f"produced before it: {', '.join(produced) or 'nothing'}{suggest(key, produced)}"
    return f"{consumer.label} consumes '{key}', which no callback produces; {known}"


def _stale_text(key: str, consumer: Declaration, before: Sequence[Declaration], run: Run) -> str | None:
    """Return why `key` is not current when its consumer is due, or None if it is, or if arithmetic cannot decide it."""
    producers = _producers(key, before)
    # Stored weights are memory: they are always current, whatever the gate of their producer.
    if isinstance(key, SkippableKey) or not producers or names_weights(key) or _may_log_any_key(before):
        return None
    if any(covers(p.gate, consumer.gate, run) is not False for p in producers):
        return None
    return (
        f"{consumer.label} consumes '{key}' where {producers[0].label} does not produce it: "
        f"{_gate_text(consumer.gate)} against {_gate_text(producers[0].gate)}; give both the same interval"
    )


def _may_log_any_key(declared: Sequence[Declaration]) -> bool:
    """Return whether one declares no `produces`: only a firing then shows whether a metric is current."""
    return any(d.produces is None for d in declared)


def _gate_text(gate: Gate | None) -> str:
    if gate is None:
        return "every event"
    schedule = "|".join(map(str, gate.schedule.members))
    return f"{schedule} and at the end" if gate.at_end else schedule


def covers(producer: Gate | None, consumer: Gate | None, run: Run) -> bool | None:
    """Return whether a value of `producer` is current whenever `consumer` opens; None if arithmetic cannot decide it.

    Args:
        producer: Gate of the callback that measures; None if it measures at every event.
        consumer: Gate of the callback that reads the value; None if unknown.
        run: The run; its sizes of epochs and batches are used if they are known.

    Example:
        >>> from noether.core.schedules.gate import Gate
        >>> from noether.core.run import Run
        >>> from noether.core.schedules.schedule import EveryNEpochs
        >>> covers(Gate(EveryNEpochs(1)), Gate(EveryNEpochs(2)), Run())
        True
        >>> covers(Gate(EveryNEpochs(2)), Gate(EveryNEpochs(1)), Run())
        False
    """
    if producer is None:
        return True
    if consumer is None:
        return None
    if consumer.at_end and not producer.at_end:
        return False
    answers = [_is_covered(member, producer.schedule.members, run) for member in consumer.schedule.members]
    if False in answers:
        return False
    return None if None in answers else True


def _is_covered(consumer: OneCounter, producers: tuple[OneCounter, ...], run: Run) -> bool | None:
    answers = [_one_covers(producer, consumer, run) for producer in producers]
    if True in answers:
        return True
    # Several producers may cover the consumer together, so with several only True is certain.
    return False if answers == [False] else None


def _one_covers(producer: OneCounter, consumer: OneCounter, run: Run) -> bool | None:
    if producer == consumer:
        return True
    if producer.counter == "epoch" and consumer.counter != "epoch":
        return False  # it measures after the consumer has read at the last update of the epoch
    if producer.window != ALWAYS and (producer.window != consumer.window or _opens_too_late(producer, consumer)):
        return None
    producer_n, consumer_n = producer.interval, consumer.interval
    if producer_n is None or consumer_n is None:  # single points
        return None
    if producer_n == 1 or (producer.counter == consumer.counter and consumer_n % producer_n == 0):
        return True
    covered: bool | None = None
    if (producer.counter, consumer.counter) == ("update", "epoch") and hasattr(run, "updates_per_epoch"):
        covered = consumer_n * run.updates_per_epoch % producer_n == 0
    elif producer.counter == consumer.counter == "sample":
        covered = _covers_first_sample(producer, consumer_n, run)
    elif producer.counter == consumer.counter:
        covered = False
    # The consumer's window may exclude the uncovered events.
    return None if covered is False and consumer.window != ALWAYS else covered


def _opens_too_late(producer: OneCounter, consumer: OneCounter) -> bool:
    """Return whether the producer's window, which starts at an epoch, is still closed at the epoch's last update."""
    return producer.window.start.epoch > 0 and producer.counter != consumer.counter == "epoch"


def _covers_first_sample(producer: OneCounter, sample: int, run: Run) -> bool | None:
    """Return False if the producer is not due at the update that crosses `sample`, else None."""
    if not all(hasattr(run, name) for name in ("updates_per_epoch", "samples_per_epoch", "effective_batch_size")):
        return None
    update = run.updates_until(sample)
    return None if producer.due(run.iteration_after(update - 1), run.iteration_after(update)) else False
