"""Changes that updates make to a model and that no checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.tensors.modes import ModeWatch
from noether.session.hidden_state import ModelWatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


@final
class ModelChanges:
    """Describes, once each, attributes of a model that updates change, and modes that change from epoch to epoch.

    Args:
        model: The model, before its first update.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2).eval(), nn.Linear(2, 1))
        >>> changes = ModelChanges(model)
        >>> changes.describe(epoch=0)
        []
        >>> _ = model.train()
        >>> [change.partition(",")[0] for change in changes.describe(epoch=1)]
        ['the mode of 0 changed since epoch 0']
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes, self._modes = ModelWatch(model), ModeWatch(model)

    def describe(self, epoch: int) -> Sequence[str]:
        """Return what has changed, and what to write instead; called after each update.

        Args:
            epoch: The epoch of the update.
        """
        if self._attributes.is_done and self._modes.epoch == epoch:  # at nearly all updates
            return ()
        found = (self._attributes.describe_changes(), self._modes.describe_changes(epoch))
        return [change for change in found if change is not None]
