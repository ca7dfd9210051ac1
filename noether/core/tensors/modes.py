"""Modes of the modules of a model: which of them train, and which stay in evaluation mode during training."""

from __future__ import annotations

from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Final, final

from torch import nn

from noether.core.tensors.module import named_modules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.tensors.module import Modules

_SHOWN: Final = 5
_MODE_METHODS: Final = ("train", "eval", "children", "named_children", "__setattr__")
"""What `eval()` calls; a class that defines one of them decides about its modes by itself."""
_read_mode_methods: Final = attrgetter(*_MODE_METHODS)
_METHODS_OF_TORCH: Final = _read_mode_methods(nn.Module)


@contextmanager
def evaluation_mode(model: nn.Module, modules: Modules | None = None) -> Iterator[Modules]:
    """Return a context in which a model is in evaluation mode; afterwards each module has the mode that it had before.

    `model.train()` could not restore the modes: it would train the parts that the user put into evaluation mode.

    Args:
        model: The model.
        modules: What `named_modules` returns of it, where that is known.

    Yields:
        What `named_modules` returns of the model in evaluation mode, as a class may change its modules in `train`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
        >>> with evaluation_mode(model):
        ...     print([module.training for module in model])
        [False, False]
        >>> [module.training for module in model]
        [False, True]
    """
    modules = modules or named_modules(model)
    modes = [(module, module.training) for _, module in modules]
    if all(_has_plain_mode(module) for module, _ in modes):
        # What `eval()` does to such modules, without `__setattr__`, which takes as long as a small operation.
        try:
            for module, _ in modes:
                vars(module)["training"] = False
            yield modules
        finally:
            for module, mode in modes:
                vars(module)["training"] = mode
        return
    try:
        model.eval()
        yield named_modules(model)
    finally:
        for module, mode in modes:
            if module.training is not mode:
                module.training = mode


def _has_plain_mode(module: nn.Module) -> bool:
    """Return whether a module keeps its mode as torch's own do: as an attribute that `train` sets on all modules."""
    kind = type(module)
    return (
        _read_mode_methods(kind) == _METHODS_OF_TORCH
        and not hasattr(kind, "training")
        and vars(module).keys().isdisjoint(_MODE_METHODS)
    )


def start_training_mode(model: nn.Module) -> None:
    """Put a new model into training mode, without the parts that its constructor put into evaluation mode.

    A class that defines `train` decides about its own parts.

    Example:
        >>> from torch import nn
        >>> class FineTuned(nn.Sequential):
        ...     def train(self, mode=True):
        ...         super().train(mode)
        ...         self[0].eval()
        ...         return self
        >>> model = FineTuned(nn.BatchNorm1d(2), nn.Dropout().eval(), nn.Linear(2, 1))
        >>> start_training_mode(model)
        >>> [module.training for module in model]
        [False, False, True]
    """
    frozen = [module for module in model.modules() if not module.training]
    model.train()
    for module in frozen:
        module.training = False


def describe_evaluation_mode(model: nn.Module) -> str | None:
    """Return a warning if a model as a whole is in evaluation mode when training begins; else None."""
    if model.training:
        return None
    return (
        f"{type(model).__name__} is in evaluation mode, and training keeps it there, without dropout and with the "
        "stored statistics of batch norm: if that is not meant, call self.train() at the end of its constructor, or "
        "model.train() before training"
    )


def find_trained_parts_in_evaluation(model: nn.Module) -> list[str]:
    """Return the paths of the outermost modules in evaluation mode that have parameters to train.

    Example:
        >>> from torch import nn
        >>> find_trained_parts_in_evaluation(nn.Sequential(nn.Linear(2, 2).eval(), nn.Dropout().eval()))
        ['0']
    """
    found: list[str] = []
    for path, module in named_modules(model):
        is_inside = any(path.startswith(f"{outer}.") for outer in found)
        if not module.training and not is_inside and any(each.requires_grad for each in module.parameters()):
            found.append(path)
    return found


@final
class ModeWatch:
    """Finds modules whose mode changed between the first updates of two epochs; no checkpoint has the modes.

    Args:
        model: The model.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2).eval(), nn.Linear(2, 1))
        >>> watch = ModeWatch(model)
        >>> watch.describe_changes(epoch=0)
        >>> _ = model.train()
        >>> (watch.describe_changes(epoch=1) or "").partition(":")[0]
        'the mode of 0 changed since epoch 0, and no checkpoint has it'
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start: tuple[int, dict[str, bool]] | None = None
        self.epoch: int | None = None
        """The epoch of the last comparison."""
        self._has_warned = False

    def describe_changes(self, epoch: int) -> str | None:
        """Return a warning that names the modes that changed since the first call, or None.

        It compares the modes at the first call in each epoch, and warns only once.
        """
        if self.epoch == epoch:
            return None
        self.epoch = epoch
        if self._has_warned:
            return None
        modes = {path: module.training for path, module in named_modules(self._model)}
        if self._start is None:
            self._start = epoch, modes
            return None
        since, before = self._start
        changed = [path or "the model" for path, mode in modes.items() if before.get(path, mode) is not mode]
        if not changed:
            return None
        self._has_warned = True
        names = ", ".join(changed[:_SHOWN]) + (f" and {len(changed) - _SHOWN} more" if changed[_SHOWN:] else "")
        return (
            f"the mode of {names} changed since epoch {since}, and no checkpoint has it: a resumed run begins with the "
            "modes of the constructor, so set them from the epoch, as by `if epoch >= n`, and not once"
        )
