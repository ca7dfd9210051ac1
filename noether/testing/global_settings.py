"""The settings of the process that a callback could change, and the states of the global random generators."""

from __future__ import annotations

import decimal
import gc
import os
import random
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DECIMAL: Final = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")
"""Settings of a context of `decimal`; its flags are no setting, as each inexact division sets one."""


class _Setting(NamedTuple):
    """How to read and to write a setting."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


def _of(owner: Any, name: str) -> _Setting:
    return _Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _list(values: list[Any]) -> _Setting:
    return _Setting(values.copy, lambda value: values.__setitem__(slice(None), value))


def _write_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _write_decimal(values: tuple[Any, ...]) -> None:
    for name, value in zip(_DECIMAL, values, strict=True):
        setattr(decimal.getcontext(), name, value)


def _write_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


_SETTINGS: Final[dict[str, _Setting]] = {
    "os.environ": _Setting(lambda: dict(os.environ), _write_environment),
    "the working directory": _Setting(os.getcwd, os.chdir),
    "sys.path": _list(sys.path),
    "sys.stdout": _of(sys, "stdout"),
    "sys.stderr": _of(sys, "stderr"),
    "sys.excepthook": _of(sys, "excepthook"),
    "the recursion limit": _Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "warnings.filters": _Setting(lambda: list(warnings.filters), lambda value: setattr(warnings, "filters", value)),
    "numpy.geterr()": _Setting(np.geterr, lambda value: np.seterr(**value)),
    "numpy.get_printoptions()": _Setting(np.get_printoptions, lambda value: np.set_printoptions(**value)),
    "the context of decimal": _Setting(
        lambda: tuple(getattr(decimal.getcontext(), name) for name in _DECIMAL), _write_decimal
    ),
    "gc.isenabled()": _Setting(gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
    "torch.get_default_device()": _Setting(torch.get_default_device, _write_device),
    "torch.get_default_dtype()": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch.is_grad_enabled()": _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.is_anomaly_enabled()": _Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch.is_autocast_enabled('cpu')": _Setting(
        lambda: torch.is_autocast_enabled("cpu"), lambda value: torch.set_autocast_enabled("cpu", value)
    ),
    "torch.get_num_threads()": _Setting(torch.get_num_threads, torch.set_num_threads),
    "torch.get_float32_matmul_precision()": _Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "torch.are_deterministic_algorithms_enabled()": _Setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    ),
    "torch.backends.cudnn.benchmark": _of(torch.backends.cudnn, "benchmark"),
    "torch.backends.cudnn.deterministic": _of(torch.backends.cudnn, "deterministic"),
}
GENERATORS: Final = frozenset({"random", "numpy.random", "torch.random"})
"""The entries of `global_settings` that are states of random generators."""


def global_settings() -> dict[str, Any]:
    """Return the states of the global generators, and the settings of the process that a callback could change."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002  # the global generator is the one to watch
    return {
        "random": random.getstate(),
        "numpy.random": (numpy_state["state"]["key"].tobytes(), numpy_state["state"]["pos"]),
        "torch.random": torch.get_rng_state().numpy().tobytes(),
        **{name: setting.read() for name, setting in _SETTINGS.items()},
    }


@contextmanager
def keep_settings() -> Iterator[None]:
    """Restore the global settings and generators at the end; a run that a law refuses has changed some of them.

    The generators get states that no seed sets, so that setting a seed shows.
    """
    settings = {name: setting.read() for name, setting in _SETTINGS.items()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # the global generator
    random.random(), np.random.random_sample(), torch.rand(())  # noqa: NPY002, S311  # as above
    try:
        yield
    finally:
        for name, setting in _SETTINGS.items():
            if setting.read() != settings[name]:
                setting.write(settings[name])
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002  # as above
        torch.set_rng_state(states[2])
