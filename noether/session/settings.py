"""The settings of a `Session`: what a run is made of, and refusals of what cannot work, before training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import update_wrapper
from typing import TYPE_CHECKING, Any

import torch

from noether.core.callback import declaration_of, label_of, leaves_of, parts_of
from noether.core.callbacks.lr_on_plateau import ReduceLROnPlateauCallback
from noether.core.errors import check_whole, raise_problems, suggest
from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.core.tensors.forward import forward
from noether.core.tensors.losses import name_of
from noether.core.tensors.means import Mean
from noether.core.tensors.module import frozen_names, named_parameters, persistent_buffers
from noether.effects.disk.tensor_files import describe_unsavable
from noether.effects.handled_effects import find_unhandled
from noether.effects.interpreter import Interpreter
from noether.session.errors import SessionError
from noether.session.evaluation import evaluation_data
from noether.session.optimizers import TorchOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.core.tensors.live.optimizer import Optimizers
    from noether.distributed.ranks import Ranks
    from noether.effects import RunDirectory
    from noether.session.optimizers import LiveOptimizer

    Interpret = Callable[[Effects, TrainState, Event], None]


def check_parts(*, model: Any, loss: Any, precision: Any, interpreter: Any, seed: int, run: Any) -> None:
    """Refuse parts of another type than the session takes.

    Raises:
        SessionError: If there is one.
    """
    if not hasattr(model, "named_parameters"):
        raise SessionError(f"model= takes a torch.nn.Module, not {model!r}")
    if type(loss).__module__ == "torch.nn.modules.loss":
        raise SessionError(
            f"loss= takes (outputs, batch), and {type(loss).__name__} takes (outputs, targets): write criterion = "
            f"torch.nn.{type(loss).__name__}() and loss=lambda outputs, batch: criterion(outputs, batch[1])"
        )
    if loss is not None and not callable(loss):
        raise SessionError(f"loss= takes a function (outputs, batch) -> loss, not {loss!r}")
    if precision is not None and not isinstance(precision, torch.dtype):
        raise SessionError(f"precision= takes a dtype, such as torch.bfloat16, not {precision!r}")
    if interpreter is not None and not callable(interpreter):
        raise SessionError(f"interpreter= takes a function (effects, state, event) -> None, not {interpreter!r}")
    if seed >= 2**63:
        raise SessionError(f"seed={seed} is too large: pass a whole number below 2**63")
    if not isinstance(run, Run):
        raise SessionError(f"run= takes a noether.Run, not {run!r}: write run=noether.Run(batch_size=...)")


def check_savable(model: nn.Module, directory: RunDirectory | None) -> None:
    """Refuse a model whose weights no checkpoint of a directory can contain.

    Raises:
        SessionError: If there is such a tensor.
    """
    if directory is None:
        return
    if (problem := describe_unsavable({**named_parameters(model), **persistent_buffers(model)})) is not None:
        raise SessionError(f"model=: {problem}")


def end_of_run(run: Run, max_epochs: int | None, max_updates: int | None, max_samples: int | None) -> Run:
    """Return `run` with the end that the user gave, if any.

    Raises:
        SessionError: If there are two ends.
        SettingsError: If one is not a whole number >= 1.
    """
    ends = {"max_epochs": max_epochs, "max_updates": max_updates, "max_samples": max_samples}
    given = {name: count for name, count in ends.items() if count is not None}
    raise_problems(check_whole(name, count) for name, count in given.items())
    names = [*given, *(["run=Run(end=...)"] if "end" in vars(run) else [])]
    if len(names) > 1:
        raise SessionError(f"{' and '.join(names)} are given, and a run has one end: keep one of them")
    counters = {name.removeprefix("max_").removesuffix("s"): count for name, count in given.items()}
    return run.replace(end=TrainingIteration(**counters)) if given else run


def list_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Return the callbacks that a user passed, one or several.

    Raises:
        SessionError: If one of them is not a callback.
    """
    is_iterable = not callable(callbacks) and hasattr(callbacks, "__iter__")
    members = tuple(callbacks) if is_iterable and not isinstance(callbacks, (str, Mapping)) else (callbacks,)
    for member in members:
        if isinstance(member, type):
            raise SessionError(f"callbacks= holds the class {member.__name__}: write {member.__name__}(...)")
        if not callable(member):
            raise SessionError(
                "callbacks= takes one callback or a list of them, each an object that is called as "
                f"(state, event) -> (state, effects), not {member!r}; pass [] for none"
            )
    return members


def complete_run(
    run: Run,
    *,
    model: nn.Module,
    data: Mapping[str, Iterable[Any]] | None,
    loss: Callable[[Any, Any], Any] | None,
    precision: torch.dtype | None,
    directory: RunDirectory | None,
    seed: int,
    ranks: Ranks,
) -> Run:
    """Return `run` with its data, forward, frozen params, run id and ranks, as far as they are known.

    Raises:
        SessionError: If data or loss are given twice, or data cannot be iterated for every evaluation.
    """
    if data is not None and "data" in vars(run):
        raise SessionError("data= and run=Run(data=...) are given: keep one of them")
    if data is not None and not isinstance(data, Mapping):
        raise SessionError(
            f"data= takes loaders by dataset key: pass data={{'val': loader}}, not a {type(data).__name__}"
        )
    if once := next((key for key, each in (data or {}).items() if hasattr(each, "__next__")), None):
        raise SessionError(
            f"data[{once!r}] is an iterator, which can be read once: pass a DataLoader or a list of batches"
        )
    if loss is not None and "forward" in vars(run):
        raise SessionError("loss= and run=Run(forward=...) are given: keep one of them")
    frozen = frozen_names(model)
    predict = None if loss is None else forward(model, _SessionLoss(loss), precision=precision)
    run_id = None if directory is None else directory.run_id
    run = fill_run(run, data=data, forward=predict, frozen=frozen, run_id=run_id)
    if ranks.are_several:
        run = run.replace(rank=ranks.rank, world_size=ranks.world_size, gather=ranks.control.gather)
    if "data" not in vars(run):
        return run
    counts: dict[str, Any] = {"ranks": ranks, "batch_size": run.batch_size}
    return run.replace(data={key: evaluation_data(each, model, seed, key, **counts) for key, each in run.data.items()})


class _SessionLoss:
    """A loss function under its own name, whose result is checked as that of `loss=`."""

    def __init__(self, loss: Callable[[Any, Any], Any]) -> None:
        self._loss = loss
        update_wrapper(self, loss if hasattr(loss, "__qualname__") else type(loss), updated=())

    def __call__(self, outputs: Any, batch: Any) -> Any:
        losses = self._loss(outputs, batch)
        if not isinstance(losses, (torch.Tensor, Mapping, Mean)):
            found = "nothing" if losses is None else f"a {type(losses).__name__}"
            raise SessionError(
                f"loss= returned {found}: return a tensor, or {{name: tensor}}, without .item(), from "
                f"{name_of(self._loss)}"
            )
        return losses


def fill_run(run: Run, **known: Any) -> Run:
    """Return `run` with the fields that an adapter knows where the user gave none; None stands for unknown.

    Example:
        >>> from noether import Run
        >>> run = fill_run(Run(updates_per_epoch=3), updates_per_epoch=5, run_id="a", effective_batch_size=None)
        >>> run.updates_per_epoch, run.run_id
        (3, 'a')
    """
    return run.replace(**{name: value for name, value in known.items() if value is not None and name not in vars(run)})


def watch_optimizer(model: nn.Module, optimizer: Optimizers | LiveOptimizer | None) -> LiveOptimizer | None:
    """Return `optimizer`, or several by name, as one that a session can watch.

    Raises:
        SessionError: If it holds a parameter that the model does not have, or cannot be watched.
    """
    if optimizer is None or hasattr(optimizer, "opt_state"):
        return optimizer  # type: ignore[return-value]  # a torch optimizer has no opt_state
    for each in _members(optimizer):
        if not isinstance(each, torch.optim.Optimizer):
            raise SessionError(
                f"optimizer= takes an optimizer of torch.optim, got {type(each).__name__}; several by name, as in "
                "optimizer={'g': adam_g, 'd': adam_d}"
            )
    return TorchOptimizer(model, optimizer)


def check_scheduler(scheduler: Any, optimizer: Any) -> None:
    """Refuse a scheduler that cannot be saved, or that changes another optimizer.

    Args:
        scheduler: The scheduler, or several by name.
        optimizer: The optimizer, or several by name.

    Raises:
        SessionError: If a scheduler has no `state_dict`, or was made for an optimizer that the session does not have.
    """
    known = [getattr(each, "param_groups", None) for each in _members(optimizer)]
    for each in () if scheduler is None else _members(scheduler):
        theirs = getattr(getattr(each, "optimizer", None), "param_groups", None)
        if not hasattr(each, "state_dict"):
            raise SessionError(
                f"scheduler= takes a scheduler with state_dict(), got {type(each).__name__}; several by name, as in "
                "scheduler={'g': scheduler_g, 'd': scheduler_d}"
            )
        if theirs is not None and None not in known and all(theirs is not groups for groups in known):
            raise SessionError(
                "the scheduler changes another optimizer: pass the one that it was made for as optimizer="
            )


def _members(parts: Any) -> list[Any]:
    """Return one part, or several by name, as a list."""
    return list(parts.values()) if isinstance(parts, Mapping) else [parts]


def check_scaler(scaler: Any) -> None:
    """Refuse what is not a gradient scaler.

    Raises:
        SessionError: If it is something else.
    """
    if scaler is not None and not (hasattr(scaler, "state_dict") and hasattr(scaler, "get_scale")):
        raise SessionError(f"scaler= takes a torch.amp.GradScaler, got {type(scaler).__name__}")


def check_directory(directory: Any, interpreter: Any) -> None:
    """Refuse a session whose effects nothing would carry out.

    Raises:
        SessionError: If there is neither a directory nor an interpreter.
    """
    if directory is None and interpreter is None:
        raise SessionError(
            "no interpreter to run effects: pass directory=noether.open_run('runs/mine'), or interpreter="
        )
    if directory is not None and not hasattr(directory, "interpreter"):
        raise SessionError(f"directory= takes an open run: pass directory=noether.open_run({str(directory)!r})")


def interpreter_of_rank(given: Interpret | None, directory: RunDirectory | None, rank: int) -> Interpret:
    """Return what runs the effects: the interpreter of the user, or of the directory; only rank 0 calls a function."""
    chosen = given if directory is None or given is not None else directory.interpreter
    if chosen is None or (rank > 0 and not isinstance(chosen, Interpreter)):
        return _run_no_effects
    return chosen


def check_handlers(members: Iterable[Callback], interpret: Interpret) -> None:
    """Refuse callbacks that declare effects for which an interpreter has no handler; other functions may handle any.

    Raises:
        SessionError: With each callback, the type of effect and what to write.
    """
    if not isinstance(interpret, Interpreter):
        return
    if problems := [text for member in members for text in find_unhandled(member, interpret.handles)]:
        raise SessionError("\n".join(problems))


def _run_no_effects(effects: Effects, state: TrainState, event: Event) -> None:
    """Run nothing: rank 0 does."""


def check_data(members: tuple[Callback, ...], run: Run) -> None:
    """Refuse callbacks that iterate data which is not there.

    Raises:
        SessionError: If the run has no such dataset, or no loss to evaluate it with.
    """
    for member in members:
        key = getattr(member, "dataset_key", None)
        if key is None:
            continue
        data = getattr(run, "data", {})
        if key not in data:
            raise SessionError(
                f"{label_of(member)} iterates {key!r}, and the run has {list(data) or 'no data'}"
                f"{suggest(key, data)}; pass data={{{key!r}: loader}} and loss="
            )
        if "forward" not in vars(run):
            raise SessionError(
                f"{label_of(member)} iterates {key!r}, and the session has no loss to evaluate it with: pass loss=, "
                "a function (outputs, batch) -> {name: mean over samples}"
            )
        source = getattr(data[key], "dataset", data[key])
        if hasattr(source, "__len__") and not len(source):
            raise SessionError(f"{label_of(member)} iterates {key!r}, which is empty: pass data with samples")
        if getattr(member, "batch_size", None) is not None and not hasattr(data[key], "batched"):
            raise SessionError(
                f"{label_of(member)} has a batch_size, and data[{key!r}] is in batches already: leave batch_size out"
            )


def check_optimizer(callbacks: Callback, optimizer: LiveOptimizer | None) -> None:
    """Refuse callbacks that need an optimizer, or readings that it cannot measure.

    Raises:
        SessionError: If one does.
    """
    for member in leaves_of(callbacks):
        if optimizer is None and isinstance(member, ReduceLROnPlateauCallback):
            raise SessionError(f"{label_of(member)} scales the learning rate of the optimizer: pass optimizer=")
    measured = frozenset() if optimizer is None else optimizer.measures
    for part in parts_of(callbacks):
        for name in ("grad_norm", "gradients"):
            if name in declaration_of(part).readings and name not in measured:
                fix = "pass optimizer=" if optimizer is None else "drop the callback"
                raise SessionError(f"{label_of(part)} reads {name}, which this loop does not measure: {fix}")


def check_scheduler_is_given(optimizer: Any, scheduler: Any, directory: Any) -> None:
    """Refuse a loop with a scheduler of which the session does not know.

    Args:
        optimizer: The optimizer as the session watches it.
        scheduler: The scheduler, or several by name.
        directory: The run on disk.

    Raises:
        SessionError: If there is one, and a directory to resume from.
    """
    schedulers = [] if scheduler is None else _members(scheduler)
    ours = [getattr(each, "optimizer", None) for each in schedulers]
    for each in getattr(optimizer, "optimizers", ()):
        is_known = any(theirs is None or theirs.param_groups is each.param_groups for theirs in ours)
        if directory is not None and not is_known and any("initial_lr" in group for group in each.param_groups):
            raise SessionError(
                "a scheduler changes the learning rates of the optimizer, and a resumed run would begin it at its "
                "start: pass scheduler= to the session"
            )


def check_epochs(loader: Any, run: Run) -> None:
    """Refuse several epochs of an iterator.

    Raises:
        SessionError: If the run has more epochs than the loader can yield.
    """
    epochs = run.end.epoch if "end" in vars(run) else 0
    if epochs > 1 and hasattr(loader, "__next__"):
        raise SessionError(
            f"the loader is an iterator, which yields one epoch, and max_epochs is {epochs}: pass an iterable, such as "
            "a DataLoader, a list, or an object whose __iter__ returns a new iterator"
        )
