"""The laws of callbacks, one call each; an error shows the simplest run that breaks the law."""

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
    """Raise unless a run that is cut anywhere, saved, loaded and resumed equals the uncut run.

    The checkpoint store saves and loads the state at up to three cuts of a run. A source provides the metrics that the
    callback consumes and does not produce, NaN and infinities among them.

    Args:
        callback: Any callback. If it consumes anything but metrics, such as averaged weights, compose it with the
            callback that produces them.
        traces: The runs to try; None for all kinds, `runs(finite=True)` for a callback that refuses NaN.
        examples: Largest number of runs to try, >= 1.

    Raises:
        LawError: With the simplest run that differs after a resume, and the first difference.

    Example:
        >>> from noether import LogText, every_n_updates
        >>> seen = []
        >>> @every_n_updates(1)
        ... def forgetful(state, event):
        ...     seen.append(event)
        ...     return state, (LogText(f"update {len(seen)}"),)
        >>> check_resumable(forgetful)
        Traceback (most recent call last):
        noether.testing.counterexamples.LawError: forgetful does not resume exactly...
    """
    complete = add_metric_source(callback)
    uninterrupted = runs(interrupted=False) if traces is None else traces.map(Trace.without_interruptions)

    def law(trace: Trace, places: tuple[int, ...]) -> None:
        # Each part of the run has a fresh copy of the callback, so that memory outside of the state is lost at a cut.
        uncut = drive(copy.deepcopy(complete), trace)
        cuttable = [i for i, event in enumerate(uncut.events) if not isinstance(event, AfterAccumulationStep)]
        states, start = uncut.states, 0  # after the first cut, those of the resumed run, which starts at that cut
        for cut in (cuttable[place] for place in places if place < len(cuttable)):
            state = _save_and_load(callback, states[cut - start], uncut.events[cut])
            resumed = drive(copy.deepcopy(complete), trace, state, resumed=True)
            violation = (
                f"does not resume exactly; keep all memory in the state, with state.remember(...): cut after "
                f"{_event_text(uncut, cut)}, the resumed run differs from the uncut one"
            )
            _compare_runs(callback, violation, resumed.since(1), uncut.since(cut + 1), trace)
            states, start = resumed.states, cut

    assert_law(law, uninterrupted, cuts(), examples=examples)


def check_composition(
    a: Callback, b: Callback, c: Callback, *, traces: Traces = None, examples: int = _EXAMPLES
) -> None:
    """Raise unless composition is associative for three callbacks and `identity` is neutral.

    `compose` guarantees it for pure callbacks; a callback that depends on how often it is called, or on its caller,
    breaks it.

    Args:
        a: The first callback.
        b: The second callback.
        c: The third callback.
        traces: The runs to try; None for all kinds.
        examples: Largest number of runs to try, >= 1.

    Raises:
        LawError: With the simplest run in which two groupings differ, and the first difference.

    Example:
        >>> from noether import log, on
        >>> from noether.core.event import AfterEpoch
        >>> def logging(key):
        ...     return on(AfterEpoch)(lambda state, event: log(state, event, {key: len(state.metrics)}))
        >>> check_composition(logging("a"), logging("b"), logging("c"), examples=20)
    """
    metrics = metric_source(compose(a, b, c))
    groupings = {
        "compose(compose(a, b), c)": compose(metrics, compose(compose(a, b), c)),
        "compose(a, compose(b, c))": compose(metrics, compose(a, compose(b, c))),
        "compose(identity, a, b, c, identity)": compose(metrics, identity, a, b, c, identity),
    }
    flat = compose(metrics, a, b, c)

    def law(trace: Trace) -> None:
        expected = drive(flat, trace)
        for text, grouped in groupings.items():
            violation = f"behave differently as {text} than as compose(a, b, c)"
            _compare_runs(compose(a, b, c), violation, drive(grouped, trace), expected, trace)

    assert_law(law, runs() if traces is None else traces, examples=examples)


def check_independent(a: Callback, b: Callback, *, traces: Traces = None, examples: int = _EXAMPLES) -> None:
    """Raise unless two callbacks give the same states and effects in either order.

    Args:
        a: One callback.
        b: The other callback.
        traces: The runs to try; None for all kinds.
        examples: Largest number of runs to try, >= 1.

    Raises:
        LawError: With the simplest run in which their order matters, and the first difference.

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
    listed, swapped = compose(metrics, a, b), compose(metrics, b, a)

    def law(trace: Trace) -> None:
        expected, found = drive(listed, trace), drive(swapped, trace)
        reordered = found._replace(effects=tuple(map(_match_order, found.effects, expected.effects)))
        violation = "depend on their order: the run differs with the second one first"
        _compare_runs(compose(a, b), violation, reordered, expected, trace)

    assert_law(law, runs() if traces is None else traces, examples=examples)


def check_rank_agreement(callback: Callback, *, traces: Traces = None, examples: int = _EXAMPLES) -> None:
    """Raise unless every rank of a distributed run makes the same decisions.

    The ranks differ in their durations and in the losses and outputs of their accumulation steps. Decisions of a
    callback are: where it stops, the params, buffers and hyperparams that it sets, which metrics it measured at which
    iteration, and which checkpoints it requests. Ranks that disagree on one wait for each other forever, or train
    different models.

    Args:
        callback: Any callback.
        traces: The runs to try; None for all kinds.
        examples: Largest number of runs to try, >= 1.

    Raises:
        LawError: With the simplest run in which two ranks disagree, and the first difference.

    Example:
        >>> from noether import AfterUpdate, on
        >>> @on(AfterUpdate)
        ... def impatient(state, event):
        ...     return (state.request_stop("slow") if event.duration_s > 1 else state), ()
        >>> check_rank_agreement(impatient)
        Traceback (most recent call last):
        noether.testing.counterexamples.LawError: impatient makes different decisions on different ranks...
    """
    complete = add_metric_source(callback)
    violation = "makes different decisions on different ranks; decide from values that all ranks share: rank 1 differs"

    def law(trace: Trace) -> None:
        first, second = (_decisions(drive(complete, trace.on_rank(rank))) for rank in (0, 1))
        _compare_runs(callback, violation, second, first, trace)

    assert_law(law, runs() if traces is None else traces, examples=examples)


def _decisions(run: DrivenRun) -> DrivenRun:
    """Return a run with only those parts of its states and effects on which ranks have to agree."""
    states = []
    for state in run.states:
        measured = {key: metric._replace(value=0.0) for key, metric in state.metrics.items()}
        states.append(state.replace(metrics=measured, callback_states={}))
    saves = (tuple(each for each in effects if isinstance(each, SaveCheckpoint)) for effects in run.effects)
    return DrivenRun(run.events, tuple(states), tuple(saves))


def _save_and_load(callback: Callback, state: TrainState, event: Event) -> TrainState:
    """Return a state as the checkpoint store loads it back."""
    with tempfile.TemporaryDirectory() as directory:
        store = CheckpointStore(Path(directory), "law", _UNFLUSHED)
        try:
            store.save(SaveCheckpoint(tag="cut"), state, event)
        except TypeError as error:
            raise LawError(f"{label_of(callback)} leaves a state that cannot be saved: {error}") from error
        loaded = store.load(store.find("cut"))
    difference = next(differences(loaded, state), None)
    if difference is not None:
        path, found, expected = difference
        raise LawError(f"{label_of(callback)}: state{path} was saved as {expected}, but loads as {found}")
    return loaded


def _compare_runs(callback: Callback, violation: str, found: DrivenRun, expected: DrivenRun, trace: Trace) -> None:
    """Raise a LawError with the first difference between two runs, if there is one."""
    difference = _first_difference(found, expected)
    if difference is not None:
        labels = " and ".join(map(label_of, getattr(callback, "members", (callback,))))
        raise LawError(f"{labels} {violation}\n  {difference}\n  in {trace}")


def _first_difference(found: DrivenRun, expected: DrivenRun) -> str | None:
    """Return the first event at which two runs differ, with the found and the expected value, or None."""
    for number in range(min(len(found.events), len(expected.events))):
        place = _event_text(expected, number)
        if type(found.events[number]) is not type(expected.events[number]):
            return f"at {place}: the event is {_event_text(found, number)}"
        for name, ours, theirs in (
            ("state", found.states[number], expected.states[number]),
            ("effects", found.effects[number], expected.effects[number]),
        ):
            for path, one, other in differences(ours, theirs):
                return f"at {place}: {name}{path} is {one}, expected {other}"
    if len(found.events) != len(expected.events):
        return f"the run has {len(found.events)} events, expected {len(expected.events)}"
    return None


def _event_text(driven: DrivenRun, number: int) -> str:
    return f"{type(driven.events[number]).__name__} {driven.states[number].iteration}"


def _match_order(effects: Effects, others: Effects) -> Effects:
    """Return `effects` in the order of the equal effects in `others`; effects without an equal come last."""
    unmatched = list(effects)
    ordered: list[Effect] = []
    for other in others:
        match = next((each for each in unmatched if same(each, other)), None)
        if match is not None:
            unmatched = [each for each in unmatched if each is not match]
            ordered.append(match)
    return (*ordered, *unmatched)
