"""The laws of callbacks, one call each; an error shows the simplest run that breaks the law."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from noether.core.callback import label_of
from noether.core.effect import SaveCheckpoint
from noether.core.event import AfterAccumulationStep, AtEval
from noether.core.reducer import compose, identity
from noether.effects.checkpoints.store import CheckpointStore
from noether.effects.disk.calls import Disk, fsync
from noether.testing.comparison import differences
from noether.testing.counterexamples import LawError
from noether.testing.functions import copy_callback
from noether.testing.law_runs import check_runs
from noether.testing.metric_source import add_metric_source, metric_source
from noether.testing.run_differences import compare_runs, event_text
from noether.testing.strategies import cuts
from noether.testing.traces import drive

if TYPE_CHECKING:
    from typing import Unpack

    from hypothesis.strategies import SearchStrategy

    from noether.core.callback import Callback
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.testing.models import ModelArguments
    from noether.testing.traces import Trace

    Traces = SearchStrategy[Trace] | None

_EXAMPLES: Final = 100
_UNSAVED_EVENTS: Final = (AfterAccumulationStep, AtEval)
"""Events after which no loop saves a state to resume from."""
_DISK_WITHOUT_FLUSH: Final = Disk(lambda function, *arguments: None if function is fsync else function(*arguments))


def check_resumable(
    callback: Callback, *, traces: Traces = None, examples: int = _EXAMPLES, **model: Unpack[ModelArguments]
) -> None:
    """Raise unless a run that is cut anywhere, saved, loaded and resumed equals the uncut run.

    The checkpoint store saves and loads the state at up to three cuts of a run. A source provides the metrics that the
    callback consumes and does not produce, NaN and infinities among them.

    Args:
        callback: Any callback. If it consumes anything but metrics, such as averaged weights, compose it with the
            callback that produces them.
        traces: The runs to try; None for all kinds, long enough for the schedules of the callback;
            `runs(finite=True)` for a callback that refuses NaN.
        examples: Largest number of runs to try, >= 1.
        model: What the callback sees of the model: `model=`, `losses=`, `outputs=`, `groups=`, `data=`, `forward=`; see
            `noether.testing.ModelArguments`.

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

    def law(trace: Trace, places: tuple[int, ...]) -> None:
        complete = add_metric_source(callback, finite=trace.finite_metrics)
        trace = trace.without_interruptions()  # of which these cuts are the stronger form
        # Each part of the run has a fresh copy of the callback, so that memory outside of the state is lost at a cut.
        uncut = drive(copy_callback(complete), trace)
        cuttable = [i for i, event in enumerate(uncut.events) if not isinstance(event, _UNSAVED_EVENTS)]
        states, start = uncut.states, 0  # after the first cut, those of the resumed run, which starts at that cut
        for cut in (cuttable[place] for place in places if place < len(cuttable)):
            state = _save_and_load(callback, states[cut - start], uncut.events[cut])
            resumed = drive(copy_callback(complete), trace, state, resumed=True)
            violation = (
                f"does not resume exactly; keep all memory in the state, with state.remember(...): cut after "
                f"{event_text(uncut, cut)}, the resumed run differs from the uncut one"
            )
            compare_runs(callback, violation, resumed.since(1), uncut.since(cut + 1), trace)
            states, start = resumed.states, cut

    check_runs(callback, law, cuts(), traces=traces, examples=examples, model=model)


def check_composition(
    a: Callback,
    b: Callback,
    c: Callback,
    *,
    traces: Traces = None,
    examples: int = _EXAMPLES,
    **model: Unpack[ModelArguments],
) -> None:
    """Raise unless composition is associative for three callbacks and `identity` is neutral.

    `compose` guarantees it for pure callbacks; a callback that depends on how often it is called, or on its caller,
    breaks it.

    Args:
        a: The first callback.
        b: The second callback.
        c: The third callback.
        traces: The runs to try; None for all kinds, long enough for the schedules of the callback.
        examples: Largest number of runs to try, >= 1.
        model: What the callback sees of the model: `model=`, `losses=`, `outputs=`, `groups=`, `data=`, `forward=`; see
            `noether.testing.ModelArguments`.

    Raises:
        LawError: With the simplest run in which two groupings differ, and the first difference.

    Example:
        >>> from noether import log, on
        >>> from noether.core.event import AfterEpoch
        >>> def logging(key):
        ...     return on(AfterEpoch)(lambda state, event: log(state, event, {key: len(state.metrics)}))
        >>> check_composition(logging("a"), logging("b"), logging("c"), examples=20)
    """
    flat = compose(a, b, c)
    groupings = {
        "compose(compose(a, b), c)": compose(compose(a, b), c),
        "compose(a, compose(b, c))": compose(a, compose(b, c)),
        "compose(identity, a, b, c, identity)": compose(identity, a, b, c, identity),
    }

    def law(trace: Trace) -> None:
        metrics = metric_source(flat, finite=trace.finite_metrics)
        expected = drive(compose(metrics, flat), trace)
        for text, grouped in groupings.items():
            violation = f"behave differently as {text} than as compose(a, b, c)"
            compare_runs(flat, violation, drive(compose(metrics, grouped), trace), expected, trace)

    check_runs(flat, law, traces=traces, examples=examples, model=model)


def _save_and_load(callback: Callback, state: TrainState, event: Event) -> TrainState:
    """Return a state as the checkpoint store loads it back."""
    with tempfile.TemporaryDirectory() as directory:
        store = CheckpointStore(Path(directory), "law", _DISK_WITHOUT_FLUSH)
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
