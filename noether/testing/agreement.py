"""The law that all ranks of a distributed run make the same decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.core.effect import SaveCheckpoint
from noether.testing.counterexamples import assert_law
from noether.testing.metric_source import add_metric_source
from noether.testing.run_differences import compare_runs
from noether.testing.strategies import runs
from noether.testing.traces import DrivenRun, Trace, drive

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from noether.core.callback import Callback

    Traces = SearchStrategy[Trace] | None

_EXAMPLES: Final = 100


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
        compare_runs(callback, violation, second, first, trace)

    assert_law(law, runs() if traces is None else traces, examples=examples)


def _decisions(run: DrivenRun) -> DrivenRun:
    """Return a run with only those parts of its states and effects on which ranks have to agree."""
    states = []
    for state in run.states:
        measured = {key: metric._replace(value=0.0) for key, metric in state.metrics.items()}
        states.append(state.replace(metrics=measured, callback_states={}))
    saves = (tuple(each for each in effects if isinstance(each, SaveCheckpoint)) for effects in run.effects)
    return DrivenRun(run.events, tuple(states), tuple(saves))
