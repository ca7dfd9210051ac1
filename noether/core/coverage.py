"""Whether one gate is open wherever another is, as far as arithmetic can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.core.schedule import At, Window

if TYPE_CHECKING:
    from noether.core.gate import Gate
    from noether.core.run import Run
    from noether.core.schedule import OneCounter


def covers(producer: Gate | None, consumer: Gate | None, run: Run) -> bool | None:
    """Return whether a value of `producer` is current wherever `consumer` is open; None if that cannot be told.

    Args:
        producer: Gate of who measures; None stands for every event.
        consumer: Gate of who reads, at or after that event; None stands for an unknown one.
        run: Where the epochs lie, as far as it is known.

    Example:
        >>> from noether.core.gate import Gate
        >>> from noether.core.run import Run
        >>> from noether.core.schedule import EveryNEpochs
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
    answers = [_covered(member, producer.schedule.members, run) for member in consumer.schedule.members]
    if False in answers:
        return False
    return None if None in answers else True


def _covered(consumer: OneCounter, producers: tuple[OneCounter, ...], run: Run) -> bool | None:
    answers = [_one_covers(producer, consumer, run) for producer in producers]
    if True in answers:
        return True
    # Two that each cover a part may cover the whole together: with several, only a yes is certain.
    return False if answers == [False] else None


def _one_covers(producer: OneCounter, consumer: OneCounter, run: Run) -> bool | None:
    if producer.window not in (Window(), consumer.window):
        return None
    if isinstance(producer, At) or isinstance(consumer, At):
        return True if producer == consumer else None
    ours, theirs = producer.threshold_after(0), consumer.threshold_after(0)
    if ours is None or theirs is None:
        return None
    if producer.counter == consumer.counter:
        return theirs % ours == 0
    if producer.counter == "epoch":  # measured only after the last update of the epoch was looked at
        return False
    if consumer.counter == "epoch" and producer.counter == "update" and hasattr(run, "updates_per_epoch"):
        return theirs * run.updates_per_epoch % ours == 0
    return True if ours == 1 else None
