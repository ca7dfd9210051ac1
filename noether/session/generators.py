"""The states of random generators that a framework's loop draws from, saved in its checkpoints and restored."""

from __future__ import annotations

import json
import random
import warnings
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch

from noether.core.effect import SaveCheckpoint
from noether.core.reducer import LOOP_MEMORY
from noether.core.tensors.tree import FrozenDict
from noether.session.errors import ResumeWarning
from noether.session.hidden_state import generators_of, generators_of_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.state import Memory, TrainState

MEMORY: Final = f"{LOOP_MEMORY}/generators"
_NOTHING: Final[Mapping[str, Tensor]] = FrozenDict()


@final
class GeneratorStates:
    """Reads and restores the states of the global generators, and of those that a model and a loader hold.

    A framework draws the order of an epoch, dropout and augmentations from them. A `Session` that has the loop itself
    needs none of this: it seeds them.

    Args:
        model: The model.
        loader: The training data; None if the framework does not show it.
        seed: A seed of the framework, which it draws where a run starts; None if it has none.
        counters: Tensors by name from which the framework derives random numbers, and which it does not save.

    Example:
        >>> states = GeneratorStates(torch.nn.Linear(2, 1), None)
        >>> saved = states.read()
        >>> first = torch.rand(3), random.random()
        >>> states.restore(saved)
        >>> torch.equal(torch.rand(3), first[0]), random.random() == first[1]
        (True, True)
    """

    def __init__(
        self, model: nn.Module, loader: Any, seed: int | None = None, counters: Mapping[str, Tensor] = _NOTHING
    ) -> None:
        self.seed, self._counters = seed, counters
        held = [*generators_of_model(model), *generators_of(loader)]
        self._held = list({id(each): each for each in held if each is not torch.default_generator}.values())

    def read(self) -> FrozenDict:
        """Return the states, as memory that a checkpoint can hold."""
        states: dict[str, Memory] = {
            "torch": torch.get_rng_state(),
            "numpy": _pack_numpy(np.random.get_state()),  # noqa: NPY002  # numpy's global functions draw from it
            "python": _pack_python(random.getstate()),
            "held": tuple(map(_read, self._held)),
            "counters": FrozenDict({name: counter.detach().clone() for name, counter in self._counters.items()}),
            "seed": self.seed,
        }
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            states["cuda"] = tuple(torch.cuda.get_rng_state_all())
        if torch.backends.mps.is_available():
            states["mps"] = torch.mps.get_rng_state()
        return FrozenDict(states)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore states that `read` returned; warn about those that this process does not have."""
        plain = unpack_states(saved)
        torch.set_rng_state(plain["torch"])
        np.random.set_state(plain["numpy"])  # noqa: NPY002  # as above
        random.setstate(plain["python"])
        for name, counter in self._counters.items():
            counter.detach().copy_(saved["counters"].get(name, counter))
        if "mps" in saved and torch.backends.mps.is_available():
            torch.mps.set_rng_state(saved["mps"].cpu())
        cuda = plain.get("cuda", [])
        if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        elif cuda:
            _warn("the checkpoint has random generators of other CUDA devices than this process has")
        if list(map(_kind_of, saved["held"])) != [_kind_of(_read(each)) for each in self._held]:
            _warn(
                f"the checkpoint has {len(saved['held'])} random generators that the model or the loader held, and now "
                f"they hold {len(self._held)}, or others"
            )
            return
        for generator, state in zip(self._held, saved["held"], strict=True):
            _restore(generator, state)

    def with_states(
        self, interpreter: Callable[[Effects, TrainState, Event], None]
    ) -> Callable[[Effects, TrainState, Event], None]:
        """Return an interpreter that adds the states to every state that is saved."""

        def interpret(effects: Effects, state: TrainState, event: Event) -> None:
            if any(isinstance(effect, SaveCheckpoint) for effect in effects):
                state = state.remember(MEMORY, self.read())
            interpreter(effects, state, event)

        return interpret


def take_states(state: TrainState) -> tuple[TrainState, Mapping[str, Any] | None]:
    """Return a loaded state without the states of generators, and these; None if it has none."""
    if MEMORY not in state.callback_states:
        return state, None
    return state.forget(MEMORY), state.memory(MEMORY)


def unpack_states(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of the global generators as torch, numpy and Python take them."""
    name, words, *rest = saved["numpy"]
    version, numbers, gauss = saved["python"]
    return {
        "torch": saved["torch"].cpu(),
        "numpy": (name, words.cpu().numpy().astype(np.uint32), *rest),
        "python": (version, tuple(numbers.tolist()), gauss),
        "cuda": [each.cpu() for each in saved.get("cuda", ())],
    }


def warn_without_states() -> None:
    """Warn that a checkpoint has no states of generators."""
    _warn("the checkpoint has no states of random generators: an earlier version of noether, or another loop, saved it")


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}: the order of a shuffling loader and dropout differ from those of the uncut run",
        ResumeWarning,
        stacklevel=4,
    )


def _pack_numpy(state: Any) -> tuple[Memory, ...]:
    name, words, *rest = state
    return (name, torch.from_numpy(words.astype(np.int64)), *rest)


def _pack_python(state: Any) -> tuple[Memory, ...]:
    version, numbers, gauss = state
    return version, torch.tensor(numbers), gauss


def _read(generator: Any) -> Memory:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _pack_python(generator.getstate())
    is_new = isinstance(generator, np.random.Generator)
    state = generator.bit_generator.state if is_new else generator.get_state(legacy=False)
    return json.dumps(state, default=np.ndarray.tolist)  # it has whole numbers of 128 bits


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, numbers, gauss = state
        generator.setstate((version, tuple(numbers.tolist()), gauss))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = json.loads(state)
    else:
        generator.set_state(json.loads(state))


def _kind_of(state: Any) -> str:
    """Return which kind of generator a state is of."""
    return json.loads(state)["bit_generator"] if isinstance(state, str) else type(state).__name__
