"""Sums over the micro-batches of an update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
class Sums:
    """Adds up mappings of tensors; the first is taken as it is, so that a single one keeps its bits.

    Example:
        >>> import torch
        >>> sums = Sums()
        >>> sums.add({"loss": torch.tensor(1.0)})
        >>> sums.add({"loss": torch.tensor(2.0)})
        >>> sums.values
        {'loss': tensor(3.)}
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def add(self, terms: Mapping[str, Any]) -> None:
        """Add what is not None."""
        if not self.values:
            self.values = dict(terms)
            return
        for name, term in terms.items():
            held = self.values.get(name)
            self.values[name] = held if term is None else term if held is None else held + term
