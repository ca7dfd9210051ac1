"""Checks a law in many runs, and refuses a law that holds only because the callback never acted."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callback import label_of
from noether.testing.acts import count_acts, explain_inactivity, parts_of
from noether.testing.counterexamples import LawError, assert_law
from noether.testing.hints import explain_error
from noether.testing.models import TracedModel, read_datasets
from noether.testing.strategies import runs_reaching
from noether.testing.traces import Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypothesis.strategies import SearchStrategy

    from noether.core.callback import Callback
    from noether.core.schedules.base import Schedule
    from noether.testing.models import ModelArguments

_MORE_EXAMPLES: Final = 10
"""Runs to try for each part of a callback that did not act in the first ones."""
_recorded_runs: ContextVar[list[Trace] | None] = ContextVar("_recorded_runs", default=None)


def check_runs(
    callback: Callback,
    law: Callable[..., object],
    *others: SearchStrategy[Any],
    traces: SearchStrategy[Trace] | None,
    examples: int,
    model: ModelArguments,
) -> None:
    """Raise unless a law holds for many runs, and each part of a callback acts in at least one of them.

    Args:
        callback: The callback that the law is about.
        law: Called with a trace and a value from each of `others`; raises if they break it.
        others: Strategies of its further arguments.
        traces: The runs to try; None for those that the schedules of the callback need.
        examples: Largest number of runs to try, >= 1.
        model: What callbacks see of the model.

    Raises:
        LawError: If the law does not hold, if a part of the callback never acted, or if the callback raised an error
            because a name or a value in the run is synthetic.
        Exception: Another error that the callback raised.
    """
    if "data" in model:
        model = {**model, "data": read_datasets(model["data"])}  # once, because each run takes them
    TracedModel().with_arguments(**model)  # raises for wrong arguments, outside of any run
    tested = _TestedLaw(callback, law, model)
    if traces is not None:
        tested.try_runs(traces, others, examples)
    else:
        tested.try_runs(runs_reaching(*tested.schedules), others, examples)
        for part in count_acts(callback, tested.tried):
            if not part.acts and part.schedule is not None:
                tested.try_runs(runs_reaching(part.schedule), others, _MORE_EXAMPLES)
    for part in count_acts(callback, tested.tried):
        if not part.acts:
            raise LawError(
                f"{part.label} never acted in {len(tested.tried)} runs; give traces=... that reach it, such as "
                f"traces=runs(max_epochs=20): {explain_inactivity(part, tested.tried)}"
            )
    recorded = _recorded_runs.get()
    if recorded is not None:
        recorded.extend(tested.tried)


@final
@dataclass
class _TestedLaw:
    """A law of a callback, and the runs in which it was checked."""

    callback: Callback
    law: Callable[..., object]
    model: ModelArguments
    tried: list[Trace] = field(default_factory=list)  # the last one is the simplest that broke it

    @property
    def schedules(self) -> tuple[Schedule | None, ...]:
        return tuple(dict.fromkeys(part.schedule for part in parts_of(self.callback)))

    def try_runs(self, traces: SearchStrategy[Trace], others: tuple[SearchStrategy[Any], ...], examples: int) -> None:
        callbacks = [part.callback for part in parts_of(self.callback)]

        def prepare(trace: Trace) -> Trace:
            model = trace.model.with_arguments(**self.model) if self.model else trace.model
            return trace.with_model(model.fit_to(callbacks))

        try:
            assert_law(self._check, traces.map(prepare), *others, examples=examples)
        except LawError:
            raise
        except Exception as error:
            if not self.tried:
                raise
            self._explain(error, self.tried[-1])
            raise

    def _check(self, trace: Trace, *values: Any) -> None:
        self.tried.append(trace)
        self.law(trace, *values)

    def _explain(self, error: Exception, trace: Trace) -> None:
        """Raise an error that says which argument to give, if synthetic names or values are the reason of `error`."""
        hint = explain_error(self.callback, trace, error)
        if hint is None:
            error.add_note(f"in {trace}")
            return
        label = " and ".join(map(label_of, getattr(self.callback, "members", (self.callback,))))
        raise LawError(f"{label} raises {type(error).__name__}: {error}\n  {hint}\n  in {trace}") from error


@contextmanager
def record_runs() -> Iterator[list[Trace]]:
    """Collect the runs that the laws in the body of `with` try.

    Example:
        >>> from noether import AfterEpoch, LogText, on
        >>> from noether.testing import check_pure
        >>> with record_runs() as tried:
        ...     check_pure(on(AfterEpoch)(lambda state, event: (state, (LogText("epoch"),))), examples=5)
        >>> 0 < len(tried) <= 5
        True
    """
    traces = list[Trace]()
    token = _recorded_runs.set(traces)
    try:
        yield traces
    finally:
        _recorded_runs.reset(token)
