"""Parameters that a model has under several names, of which a state has the first only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from noether.config.schema import Config
    from noether.training.configured_callbacks import ConfiguredCallback


def find_tied_names(model: nn.Module) -> dict[str, str]:
    """Return the name in a state of each parameter that a model has under another name, too, by the other name.

    Example:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(3, 2), "head": torch.nn.Linear(2, 3)})
        >>> model["head"].weight = model["emb"].weight
        >>> find_tied_names(model)
        {'head.weight': 'emb.weight'}
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: names[parameter] for name, parameter in every if names[parameter] != name}


def check_chosen_modules(config: Config, callbacks: Sequence[ConfiguredCallback], tied: Mapping[str, str]) -> None:
    """Refuse callbacks for some sub-modules of a model that would leave out a tied parameter of these.

    Args:
        config: Gives the file and line of each callback.
        callbacks: The callbacks.
        tied: The name in a state of tied parameters, by their other names.

    Raises:
        ConfigError: If `model_names` or `model_paths` chooses a sub-module with a parameter whose name in a state is
            outside of the chosen ones.
    """
    for each in callbacks:
        for setting in ("model_names", "model_paths"):
            chosen = getattr(each.callback, setting, ())
            for name, stored in () if None in chosen else _find_omitted(chosen, tied):
                raise config.error(
                    (*each.path, setting),
                    f"{name!r} is tied to {stored!r}, the name that the state has for both, and {list(chosen)} leaves "
                    f"it out: add {stored.rpartition('.')[0]!r}",
                )


def _find_omitted(chosen: Sequence[str], tied: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, stored in tied.items():
        if any(name.startswith(f"{path}.") for path in chosen) and not any(
            stored.startswith(f"{path}.") for path in chosen
        ):
            yield name, stored
