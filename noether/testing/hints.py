"""Explains errors of callbacks that come from the synthetic names and values in the runs of a law."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.errors import NoetherError, OutputError
from noether.core.event import AfterAccumulationStep, AfterUpdate
from noether.core.tensors.tree import FrozenDict
from noether.testing.functions import CallbackProxy
from noether.testing.metric_source import add_metric_source
from noether.testing.traces import drive

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.testing.traces import Trace


def explain_error(callback: Callback, trace: Trace, error: Exception) -> str | None:
    """Return which argument gives what a callback misses in a synthetic run, or None if that is not the reason.

    It drives the callback through the run again: with mappings that know which argument adds a name, and with values
    that are all finite.

    Args:
        callback: The callback.
        trace: The run in which it raised the error.
        error: The error.
    """
    if isinstance(error, KeyError):
        missing = _error_of(_ExplainingProxy(callback), trace)
        if isinstance(missing, _MissingNameError):
            return missing.text
    if isinstance(error, OutputError):
        return "name the outputs of the model: outputs={'residual': torch.zeros(4)}"
    if trace.is_finite or _error_of(callback, trace.with_finite_values()) is not None:
        return None
    return (
        "it raises only where a loss, a gradient or a metric is not finite; if that is meant, check it with "
        "traces=runs(finite=True)"
    )


def _error_of(callback: Callback | _ExplainingProxy, trace: Trace) -> Exception | None:
    """Return the error that a callback raises in a run, or None."""
    try:
        drive(add_metric_source(callback, finite=trace.finite_metrics), trace)
    except Exception as error:  # noqa: BLE001  # any error of a callback
        return error
    return None


class _MissingNameError(NoetherError, KeyError):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class _ExplainingDict(FrozenDict):
    """A mapping whose error for a missing key names the argument that adds it."""

    __slots__ = ("_place", "_right")

    def __init__(self, values: Mapping[str, Any], place: str, right: str) -> None:
        super().__init__(values)
        self._place, self._right = place, right

    def __missing__(self, key: str) -> Any:
        known = ", ".join(map(repr, self)) or "none"
        raise _MissingNameError(
            f"it reads {self._place}[{key!r}], which the runs of this law do not have (they have {known}): "
            f"give {self._right.format(key)}"
        )


_MODEL: Final = "model=, a torch.nn.Module that has it"


class _ExplainingProxy(CallbackProxy):
    """Calls a callback with mappings that know the argument that adds a name."""

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        named = state.replace(
            params=_ExplainingDict(state.params, "state.params", _MODEL),
            buffers=_ExplainingDict(state.buffers, "state.buffers", _MODEL),
        )
        after, effects = self._callback(named, _name_fields(event))
        return (state if after is named else after), effects


def _name_fields(event: Event) -> Event:
    if not isinstance(event, (AfterUpdate, AfterAccumulationStep)):
        return event
    steps = event.outputs if isinstance(event, AfterUpdate) else (event.outputs,)
    outputs = tuple(
        _ExplainingDict(each, "event.outputs", "outputs={{{0!r}: torch.zeros(4)}}") if isinstance(each, dict) else each
        for each in steps
    )
    fields = {
        "losses": _ExplainingDict(event.losses, "event.losses", "losses=({0!r},)"),
        "outputs": outputs if isinstance(event, AfterUpdate) else outputs[0],
    }
    for name in ("lr", "weight_decay"):
        if isinstance(event, AfterUpdate):
            fields[name] = _ExplainingDict(getattr(event, name), f"event.{name}", "groups=({0!r},)")
    return event.replace(**fields)
