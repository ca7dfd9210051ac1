"""The law that two callbacks give the same run in either order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from noether.core.callback import label_of
from noether.core.effect import Effect, SaveCheckpoint
from noether.core.overwrites import OverwriteError
from noether.core.reducer import compose
from noether.effects.interpreter import merge_effects
from noether.testing.comparison import same
from noether.testing.counterexamples import LawError
from noether.testing.law_runs import check_runs
from noether.testing.metric_source import metric_source
from noether.testing.run_differences import compare_runs
from noether.testing.traces import DrivenRun, Trace, drive

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from hypothesis.strategies import SearchStrategy

    from noether.core.callback import Callback, Effects
    from noether.testing.models import ModelArguments

    Traces = SearchStrategy[Trace] | None

_EXAMPLES: Final = 100


def check_independent(
    a: Callback, b: Callback, *, traces: Traces = None, examples: int = _EXAMPLES, **model: Unpack[ModelArguments]
) -> None:
    """Raise unless two callbacks give the same states and effects in either order.

    Effects are compared as the interpreter merges them, so two callbacks that set one entry of the summary, log one
    key, save one tag or move one pointer depend on their order, unless they give it the same value.

    Args:
        a: One callback.
        b: The other callback.
        traces: The runs to try; None for all kinds, long enough for the schedules of the callback.
        examples: Largest number of runs to try, >= 1.
        model: What the callback sees of the model: `model=`, `losses=`, `outputs=`, `groups=`, `data=`, `forward=`; see
            `noether.testing.ModelArguments`.

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
        >>> check_independent(scaling(lambda scale: scale / 2), scaling(lambda scale: scale / 4), examples=20)
        >>> check_independent(scaling(lambda scale: scale / 2), scaling(lambda scale: scale + 1))
        Traceback (most recent call last):
        noether.testing.counterexamples.LawError: scale and scale depend on their order...
    """

    def law(trace: Trace) -> None:
        metrics = metric_source(compose(a, b), finite=trace.finite_metrics)
        orders = (compose(metrics, a, b), compose(metrics, b, a))
        try:
            expected, found = (_with_outcomes(drive(each, trace)) for each in orders)
        except OverwriteError as error:
            raise LawError(f"{label_of(a)} and {label_of(b)} depend on their order: {error}\n  in {trace}") from error
        reordered = found._replace(effects=tuple(map(_match_order, found.effects, expected.effects)))
        violation = "depend on their order: the run differs with the second one first"
        compare_runs(compose(a, b), violation, reordered, expected, trace)

    check_runs(compose(a, b), law, traces=traces, examples=examples, model=model)


@dataclass(frozen=True)
class _Checkpoints(Effect):
    """What the checkpoints that were requested at one event leave on disk.

    Args:
        saves: The last request for each tag.
        pointers: Tag of the last checkpoint that takes each pointer.
    """

    saves: Mapping[str | None, SaveCheckpoint]
    pointers: Mapping[str, str | None]


def _with_outcomes(run: DrivenRun) -> DrivenRun:
    """Return a run with the effects of each event as the interpreter would run them."""
    return run._replace(effects=tuple(map(_outcome, run.effects)))


def _outcome(effects: Effects) -> Effects:
    merged = merge_effects(effects)
    saves = [each for each in merged if isinstance(each, SaveCheckpoint)]
    if not saves:
        return merged
    last = {each.tag: replace(each, models=tuple(sorted(each.models)), pointers=(), event_saves=()) for each in saves}
    pointers = {pointer: each.tag for each in saves for pointer in each.pointers}
    return (*(each for each in merged if not isinstance(each, SaveCheckpoint)), _Checkpoints(last, pointers))


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
