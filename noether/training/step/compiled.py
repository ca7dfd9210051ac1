"""A step that makes its updates in compiled graphs where it can, and calls the plain step elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, final

from torch import Tensor

from noether.core.tensors.batch import SizedBatches
from noether.core.tensors.live.extra_state import modules_with_extra_state
from noether.core.tensors.module import names_in_model
from noether.core.tensors.torch_internals import NewGraphError, RefusedGraphError
from noether.core.tensors.tree import FrozenDict
from noether.training.step import kernels
from noether.training.step.accumulation import drop_empty
from noether.training.step.compiled_update import CompiledUpdate
from noether.training.step.model_tensors import ModelTensors
from noether.training.step.update_event import make_event
from noether.training.value_schedules import Constant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.core.event import AfterUpdate
    from noether.core.state import TrainState
    from noether.training.step.compiled_update import UpdateResult
    from noether.training.step.step import Observer, Step

_LOGGER: Final = logging.getLogger(__name__)
_WORDS: Final = 60
"""Largest number of words of a compiler's message to log; some messages take pages."""
_MAX_GRAPHS: Final = 8
"""Largest number of graphs, as torch has it; each takes seconds to compile."""
_MAX_WITHOUT_REUSE: Final = 5
"""Largest number of graphs as long as each has made one update only: probably, nearly all batches have other shapes."""
_MAX_IN_A_ROW: Final = 4
"""Number of updates in a row that may need another graph though their shapes have one already."""


@final
class CompiledStep:
    """A step that makes its updates in one compiled graph; where it cannot, it warns once and calls the plain step.

    The plain step makes the first update, because the optimizer's class makes the first memory. Compiling changes
    nothing but random generators, which each update seeds, so nothing is lost where it fails.

    Args:
        eager: The plain step.
    """

    def __init__(self, eager: Step) -> None:
        self.eager, self.model = eager, eager.model
        self._compiled: CompiledUpdate | None = None
        self._is_disabled = False
        self._was_refused = False
        self._shapes: set[Any] = set()
        self._graphs = 0
        self._graphs_in_a_row = 0
        self._has_reused = False

    def __call__(
        self, state: TrainState, batches: Sequence[Any], observe: Observer | None = None
    ) -> tuple[TrainState, AfterUpdate]:
        """Return the state after one update and the event, as `Step` does up to the last bits."""
        eager = self.eager
        batches, samples = drop_empty(batches, eager.batch_size)
        update = None if self._is_disabled or not batches else self._find_update(state, observed=observe is not None)
        result = None if update is None else self._make_update(update, state, batches, samples)
        if result is None:
            return eager(state, SizedBatches(batches, samples), observe)  # it must not count them again
        return result

    def _make_update(
        self, update: CompiledUpdate, state: TrainState, batches: Sequence[Any], samples: tuple[int, ...]
    ) -> tuple[TrainState, AfterUpdate] | None:
        """Return the state after the update and the event, or None if the plain step has to make it."""
        eager = self.eager
        settings = eager.settings_for(state)
        model_tensors = ModelTensors.of(state, eager.model, eager.optimizer) if eager.donate else None
        if model_tensors is None:
            params, opt_state = _copy(state.params), _copy(state.opt_state)
        else:
            model_tensors.unshare()
            params, opt_state = model_tensors.params, model_tensors.opt_state

        def begin() -> None:
            if model_tensors is not None:
                model_tensors.take_from(state)

        buffers = eager.buffers.collect(state)
        result = self._run(update, state, (params, opt_state, buffers, batches, samples, settings, begin))
        if result is None:
            return None
        fields = eager.buffers.split(result.buffers)
        if eager.donate:
            model_tensors = model_tensors or ModelTensors(
                eager.model, eager.optimizer.trainable(params), params, opt_state
            )
            state = model_tensors.donate_to(state, fields)
        else:
            state = state.replace(params=params, opt_state=opt_state, **fields)
        gradients = None if result.gradients is None else FrozenDict(result.gradients)
        readings = {"grad_norm": result.grad_norm, "gradients": gradients, "finite": result.finite}
        return state, make_event(FrozenDict(result.losses), result.outputs, samples, settings, **readings)

    def _find_update(self, state: TrainState, *, observed: bool) -> CompiledUpdate | None:
        """Return the compiled update, or None if the plain step has to make the next update."""
        optimizer = self.eager.optimizer
        if (
            self._compiled is not None
            and not observed
            and ModelTensors.of(state, self.eager.model, optimizer) is not None
        ):
            return self._compiled
        reason = "a callback listens to accumulation steps" if observed else _obstacle(self.eager)
        trained = {name: state.params[name] for name in optimizer.trainable(state.params)}
        if reason is None and not optimizer.can_write(trained, state.opt_state, state.params):
            if not state.opt_state.get("state"):
                return None  # the first update: the optimizer's class makes the first memory
            reason = "the optimizer has no memory of a parameter that got no gradient"
        if reason is not None:
            self._disable(reason)
            return None
        self._compiled = self._compiled or CompiledUpdate(self.eager, state)
        return self._compiled

    def _run(self, update: CompiledUpdate, state: TrainState, arguments: tuple[Any, ...]) -> UpdateResult | None:
        """Return the result of an update, or None if the plain step has to make it; then nothing is changed."""
        *_, batches, samples, _, _ = arguments
        is_new, is_full = False, self._graphs >= (_MAX_GRAPHS if self._has_reused else _MAX_WITHOUT_REUSE)
        if is_full and (_shapes(batches), samples) not in self._shapes:
            self._disable(
                f"the batches have more than {self._graphs} shapes, and each takes a graph: pad them to a few"
            )
        while not self._is_disabled:
            self.eager.prepare(state)  # the compiler draws random numbers
            try:
                result = update(*arguments)
            except NewGraphError:
                is_new = True
                self._count_graph((_shapes(batches), samples))
            except RefusedGraphError as error:
                if self._was_refused:
                    self._disable(str(error))
                self._was_refused = True  # the first call may fill a cache: try again at the next update
                break
            else:
                if not is_new:
                    self._has_reused, self._graphs_in_a_row = True, 0
                return result
        return None

    def _count_graph(self, shapes: Any) -> None:
        """Count a graph, and stop compiling if updates need one after another though their shapes have one already."""
        self._graphs += 1
        self._graphs_in_a_row = self._graphs_in_a_row + 1 if shapes in self._shapes else 0
        self._shapes.add(shapes)
        if self._graphs_in_a_row >= _MAX_IN_A_ROW:
            self._disable(
                f"{_MAX_IN_A_ROW} updates in a row had to be compiled again, because a Python value that forward or "
                "the loss reads changes: make it a tensor, such as a buffer of the model"
            )

    def _disable(self, reason: str) -> None:
        self._is_disabled = True
        short = " ".join(reason.split()[:_WORDS])
        _LOGGER.warning("updates are not compiled: %s; training continues as with trainer.compile: false", short)


def _obstacle(step: Step) -> str | None:
    """Return why no update of `step` can be compiled as a whole, or None."""
    if not kernels.has_kernel(step.optimizer.optimizer):
        return f"torch.compile can trace Adam, AdamW and SGD, not {step.optimizer.optimizer.__name__}"
    if step.loss_scaling is not None:
        return "precision: float16 decides in the middle of an update whether gradients overflowed"
    if step.nonfinite != "apply":
        return f"nonfinite: {step.nonfinite} decides in the middle of an update"
    if any(not isinstance(schedule, Constant) for schedule in step.weight_decay.values()):
        return "the weight decay has a schedule"
    if names_in_model(step.model):
        return "a module of the model is compiled already, or wrapped"
    for path, module in modules_with_extra_state(step.model):
        return f"{path or 'the model'} ({type(module).__name__}) keeps extra state, which a graph would not change"
    return None


def _copy(tree: Any) -> Any:
    """Return a copy of a tree, with cloned tensors in plain dicts, so that an update can write to it."""
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, Tensor) else tree


def _shapes(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype
    parts = batch if isinstance(batch, (list, tuple)) else batch.values() if isinstance(batch, Mapping) else ()
    return tuple(map(_shapes, parts))
