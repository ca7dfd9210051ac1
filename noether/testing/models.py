"""What the runs of a law say about the model: its params and buffers, the names of losses and outputs, the datasets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypedDict, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from noether.core.callbacks.track_outputs import TrackOutputsCallback
from noether.core.state import TrainState
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.modes import evaluation_mode
from noether.core.tensors.tree import FrozenDict, clone_tensors, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from noether.core.callback import Callback
    from noether.core.run import Run

    Forward = Callable[[TrainState, Any], tuple[Mapping[str, Tensor], Any]]


class ModelArguments(TypedDict, total=False):
    """Keyword arguments of every law and of `runs`; what is left out is synthetic.

    Args:
        model: A module, or its parameters by name. The runs start from its values; they neither call nor change it.
        losses: Names of losses beside `total`, or each as a multiple of `total` by name.
        outputs: What the model returns for one micro-batch, as a tree of example tensors. Each accumulation step has
            other values of the same shapes and dtypes; integers are permuted.
        groups: Names of the parameter groups.
        data: Datasets by key, each an iterable of batches.
        forward: `(state, batch) -> (losses, outputs)`; by default, `model` is called with the batch or with its first
            element if it is a tuple or list, and each loss is the mean of its absolute outputs.
    """

    model: nn.Module | Mapping[str, Tensor]
    losses: Iterable[str] | Mapping[str, float]
    outputs: Any
    groups: Iterable[str]
    data: Mapping[str, Iterable[Any]]
    forward: Forward


@final
class _AnyDataset(Mapping[str, Any]):
    """Has a dataset under every key, because a tested callback may iterate any."""

    def __getitem__(self, key: str) -> Any:
        return _BATCHES

    def __iter__(self) -> Iterator[str]:
        return iter(("train", "val"))

    def __len__(self) -> int:
        return 2


_BATCHES: Final = (
    (torch.tensor([[1.0, 2.0], [-1.0, 0.5]]), torch.tensor([0, 1])),
    (torch.tensor([[0.25, -3.0]]), torch.tensor([1])),
)
_PARAMS: Final = FrozenDict(w=torch.tensor([1.0, -2.0]), b=torch.tensor(0.5))
_BUFFERS: Final = FrozenDict(seen=torch.tensor(0))
_OUTPUTS: Final = FrozenDict(drift=torch.tensor([0.5, 1.5]), scale=0.5)


@final
@dataclass(frozen=True, eq=False)
class TracedModel:
    """The model of a trace, as far as callbacks can see it; it has no layers.

    Args:
        params: Parameters by name, with their first values.
        buffers: Buffers by name, likewise.
        tied_names: The name in these of each tensor that the model has under another name, too, by the other name.
        frozen: Names of the parameters that do not change.
        losses: Each loss as a multiple of the loss of the reading, by name.
        outputs: Outputs of one micro-batch, as an example.
        groups: Names of the parameter groups.
        data: Datasets by key.
        forward: `(state, batch) -> (losses, outputs)`; None for a synthetic one, which depends on the parameters.
        given: Names of the arguments that were given; the others are synthetic.

    Example:
        >>> model = TracedModel().with_arguments(model=torch.nn.Linear(2, 1), losses=("mse",))
        >>> sorted(model.params), dict(model.losses)
        (['bias', 'weight'], {'total': 1.0, 'mse': 0.5})
    """

    params: Mapping[str, Tensor] = _PARAMS
    buffers: Mapping[str, Tensor] = _BUFFERS
    tied_names: Mapping[str, str] = FrozenDict()
    frozen: frozenset[str] = frozenset()
    losses: Mapping[str, float] = FrozenDict(total=1.0)
    outputs: Any = _OUTPUTS
    groups: tuple[str, ...] = ("default",)
    data: Mapping[str, Any] = field(default_factory=_AnyDataset)
    forward: Forward | None = None
    given: frozenset[str] = frozenset()

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:  # noqa: FBT001  # hypothesis' hook
        printer.text(f"TracedModel().with_arguments({', '.join(f'{name}=...' for name in sorted(self.given))})")

    def with_arguments(self, **arguments: Any) -> TracedModel:
        """Return the model with the parts replaced that are given; see `ModelArguments`.

        Raises:
            TypeError: If an argument is unknown, or has no parameters, names or datasets in it.
        """
        unknown = arguments.keys() - ModelArguments.__optional_keys__
        if unknown:
            known = ", ".join(sorted(ModelArguments.__optional_keys__))
            raise TypeError(f"unknown argument {min(unknown)!r}; the model of a run has {known}")
        changes: dict[str, Any] = {name: arguments[name] for name in ("outputs", "forward") if name in arguments}
        if "model" in arguments:
            changes |= _read_weights(arguments["model"])
        if "losses" in arguments:
            changes["losses"] = FrozenDict({"total": 1.0, **_multiples(arguments["losses"])})
        if "groups" in arguments:
            changes["groups"] = _names("groups", arguments["groups"])
        if "data" in arguments:
            changes["data"] = read_datasets(arguments["data"])
            if "forward" not in arguments and isinstance(arguments.get("model"), nn.Module):
                changes["forward"] = _call_module(arguments["model"], tuple(changes.get("losses", self.losses)))
        return replace(self, **changes, given=self.given | arguments.keys() | (changes.keys() & {"forward"}))

    def fit_to(self, callbacks: Iterable[Callback]) -> TracedModel:
        """Return the model with the sub-modules and outputs added that callbacks name in their settings.

        Parameters that were given with `model=`, and outputs that were given with `outputs=`, stay as they are.
        """
        params, outputs = dict[str, Tensor](), dict[str, Tensor]()
        for callback in callbacks:
            for setting in ("model_paths", "model_names"):
                for path in filter(None, getattr(callback, setting, ())):
                    params |= {f"{path}.weight": torch.tensor([0.5, -1.0]), f"{path}.bias": torch.tensor(0.25)}
            if isinstance(callback, TrackOutputsCallback):
                outputs |= dict.fromkeys((*callback.keys, *callback.patterns), torch.tensor([0.5, 1.5]))
        changes: dict[str, Any] = {}
        if params and "model" not in self.given:
            changes["params"] = FrozenDict({**params, **self.params})
        if outputs and "outputs" not in self.given:
            changes["outputs"] = FrozenDict({**outputs, **self.outputs})
        return replace(self, **changes) if changes else self

    def fields_of_run(self) -> dict[str, Any]:
        """Return the fields of a `Run` that describe the model."""
        return {"data": self.data, "forward": self.forward or self._synthetic_forward, "frozen": self.frozen}

    def complete_run(self, run: Run) -> Run:
        """Return a run with these fields, except those that it has and that were not given here."""
        given = self.given | ({"frozen"} if "model" in self.given else set())
        fields = self.fields_of_run()
        return run.replace(**{name: value for name, value in fields.items() if name in given or name not in vars(run)})

    def start(self, seed: int) -> TrainState:
        """Return the state before the first update."""
        moments = {
            name: {"exp_avg": torch.zeros_like(_computable(param))}
            for name, param in self._select_trained(self.params).items()
        }
        opt_state = {"state": moments, "groups": {}}
        params, buffers = clone_tensors(self.params), clone_tensors(self.buffers)
        return TrainState(params=params, buffers=buffers, tied_names=self.tied_names, opt_state=opt_state, seed=seed)

    def step(self, state: TrainState, loss: float) -> TrainState:
        """Return the state after an optimizer step, which depends on the params, the loss and the hyperparams."""
        gradient = torch.tensor(loss if math.isfinite(loss) else math.nan).tanh()
        scale = 0.1 * state.hyperparams["lr_scale"]
        trained = self._select_trained(state.params)
        changed = {
            name: (0.9 * _computable(param) - scale * gradient).to(param.dtype) for name, param in trained.items()
        }
        memory = {name: {"exp_avg": torch.zeros_like(_computable(p)) + 0.5 * gradient} for name, p in trained.items()}
        return state.replace(
            params=FrozenDict({**state.params, **changed}),
            buffers=FrozenDict({name: _next_buffer(buffer) for name, buffer in state.buffers.items()}),
            opt_state={"state": memory, "groups": {}},
        )

    def losses_of(self, loss: float) -> FrozenDict:
        """Return the losses by name where that of the reading is `loss`."""
        return FrozenDict({name: torch.tensor(multiple * loss) for name, multiple in self.losses.items()})

    def outputs_of(self, number: int, loss: float) -> Any:
        """Return the outputs of the accumulation step with this number; not finite if its loss is not."""
        shift = math.sin(number) + (math.tanh(loss) if not math.isnan(loss) else loss)
        return map_tensors(lambda tensor: _vary(tensor, number, shift), self.outputs)

    def learning_rates(self, state: TrainState) -> FrozenDict:
        """Return the learning rate of each parameter group."""
        scale = state.hyperparams["lr_scale"]
        return FrozenDict({name: 0.1 / (index + 1) * scale for index, name in enumerate(self.groups)})

    @property
    def weight_decay(self) -> FrozenDict:
        """The weight decay of each parameter group."""
        return FrozenDict(dict.fromkeys(self.groups, 0.01))

    def _select_trained(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        floats = {name: param for name, param in params.items() if param.is_floating_point() or param.is_complex()}
        return {name: param for name, param in floats.items() if name not in self.frozen}

    def _synthetic_forward(self, state: TrainState, batch: tuple[Tensor, Tensor]) -> tuple[Mapping[str, Tensor], Any]:
        """Return losses and scores of two classes, which depend on all parameters."""
        inputs, targets = batch
        shift = sum((param.float().mean() for param in self._select_trained(state.params).values()), torch.tensor(0.0))
        outputs = inputs * (1 + shift) + shift
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        return {name: multiple * loss for name, multiple in self.losses.items()}, outputs


def _read_weights(model: Any) -> dict[str, Any]:
    """Return copies of the parameters and buffers of a model, and the names of the parameters that are frozen."""
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(f"model: give a torch.nn.Module or its parameters by name, not {type(model).__name__}")
    weights = model if isinstance(model, Mapping) else dict(chain(model.named_parameters(), model.named_buffers()))
    for name, tensor in weights.items():
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise TypeError(
                f"model: {name} has no values yet; call a lazy module with a batch, or leave the meta device"
            )
    if isinstance(model, nn.Module):
        state = TrainState.from_module(model)
        params, buffers, tied_names = dict(state.params), dict(state.buffers), state.tied_names
        originals = zip(params, model.parameters(), strict=True)
        frozen = frozenset(name for name, original in originals if not original.requires_grad)
    else:
        params, buffers, tied_names, frozen = dict(model), {}, FrozenDict(), frozenset[str]()
    return {"params": _copy(params), "buffers": _copy(buffers), "tied_names": tied_names, "frozen": frozen}


def _copy(weights: Mapping[str, Tensor]) -> FrozenDict:
    return FrozenDict({name: tensor.detach().clone() for name, tensor in weights.items()})


def _multiples(losses: Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(losses, Mapping):
        return {str(name): float(value) for name, value in losses.items()}
    return {name: 1 / (index + 2) for index, name in enumerate(_names("losses", losses)) if name != "total"}


def _names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) else tuple(names)
    if not found or not all(isinstance(name, str) for name in found):
        raise TypeError(f"{argument}: give names, like {argument}=('mse',), not {names!r}")
    return found


def read_datasets(data: Any) -> Mapping[str, Any]:
    """Return datasets with the batches of each `DataLoader` as a tuple: each iteration of it draws random numbers.

    Raises:
        TypeError: If there are no datasets by key, or if one can be iterated once only.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"data: give datasets by key, like data={{'val': batches}}, not {type(data).__name__}")
    for key, batches in data.items():
        if iter(batches) is batches:
            raise TypeError(f"data: {key!r} can be iterated once only; give a list of batches or a DataLoader")
    loaders = {key: batches for key, batches in data.items() if isinstance(batches, DataLoader)}
    return {**data, **{key: tuple(loader) for key, loader in loaders.items()}} if loaders else data


def _call_module(module: nn.Module, losses: tuple[str, ...]) -> Forward:
    """Return a forward that calls `module` in evaluation mode; each of its losses is its mean absolute output."""

    def forward(state: TrainState, batch: Any) -> tuple[Mapping[str, Tensor], Any]:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        with evaluation_mode(module), torch.no_grad():
            outputs = torch.func.functional_call(module, (dict(state.params), dict(state.buffers)), (inputs,))
        loss = sum((tensor.abs().float().mean() for _, tensor in tensors({"outputs": outputs})), torch.tensor(0.0))
        return dict.fromkeys(losses, loss), outputs

    return forward


def _computable(tensor: Tensor) -> Tensor:
    """Return the tensor as float32 if torch cannot compute with its dtype, which has 8 bits."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _next_buffer(buffer: Tensor) -> Tensor:
    if buffer.dtype == torch.bool:
        return buffer
    return buffer * 0.75 + 0.25 if buffer.is_floating_point() or buffer.is_complex() else buffer + 1


def _vary(tensor: Tensor, number: int, shift: float) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return (_computable(tensor) + shift).to(tensor.dtype)
    return tensor.flatten().roll(number).reshape(tensor.shape)
