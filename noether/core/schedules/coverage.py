"""Whether one gate is open wherever another is, as far as arithmetic can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.core.schedules.schedule import At, Window

if TYPE_CHECKING:
    from noether.core.run import Run
    from noether.core.schedules.gate import Gate
    from noether.core.schedules.schedule import OneCounter


def covers(producer: Gate | None, consumer: Gate | None, run: Run) -> bool | None:
    """Return whether a value of `producer` is current wherever `consumer` is open; None if that cannot be told.

    Args:
        producer: Gate of who measures; None stands for every event.
        consumer: Gate of who reads, at or after that event; None stands for an unknown one.
        run: Where the epochs lie, as far as it is known.

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
    if producer == consumer:
        return True
    if producer.counter == "epoch" and consumer.counter != "epoch":
        return False  # measured only after the last update of the epoch was looked at
    if producer.window != Window() and (producer.window != consumer.window or _seen_apart(producer, consumer)):
        return None
    if isinstance(producer, At) or isinstance(consumer, At):
        return None
    ours, theirs = producer.threshold_after(0), consumer.threshold_after(0)
    if ours is None or theirs is None:
        return None
    if ours == 1 or (producer.counter == consumer.counter and theirs % ours == 0):
        return True
    return _unlike(producer, consumer, run)


def _unlike(producer: OneCounter, consumer: OneCounter, run: Run) -> bool | None:
    """Return the answer for thresholds of one counter that are no multiples of the other's, or of two counters."""
    ours, theirs = producer.threshold_after(0), consumer.threshold_after(0)
    assert ours is not None and theirs is not None  # noqa: S101, PT018  # multiples never end
    covered: bool | None = None
    if (producer.counter, consumer.counter) == ("update", "epoch") and hasattr(run, "updates_per_epoch"):
        covered = theirs * run.updates_per_epoch % ours == 0
    elif producer.counter == consumer.counter == "sample":
        covered = _first_sample_covered(producer, theirs, run)
    elif producer.counter == consumer.counter:
        covered = False
    # Its window may leave out what is not covered.
    return None if covered is False and consumer.window != Window() else covered


def _seen_apart(producer: OneCounter, consumer: OneCounter) -> bool:
    """Return whether a window that begins at an epoch is still shut where the producer looks, at the last update."""
    return producer.window.start.epoch > 0 and producer.counter != consumer.counter == "epoch"


def _first_sample_covered(producer: OneCounter, sample: int, run: Run) -> bool | None:
    """Return False if nothing is measured where `sample` is crossed; a batch may cross multiples of both."""
    if not all(hasattr(run, name) for name in ("updates_per_epoch", "samples_per_epoch", "effective_batch_size")):
        return None
    update = run.updates_until(sample)
    return None if producer.due(run.iteration_after(update - 1), run.iteration_after(update)) else False
