"""The positions of learning-rate schedulers of torch, as a memory in the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.tensors.live.weights import raise_mismatch
from noether.core.tensors.tree import FrozenDict, freeze, pack, unpack
from noether.session.errors import SessionError
from noether.session.live_memory import LiveMemory

if TYPE_CHECKING:
    from noether.core.state import TrainState

MEMORY: Final = "lr_scheduler"
_ITEMS: Final = "__items__"


@final
class SchedulerMemory(LiveMemory):
    """A member of a reducer that keeps the position of a live scheduler in the state, so that a checkpoint holds it.

    Args:
        scheduler: The scheduler, of torch or with a `state_dict` as torch's, or several by name. Step it before an
            update is reported.
        defers_updates: As for `LiveMemory`.

    Raises:
        TypeError: If its `state_dict` contains something that no checkpoint can hold.

    Example:
        >>> import torch
        >>> from noether import TrainState
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.MultiStepLR(sgd, milestones=[30, 80])
        >>> memory = SchedulerMemory(scheduler).init(TrainState())["lr_scheduler"]
        >>> memory["last_epoch"], memory["milestones"]
        (0, FrozenDict({'__items__': ((30, 1), (80, 1))}))
    """

    def __init__(self, scheduler: Any, *, defers_updates: bool = False) -> None:
        self._scheduler = NamedSchedulers(scheduler) if isinstance(scheduler, Mapping) else scheduler
        super().__init__(MEMORY, defers_updates=defers_updates)

    def restore(self, state: TrainState) -> None:
        """Write the position that a state remembers into the scheduler."""
        if MEMORY in state.callback_states:
            self._scheduler.load_state_dict(self.state_dict(state))

    def is_current(self) -> bool:
        """Return whether the scheduler was not stepped since its position was noted."""
        scheduler, memory = self._scheduler, self._noted
        if isinstance(scheduler, NamedSchedulers):
            return all(_is_at(each, memory.get(name, {})) for name, each in scheduler.members.items())
        return _is_at(scheduler, memory)

    def check_groups(self) -> None:
        """Refuse a scheduler that has not one function for each parameter group after a load.

        Raises:
            SessionError: If there is one; its next step would fail.
        """
        scheduler = self._scheduler
        for each in scheduler.members.values() if isinstance(scheduler, NamedSchedulers) else [scheduler]:
            for part in (each, *getattr(each, "_schedulers", ())):  # of a SequentialLR
                groups = len(getattr(getattr(part, "optimizer", None), "param_groups", ()))
                functions = len(getattr(part, "lr_lambdas", ()) or ())
                if groups and functions and groups != functions:
                    raise SessionError(
                        f"{type(part).__name__} has {functions} functions, and its optimizer {groups} parameter "
                        "groups: the saved run added some; call session.load(), append their functions to "
                        "scheduler.lr_lambdas, and then start the loop"
                    )

    def state_dict(self, state: TrainState) -> dict[str, Any]:
        """Return the `state_dict` that the scheduler has at the position that a state remembers."""
        merged: dict[str, Any] = _merge(self._scheduler.state_dict(), position(state))
        return merged

    def _read(self) -> FrozenDict:
        packed: FrozenDict = freeze(pack("the scheduler", _encode_keys(self._scheduler.state_dict())))
        return packed


@final
class NamedSchedulers:
    """Several schedulers with the `state_dict` of each under its name.

    Args:
        members: The schedulers by name.
    """

    def __init__(self, members: Mapping[str, Any]) -> None:
        self.members = dict(members)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of each."""
        return {name: each.state_dict() for name, each in self.members.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Write the position of each.

        Raises:
            MismatchError: If `saved` is of schedulers with other names.
        """
        raise_mismatch(
            f"the state has {'no ' if name in self.members else 'a '}scheduler {name!r}, and the run has "
            f"{', '.join(map(repr, self.members))}"
            for name in sorted(saved.keys() ^ self.members.keys())
        )
        for name, each in self.members.items():
            each.load_state_dict(saved[name])


def _is_at(scheduler: Any, memory: Mapping[str, Any]) -> bool:
    """Return whether a scheduler has the position of its memory; True if it has no `last_epoch`."""
    steps = getattr(scheduler, "last_epoch", None)
    return steps is None or bool(memory.get("last_epoch", steps) == steps)


def position(state: TrainState) -> dict[str, Any]:
    """Return the `state_dict` of the scheduler that a state remembers, in plain dicts and lists."""
    saved: dict[str, Any] = _decode_keys(unpack(state.memory(MEMORY)))
    return saved


def _merge(live: Any, saved: Any) -> Any:
    """Return `saved`, but the objects of `live` where they are equal: torch keeps milestones in a `Counter`."""
    if type(live) is dict and type(saved) is dict:
        return live | {key: _merge(live[key], value) if key in live else value for key, value in saved.items()}
    if type(live) is list and type(saved) is list and len(live) == len(saved):
        return [_merge(*pair) for pair in zip(live, saved, strict=True)]
    return live if isinstance(live, Mapping) and live == saved else saved


def _encode_keys(value: Any) -> Any:
    """Return `value` with text as the keys of every mapping: a mapping with other keys becomes a tuple of pairs."""
    if isinstance(value, (list, tuple)):
        return [*map(_encode_keys, value)] if isinstance(value, list) else tuple(map(_encode_keys, value))
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _encode_keys(item) for key, item in value.items()}
        return {_ITEMS: tuple((key, _encode_keys(item)) for key, item in value.items())}
    return value


def _decode_keys(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [*map(_decode_keys, value)] if isinstance(value, list) else tuple(map(_decode_keys, value))
    if isinstance(value, dict):
        if _ITEMS in value:
            return {key: _decode_keys(item) for key, item in value[_ITEMS]}
        return {key: _decode_keys(item) for key, item in value.items()}
    return value
