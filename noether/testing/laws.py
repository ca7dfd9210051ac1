"""The laws of callbacks, one call each; what breaks one is shown in the simplest run in which it does."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from noether.core.callback import label_of
from noether.core.effect import SaveCheckpoint
from noether.core.event import AfterAccumulationStep
from noether.core.reducer import compose, identity
from noether.effects.checkpoints.store import CheckpointStore
from noether.effects.disk.calls import Disk, fsync
from noether.testing.comparison import differences, same
from noether.testing.counterexamples import LawError, assert_law
from noether.testing.metric_source import add_metric_source, metric_source
from noether.testing.strategies import cuts, runs
from noether.testing.traces import DrivenRun, Trace, drive

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.state import TrainState

    Traces = SearchStrategy[Trace] | None

_EXAMPLES: Final = 100
_UNFLUSHED: Final = Disk(lambda function, *arguments: None if function is fsync else function(*arguments))


def check_resumable(callback: Callback, *, traces: Traces = None, examples: int = _EXAMPLES) -> None:
    """Return if a run that is cut anywhere, saved, read back and continued equals the run that is not cut.

    The state goes through the store that checkpoints go through, up to three times in a run. Metrics that the callback
    consumes and does not produce are measured for it, NaN and infinities among them.

    Args:
        callback: Any callback; what consumes something else than metrics, such as averaged weights, is composed with
            who produces it.
        traces: The runs to try; None for all kinds, `runs(finite=True)` where a callback refuses NaN.
        examples: How many runs to try, >= 1.

    Raises:
        LawError: With the simplest run that goes on otherwise, and the first difference.

    Example:
        >>> from noether import LogText, every_n_updates
        >>> seen = []
        >>> @every_n_updates(1)
        ... def forgetful(state, event):
        ...     seen.append(event)
        ...     return state, (LogText(f"update {len(seen)}"),)
        >>> check_resumable(forgetful)
        Traceback (most recent call last):
        noether.testing.counterexamples.LawError: forgetful does not go on after a resume as it would have...
    """
    complete = add_metric_source(callback)

    def law(trace: Trace, places: tuple[int, ...]) -> None:
        uncut = drive(copy.deepcopy(complete), trace)
        between = [i for i, event in enumerate(uncut.events) if not isinstance(event, AfterAccumulationStep)]
        # What the callback holds on to outside of the state is as lost as in a new process.
        states, done = uncut.states, 0
        for cut in (between[place] for place in places if place < len(between)):
            state = _stored(callback, states[cut - done], uncut.events[cut])
            resumed = drive(copy.deepcopy(complete), trace, state, resumed=True)
            what = f"does not go on after a resume as it would have without one: cut after {_at(uncut, cut)}"
            _compare(callback, what, resumed.since(1), uncut.since(cut + 1), trace)
            states, done = resumed.states, cut

    assert_law(law, _uninterrupted(traces), cuts(), examples=examples)


def check_composition(
    a: Callback, b: Callback, c: Callback, *, traces: Traces = None, examples: int = _EXAMPLES
) -> None:
    """Return if it does not matter how three callbacks are bracketed, and `identity` changes nothing.

    For callbacks, `compose` makes that true; it breaks where one depends on how often or from where it is called.

    Args:
        a: Called first.
        b: Called next.
        c: Called last.
        traces: The runs to try; None for all kinds.
        examples: How many runs to try, >= 1.

    Raises:
        LawError: With the simplest run in which two bracketings differ, and the first difference.

    Example:
        >>> from noether import log, on
        >>> from noether.core.event import AfterEpoch
        >>> def logging(key):
        ...     return on(AfterEpoch)(lambda state, event: log(state, event, {key: len(state.metrics)}))
        >>> check_composition(logging("a"), logging("b"), logging("c"), examples=20)
    """
    metrics = metric_source(compose(a, b, c))
    bracketings = {
        "compose(compose(a, b), c)": compose(metrics, compose(compose(a, b), c)),
        "compose(a, compose(b, c))": compose(metrics, compose(a, compose(b, c))),
        "compose(identity, a, b, c, identity)": compose(metrics, identity, a, b, c, identity),
    }
    plain = compose(metrics, a, b, c)

    def law(trace: Trace) -> None:
        expected = drive(plain, trace)
        for text, bracketed in bracketings.items():
            what = f"composed as {text} do something else than as compose(a, b, c)"
            _compare(compose(a, b, c), what, drive(bracketed, trace), expected, trace)

    assert_law(law, runs() if traces is None else traces, examples=examples)


def check_independent(a: Callback, b: Callback, *, traces: Traces = None, examples: int = _EXAMPLES) -> None:
    """Return if it does not matter in which order two callbacks are listed.

    Args:
        a: One.
        b: The other.
        traces: The runs to try; None for all kinds.
        examples: How many runs to try, >= 1.

    Raises:
        LawError: With the simplest run in which the order matters, and the first difference.

    Example:
        >>> from noether import on
        >>> from noether.core.event import AfterEpoch
        >>> def scaling(change):
        ...     @on(AfterEpoch)
        ...     def scale(state, event):
        ...         lr_scale = change(state.hyperparams["lr_scale"])
        ...         return state.replace(hyperparams=state.hyperparams | {"lr_scale": lr_scale}), ()
        ...     return scale
        >>> check_independent(scaling(lambda scale: scale / 2), scaling(lambda scale: scale / 4))
        >>> check_independent(scaling(lambda scale: scale / 2), scaling(lambda scale: scale + 1))
        Traceback (most recent call last):
        noether.testing.counterexamples.LawError: scale and scale depend on their order...
    """
    metrics = metric_source(compose(a, b))
    one, other = compose(metrics, a, b), compose(metrics, b, a)

    def law(trace: Trace) -> None:
        expected, found = drive(one, trace), drive(other, trace)
        alike = tuple(map(_in_order_of, found.effects, expected.effects))
        what = "depend on their order: with the second one first"
        _compare(compose(a, b), what, found._replace(effects=alike), expected, trace)

    assert_law(law, runs() if traces is None else traces, examples=examples)


def check_rank_agreement(callback: Callback, *, traces: Traces = None, examples: int = _EXAMPLES) -> None:
    """Return if every process of a distributed run decides the same.

    What differs between them is what each measures by itself: the losses and outputs of its own accumulation steps, and
    durations. What a callback decides is where it stops, what it sets (params, buffers, hyperparams), which metrics it
    has measured where, and which checkpoints it asks for; processes that disagree on that wait for each other forever,
    or train different models.

    Args:
        callback: Any callback.
        traces: The runs to try; None for all kinds.
        examples: How many runs to try, >= 1.

    Raises:
        LawError: With the simplest run in which two processes disagree, and the first difference.

    Example:
        >>> from noether import AfterUpdate, on
        >>> @on(AfterUpdate)
        ... def impatient(state, event):
        ...     return (state.request_stop("slow") if event.duration_s > 1 else state), ()
        >>> check_rank_agreement(impatient)
        Traceback (most recent call last):
        noether.testing.counterexamples.LawError: impatient does not decide the same on every rank...
    """
    complete = add_metric_source(callback)

    def law(trace: Trace) -> None:
        ranks = [drive(complete, trace.on_rank(rank)) for rank in (0, 1)]
        first, second = (
            DrivenRun(each.events, tuple(map(_decided, each.states)), tuple(map(_saves, each.effects)))
            for each in ranks
        )
        _compare(callback, "does not decide the same on every rank: on rank 1", second, first, trace)

    assert_law(law, runs() if traces is None else traces, examples=examples)


def _uninterrupted(traces: Traces) -> SearchStrategy[Trace]:
    return runs(interrupted=False) if traces is None else traces.map(lambda trace: trace.without_interruptions())


def _stored(callback: Callback, state: TrainState, event: Event) -> TrainState:
    """Return a state as it is read back from a checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        store = CheckpointStore(Path(directory), "law", _UNFLUSHED)
        try:
            store.save(SaveCheckpoint(tag="cut"), state, event)
        except TypeError as error:
            raise LawError(f"{label_of(callback)} leaves a state that cannot be saved: {error}") from error
        loaded = store.load(store.find("cut"))
    for path, found, expected in differences(loaded, state):
        raise LawError(f"{label_of(callback)}: state{path} is read back as {found}, and was {expected}")
    return loaded


def _compare(callback: Callback, what: str, found: DrivenRun, expected: DrivenRun, trace: Trace) -> None:
    """Raise at the first event at which two runs differ."""
    who = " and ".join(map(label_of, getattr(callback, "members", (callback,))))
    for number, steps in enumerate(zip(found.events, expected.events, strict=False)):
        if type(steps[0]) is not type(steps[1]):
            raise LawError(_told(who, what, f"the run goes on otherwise than at {_at(expected, number)}", trace))
        parts = (("state", found.states, expected.states), ("effects", found.effects, expected.effects))
        for name, ours, theirs in parts:
            for path, one, other in differences(ours[number], theirs[number]):
                raise LawError(
                    _told(who, what, f"at {_at(expected, number)}, {name}{path} is {one}, not {other}", trace)
                )
    if len(found.events) != len(expected.events):
        raise LawError(_told(who, what, f"it has {len(found.events)} events, not {len(expected.events)}", trace))


def _told(who: str, what: str, where: str, trace: Trace) -> str:
    return f"{who} {what}, {where}\n  in {trace}"


def _at(driven: DrivenRun, number: int) -> str:
    return f"{type(driven.events[number]).__name__} {driven.states[number].iteration}"


def _in_order_of(effects: Effects, others: Effects) -> Effects:
    """Return effects in the order in which others ask for the same, as far as they do."""
    left = list(effects)
    ordered: list[Effect] = []
    for other in others:
        match = next((each for each in left if same(each, other)), None)
        if match is not None:
            left = [each for each in left if each is not match]
            ordered.append(match)
    return (*ordered, *left)


def _decided(state: TrainState) -> TrainState:
    """Return the state with nothing in it but what processes have to agree on."""
    measured = {key: metric._replace(value=0.0) for key, metric in state.metrics.items()}
    return state.replace(metrics=measured, callback_states={})


def _saves(effects: Effects) -> Effects:
    return tuple(effect for effect in effects if isinstance(effect, SaveCheckpoint))
