"""Calls models, losses and metrics; a note on their errors says what failed, and with which inputs."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.func import functional_call

from noether.core.errors import CallNote
from noether.core.tensors.batch import model_arguments, takes_whole_batch
from noether.core.tensors.losses import name_of, read_losses
from noether.core.tensors.module import named_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from torch import Tensor, nn

    from noether.core.tensors.losses import Losses, LossResult

_PARTS: Final = 6
"""Largest number of parts of a container that a note lists."""
_LETTERS: Final = 60
"""Largest length of the description of a module or a value."""
_INTEGERS: Final = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def call_model(model: nn.Module, batch: Any, weights: dict[str, Tensor] | None = None) -> Any:
    """Return the outputs of a model for a batch.

    Args:
        model: The model.
        batch: The batch; see `model_arguments` for what the model gets of it.
        weights: Values that take the place of parameters and buffers, by name in the model.

    Example:
        >>> call_model(torch.nn.Flatten(), (torch.zeros(2, 3, 4), "target")).shape
        torch.Size([2, 12])
    """
    arguments, keywords = model_arguments(model, batch)
    try:
        if weights:
            return functional_call(model, weights, arguments, keywords)
        return model(*arguments, **keywords)  # faster
    except Exception as error:
        error.add_note(CallNote(_describe_place(error, model, batch)))
        raise


def compute_losses(loss: Callable[[Any, Any], LossResult], outputs: Any, batch: Any) -> Losses:
    """Return the losses of a batch by name, together with their sum, named `total`.

    Args:
        loss: The loss function.
        outputs: The outputs of the model.
        batch: The batch.

    Raises:
        TypeError: If the function returns something else than losses.
        ValueError: If it returns no loss, or a weight or a name that a loss cannot have.

    Example:
        >>> compute_losses(lambda outputs, batch: outputs.mean(), torch.ones(2), None)
        FrozenDict({'loss': tensor(1.), 'total': tensor(1.)})
    """
    return read_losses(call_with_outputs(loss, outputs, batch), loss)


def call_with_outputs(function: Callable[[Any, Any], Any], outputs: Any, batch: Any, what: str | None = None) -> Any:
    """Return the result of a loss or a metric.

    Args:
        function: `(outputs, batch) -> result`.
        outputs: The outputs of the model.
        batch: The batch.
        what: What the function is, for the note on an error; by default, the loss of its name.

    Example:
        >>> call_with_outputs(lambda outputs, batch: outputs - batch, 3, 1)
        2
    """
    try:
        return function(outputs, batch)
    except Exception as error:
        called = f"outputs {describe_value(outputs)} and the whole batch {describe_value(batch)}"
        error.add_note(CallNote(f"in the {what or f'loss {name_of(function)}'}, called with {called}"))
        raise


def describe_value(value: Any) -> str:
    """Return shapes and dtypes of the tensors in a value, and the range of integers, in one line.

    Example:
        >>> describe_value({"image": torch.zeros(4, 2), "label": torch.tensor([0, 7])})
        '{image: (4, 2) float32, label: (2,) int64 from 0 to 7}'
    """
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if isinstance(value, Mapping):
        parts = [f"{key}: {describe_value(item)}" for key, item in list(value.items())[:_PARTS]]
        return f"{{{', '.join(_with_rest(parts, len(value)))}}}"
    if type(value) in {list, tuple}:
        parts = [describe_value(item) for item in value[:_PARTS]]
        return f"[{', '.join(_with_rest(parts, len(value)))}]"
    if value is None or isinstance(value, (int, float, str)):
        return _shorten_text(repr(value))
    return f"a {type(value).__name__}"


def _describe_tensor(tensor: Tensor) -> str:
    if tensor.is_nested:  # it has no shape
        return "a nested tensor"
    described = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.dtype in _INTEGERS and tensor.numel() and tensor.device.type == "cpu":  # another device may have failed
        with suppress(Exception):  # inside of a transform, a tensor has no values
            described += f" from {int(tensor.min())} to {int(tensor.max())}"
    return described


def _with_rest(parts: list[str], count: int) -> list[str]:
    return [*parts, f"{count - len(parts)} more"] if count > len(parts) else parts


def _shorten_text(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]}..."


def _describe_place(error: Exception, model: nn.Module, batch: Any) -> str:
    """Return which module raised an error, and its inputs; or how the model has to take batches."""
    paths = {id(module): path for path, module in named_modules(model)}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    forwards = [frame for frame in frames if frame.f_code.co_name == "forward" and id(_owner(frame)) in paths]
    if not forwards:
        taken = _shorten_text(f"{type(model).__name__}.forward{_signature(model)}")
        return (
            f"in the call of {taken} for the batch {describe_value(batch)}: of a tuple, (inputs, *targets), the model "
            "gets the inputs, and of a dict the entries that forward names; a single parameter named batch gets all"
        )
    module = _owner(forwards[-1])
    path, described = paths[id(module)], repr(module)
    if "\n" in described or len(described) > _LETTERS:
        described = type(module).__name__
    where = f"{path or 'forward of the model'} ({described})"
    called = ", ".join(f"{name} {describe_value(value)}" for name, value in _arguments(forwards[-1]))
    whole = ""
    if isinstance(batch, (tuple, list)) and takes_whole_batch(model):
        whole = "; a parameter of forward named batch gets the whole batch: rename it to get the inputs alone"
    return f"in {where}, called with {called or 'other arguments'}{whole}"


def _owner(frame: FrameType) -> Any:
    return frame.f_locals.get("self")


def _arguments(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a call of `forward` by name, as they are where it failed."""
    code = frame.f_code
    for name in code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]:
        if frame.f_locals.get(name) is not None:
            yield name, frame.f_locals[name]


def _signature(model: nn.Module) -> str:
    try:
        return str(inspect.signature(model.forward)).partition(" ->")[0]
    except (TypeError, ValueError):  # it has none
        return ""
