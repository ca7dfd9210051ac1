"""Random numbers as a function of their purpose, so that a checkpoint need not hold the state of a generator."""

from __future__ import annotations

import hashlib
import random
import struct
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


GENERATORS: Final = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Types of generators that an object may hold, beside the global ones."""

_BLOCK: Final = 64
_HAS_CUDA: Final[bool] = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]  # torch leaves it untyped
_HAS_MPS: Final = torch.backends.mps.is_available()
# The global generators themselves: every update seeds them, and by `np.random.seed` and `random.seed` it would take a
# third longer in a loop over the same batch, and in training, where caches are cold, twice as long.
_NUMPY: Final[np.random.RandomState] = np.random.rand.__self__  # type: ignore[attr-defined]  # a bound method
_PYTHON: Final[random.Random] = random.random.__self__  # type: ignore[attr-defined]  # likewise
_seed_python: Final = super(random.Random, _PYTHON).seed
"""Does what `random.seed` does with a number, but keeps the second of a pair of numbers of `random.gauss`."""


def derive(seed: int, purpose: str, *counts: int) -> int:
    """Return a seed for one purpose of a run, in [0, 2**63).

    Args:
        seed: The run's seed.
        purpose: Names the use of the numbers; different purposes have unrelated seeds.
        counts: Index of the use, such as epoch and sample.

    Example:
        >>> derive(0, "order", 1) == derive(0, "order", 1), derive(0, "order", 1) == derive(0, "order", 2)
        (True, False)
    """
    text = struct.pack(f"<{len(counts) + 1}q", seed, *counts) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def update_seed(seed: int, update: int, rank: int) -> int:
    """Return `derive(seed, "update", update, rank)`.

    Example:
        >>> update_seed(3, 100, 0) == derive(3, "update", 100, 0)
        True
    """
    return derive_in_order(seed, "update", update, after=(rank,))


def derive_in_order(
    seed: int, purpose: str, count: int, before: tuple[int, ...] = (), after: tuple[int, ...] = ()
) -> int:
    """Return `derive(seed, purpose, *before, count, *after)`, for calls of which each has the next `count`.

    It derives the seeds of a block of counts at once: in a row they take less time.

    Example:
        >>> derive_in_order(3, "step", 100, before=(2,)) == derive(3, "step", 2, 100)
        True
    """
    return _derive_block(seed, purpose, before, count // _BLOCK, after)[count % _BLOCK]


@lru_cache(maxsize=16)
def _derive_block(seed: int, purpose: str, before: tuple[int, ...], block: int, after: tuple[int, ...]) -> list[int]:
    first = block * _BLOCK
    return [derive(seed, purpose, *before, count, *after) for count in range(first, first + _BLOCK)]


def seed_torch(seed: int) -> None:
    """Seed torch's generators of the CPU and, where it is in use, of the accelerator."""
    # The generator itself: torch.manual_seed takes a hundred times as long, and this runs at every update.
    torch.default_generator.manual_seed(seed)
    if _HAS_CUDA and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.cuda.manual_seed_all(seed)
    if _HAS_MPS:
        torch.mps.manual_seed(seed)


def seed_all(seed: int, generators: Sequence[Any] = ()) -> None:
    """Seed the global generators of torch, numpy and Python, and other generators, each with numbers of its own.

    Args:
        seed: The seed, in [0, 2**63).
        generators: Objects, each one of `GENERATORS`.
    """
    seed_torch(seed)
    try:
        _NUMPY.seed(seed & 0xFFFFFFFF)
    except TypeError:  # a user's `np.random.set_bit_generator`
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  # numpy's global functions draw from it
    _seed_python(seed)
    _PYTHON.gauss_next = None  # type: ignore[attr-defined]  # typed as private
    for index, generator in enumerate(generators):
        seed_generator(generator, derive(seed, "generator", index))


def seed_generator(generator: Any, seed: int) -> None:
    """Seed a generator object, one of `GENERATORS`."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed & 0xFFFFFFFF)


@contextmanager
def preserve_generators(*generators: Any) -> Iterator[None]:
    """Restore the global generators of torch, numpy and Python, and `generators`, at the end of the block.

    Example:
        >>> seed_all(0)
        >>> with preserve_generators():
        ...     first = torch.rand(1)
        >>> torch.equal(torch.rand(1), first)
        True
    """
    cpu, numbers, python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  # as above
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch has no type here
    mps = torch.mps.get_rng_state() if _HAS_MPS else None
    states = [_state_of(generator) for generator in generators]
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(numbers)  # noqa: NPY002  # as above
        random.setstate(python)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        for generator, state in zip(generators, states, strict=True):
            _restore(generator, state)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
