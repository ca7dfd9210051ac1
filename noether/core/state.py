"""The state of a run: one immutable value with everything that the run remembers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from noether.core.iteration import TrainingIteration
from noether.core.state_pytree import register_state
from noether.core.tensors.live.aliases import copy_aliases, views_live_tensors
from noether.core.tensors.live.extra_state import check_extra_state
from noether.core.tensors.live.held_parameters import refuse_foreign_parameters, warn_of_unassigned_parameters
from noether.core.tensors.live.loading import load_into
from noether.core.tensors.live.optimizer import view_optimizer
from noether.core.tensors.live.views import VIEWS, LiveField, views_of
from noether.core.tensors.memory import check_memory, check_savable, freeze_memory
from noether.core.tensors.module import move_to_model
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import nn

    from noether.core.tensors.live.optimizer import Optimizers

Memory = Any
"""The memory of one callback: a tree of JSON scalars, tuples, dicts and tensors."""


class Measured(NamedTuple):
    """The last value of a metric and the iteration at which it was measured."""

    value: float | torch.Tensor
    iteration: TrainingIteration


_EMPTY: Final = FrozenDict()
_HYPERPARAMS: Final = FrozenDict(lr_scale=1.0)
_START: Final = TrainingIteration()


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainState:
    """Everything that a run remembers. Every method returns a new state; none writes to this one.

    Args:
        iteration: Counts of completed epochs, updates and samples.
        previous: The iteration before the last update; schedules compare it to `iteration`.
        epoch_start: The iteration at which the current epoch began. If that is unknown, as in checkpoints of earlier
            versions, its `epoch` is lower than that of `iteration`.
        epoch_batches: Completed batches of the current epoch, in a loop whose updates may have several; 0 in a loop
            that counts only updates.
        params: The model's parameters by name.
        buffers: The model's buffers by name.
        non_persistent: Its buffers with `persistent=False`, by name. No file of weights has them; a resumable
            checkpoint has those that training changed.
        constructed: Dtype and shape of each buffer as the constructor of the model made it, `none` if it was None, and
            a digest of a non-persistent one; None if no model is known. A buffer that training gave another form loads
            into a model whose constructor makes the same.
        extra_state: What modules of the model return from `get_extra_state`, by their path.
        tied_names: Other names that the model has for a tensor, such as a tied weight: its name in this state, by each
            other name.
        opt_state: The optimizer's memory; of several optimizers that of each, by its name.
        hyperparams: Values that a callback may set; `lr_scale` multiplies the learning rate of every later update.
        metrics: The last value of each metric and where it was measured.
        callback_states: Each callback's memory by name.
        stop: The first reason to stop, or None.
        stopped_by: Label of the callback that gave the reason, set by the reducer; None if unknown.
        ended: Whether `AfterTraining` has been dispatched since the last update.
        seed: The seed of all random numbers of the run.
        pending: The readings of an `AfterUpdate` that an error or a signal cut short, which the loop dispatches again;
            None otherwise.
        lengths: Lengths of an epoch that the loop knew as it began, such as `updates_per_epoch`; a resumed loop
            compares them with its own.

    Example:
        >>> state = TrainState().advance(samples=4)
        >>> str(state.iteration), str(state.previous)
        ('E0_U1_S4', 'E0_U0_S0')

        A state is a pytree whose leaves are its tensors, so `torch.func` takes it: here an ensemble as one state with
        stacked tensors, and the loss of each member. States with the same counts, numbers and texts can be stacked.

        >>> import torch
        >>> from torch.func import functional_call, vmap
        >>> from torch.utils import _pytree as pytree
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> members = [TrainState(params={"weight": torch.full((1, 2), value)}) for value in (1.0, 2.0, 3.0)]
        >>> ensemble = pytree.tree_map(lambda *tensors: torch.stack(tensors), *members)
        >>> batch = torch.ones(4, 2)
        >>> vmap(lambda member: functional_call(model, member.params, batch).mean())(ensemble)
        tensor([2., 4., 6.])
    """

    iteration: TrainingIteration = _START
    previous: TrainingIteration = _START
    epoch_start: TrainingIteration = _START
    epoch_batches: int = 0
    params: Mapping[str, torch.Tensor] = _EMPTY
    buffers: Mapping[str, torch.Tensor] = _EMPTY
    non_persistent: Mapping[str, torch.Tensor] = _EMPTY
    constructed: Mapping[str, str] | None = field(default=None, compare=False)
    extra_state: Mapping[str, Any] = _EMPTY
    tied_names: Mapping[str, str] = _EMPTY
    opt_state: Mapping[str, Any] = _EMPTY
    hyperparams: Mapping[str, Any] = _HYPERPARAMS
    metrics: Mapping[str, Measured] = _EMPTY
    callback_states: Mapping[str, Memory] = _EMPTY
    stop: str | None = None
    stopped_by: str | None = None
    ended: bool = False
    seed: int = 0
    pending: Mapping[str, Any] | None = None
    lengths: Mapping[str, int] = _EMPTY

    def __post_init__(self) -> None:
        if dict in map(type, vars(self).values()):
            vars(self).update(_freeze_fields(vars(self)))

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        optimizer: Optimizers | None = None,
        *,
        saved: TrainState | None = None,
        seed: int = 0,
    ) -> Self:
        """Return a state that views a live model and optimizer: its tensors are read whenever the state is read.

        So it shows what model and optimizer have now, also after `p.data = ...`, `.to(dtype)`, a buffer that is
        assigned, or `load_state_dict(assign=True)`. What a callback remembers of it is copied. Names have no parts of
        wrappers such as `torch.compile` and DDP, so a run may resume with or without them. For the same reason pass
        `torch.func.functional_call` the module inside of a wrapper, such as `model.module` of DDP: given the wrapper,
        it may compute with the weights of the model.

        Args:
            model: The model, whose params, buffers and extra state the state views.
            optimizer: The optimizer, or several by name, as `{"g": adam_g, "d": adam_d}`; their memory is read whenever
                the state is saved. A parameter that requires a gradient and that none of them holds is named once.
            saved: A loaded state to resume; it is written into the model and optimizer first. Parameter groups that the
                saved run added while it trained are added to the optimizer, so a loop that adds one at some epoch has
                to see whether it is there. `requires_grad` of the parameters in groups becomes as it was.
            seed: The seed of all random numbers of the run; `saved` has its own.

        Raises:
            MismatchError: If names, shapes or dtypes of `saved` are not those of the model, or its parameter groups not
                those of the optimizer; the message lists all differences, and nothing is written. Also if the optimizer
                holds parameters that the model does not have. It is a KeyError and a ValueError.
            ExtraStateError: If `get_extra_state` of a module returns what no checkpoint can contain.

        Example:
            >>> import torch
            >>> sorted(TrainState.from_module(torch.nn.Linear(2, 1)).params)
            ['bias', 'weight']
        """
        check_extra_state(model)
        views: dict[str, Any] = views_of(model)  # before a load, which may change what the constructor made
        if saved is not None:
            load_into(model, optimizer, saved)
        if optimizer is not None:
            refuse_foreign_parameters(model, optimizer)
            warn_of_unassigned_parameters(model, optimizer)
        views["opt_state"] = _EMPTY if optimizer is None else view_optimizer(model, optimizer)
        if saved is None:
            return cls(**views, seed=seed)
        moved = {name: move_to_model(model, getattr(saved, name)) for name in ("callback_states", "pending")}
        return cls(**{**vars(saved), **views, **moved})

    def into_module(self, model: nn.Module, optimizer: Optimizers | None = None) -> Self:
        """Write the state into a live model and optimizer, and return the state that views them.

        Call it after loading a checkpoint, or after a dispatch that changed params or hyperparams. Learning rates are
        multiplied by `hyperparams["lr_scale"]`, once.

        Raises:
            MismatchError: As `from_module`.
        """
        return self.from_module(model, optimizer, saved=self)

    def replace(self, **changes: Any) -> Self:
        """Return the state with some fields changed.

        Raises:
            TypeError: If the state has no such field.
        """
        # Every update calls this several times; `dataclasses.replace` sets each field and takes ten times as long.
        state = object.__new__(type(self))
        fields = vars(state)
        fields.update(vars(self))
        fields.update(_freeze_fields(changes) if dict in map(type, changes.values()) else changes)
        if len(fields) != len(_FIELD_NAMES):
            unknown = next(name for name in fields if name not in _FIELD_NAMES)
            raise TypeError(f"a state has no field {unknown!r}; it has {', '.join(_FIELD_NAMES)}")
        if not _LASTING_FIELDS.isdisjoint(changes) and views_live_tensors(fields):
            fields.update(_copy_aliases(vars(self), fields, _LASTING_FIELDS & changes.keys()))
        return state

    def advance(self, *, samples: int, epoch_batches: int = 0) -> Self:
        """Return the state after one more update of `samples` samples, with `ended` reset.

        Args:
            samples: Samples of the update.
            epoch_batches: Completed batches of the epoch after the update, if the loop counts them.
        """
        state = object.__new__(type(self))  # every update calls this, and `replace` checks what is right here
        vars(state).update(
            vars(self),
            iteration=self.iteration.advance(samples=samples),
            previous=self.iteration,
            epoch_batches=epoch_batches,
            ended=False,
        )
        return state

    def next_epoch(self) -> Self:
        """Return the state after the end of its epoch; `previous` is kept for `AfterEpoch`."""
        iteration = self.iteration.next_epoch()
        return self.replace(iteration=iteration, epoch_start=iteration, epoch_batches=0)

    def memory(self, name: str) -> Memory:
        """Return the memory of the callback `name`.

        Raises:
            KeyError: If the callback has no memory; the message lists those that have.
        """
        try:
            return self.callback_states[name]
        except KeyError:
            known = ", ".join(map(repr, self.callback_states)) or "none"
            raise KeyError(f"no memory is named {name!r}; memories: {known}") from None

    def remember(self, name: str, memory: Memory) -> Self:
        """Return the state with the memory of the callback `name` set; the same state if it already is this object.

        Dicts are frozen, and lists become tuples. Memory that a checkpoint would not return as it is, is refused. For
        speed only the first memory of a name is searched for sparse, quantized and nested tensors and for those that
        require a gradient; later ones are refused when they are saved.

        Args:
            name: Name of the callback's memory.
            memory: A tree of str, int, float, bool, None, tensors, tuples, and dicts with text as keys.

        Raises:
            TypeError: If a part of it has another type, with its path and what to write instead.

        Example:
            >>> TrainState().remember("count", 3).memory("count")
            3
        """
        if name not in self.callback_states:
            check_memory(name, memory)
        elif self.callback_states[name] is memory:
            return self
        return self.replace(callback_states=FrozenDict({**self.callback_states, name: freeze_memory(name, memory)}))

    def forget(self, *names: str) -> Self:
        """Return the state without the memories `names`; the same state if it has none of them.

        Example:
            >>> TrainState().remember("count", 3).forget("count", "sum").callback_states
            FrozenDict({})
        """
        rest = {name: memory for name, memory in self.callback_states.items() if name not in names}
        return self if len(rest) == len(self.callback_states) else self.replace(callback_states=FrozenDict(rest))

    def copy_aliases(self, tree: Any) -> Any:
        """Return `tree` with copies of tensors that share memory with the live model and optimizer of this state.

        `remember` and `replace` do so for memory and metrics, and `dispatch` for effects, because a later update would
        change what they hold. It is the same object if the state views no live model, or `tree` has no such tensor.

        Args:
            tree: Nested containers and dataclasses.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> state = TrainState.from_module(model)
            >>> before, now = state.copy_aliases(state.params), state.params
            >>> _ = model.weight.data.fill_(7.0)
            >>> bool(before["weight"] == 7), bool(now["weight"] == 7)
            (False, True)
        """
        return copy_aliases(vars(self), tree) if views_live_tensors(vars(self)) else tree

    def request_stop(self, reason: str) -> Self:
        """Return the state that asks the loop to stop; an earlier reason is kept.

        Example:
            >>> TrainState().request_stop("plateau").request_stop("late").stop
            'plateau'
        """
        return self if self.stop is not None else self.replace(stop=reason)


def _copy_aliases(before: Mapping[str, Any], fields: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the named fields with copies of new tensors in them that a live model or optimizer will overwrite."""
    changed: dict[str, Any] = {}
    for name in names:
        known = before[name]
        new = {key: value for key, value in fields[name].items() if known.get(key) is not value}
        copied = copy_aliases(fields, new)
        if copied is not new:
            changed[name] = FrozenDict({**fields[name], **copied})
    return changed


def _freeze_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with plain dicts frozen."""
    frozen = {name: FrozenDict(value) if type(value) is dict else value for name, value in fields.items()}
    # Only callback memory is frozen as a tree: the others are flat, or optimizer memory, which is large.
    if "callback_states" in fields:
        for name, memory in fields["callback_states"].items():
            check_memory(name, memory)
        memories = {name: freeze_memory(name, memory) for name, memory in fields["callback_states"].items()}
        frozen["callback_states"] = FrozenDict(memories)
    if "hyperparams" in fields:
        check_savable("hyperparams", fields["hyperparams"])
    return frozen


_FIELD_NAMES: Final = tuple(each.name for each in dataclasses.fields(TrainState))
_LASTING_FIELDS: Final = frozenset({"callback_states", "metrics", "hyperparams"})
"""Fields with tensors that are read after later updates."""

for _name in VIEWS:
    setattr(TrainState, _name, LiveField(_name, _EMPTY))
register_state(TrainState, Measured)
