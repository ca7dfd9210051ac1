"""The scheduled settings of an optimizer: learning rate and weight decay of an update, by parameter group."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.training.value_schedules import ValueSchedule


class UpdateSettings(NamedTuple):
    """The scheduled settings of one update.

    Args:
        by_group: Settings by group, as optimizers take them: `{"default": {"lr": 0.1, "weight_decay": 0.01}}`.
        lr: Learning rate by group.
        weight_decay: Weight decay by group; empty for an optimizer that has none.
    """

    by_group: Mapping[str, Mapping[str, float]]
    lr: Mapping[str, float]
    weight_decay: Mapping[str, float]


@final
class SettingsSchedule:
    """Computes the settings of an update; the same object as for the update before, if all values are equal.

    Args:
        lr: Learning rate by group, as a function of the number of completed updates.
        weight_decay: Weight decay by group, likewise; empty for an optimizer that has none.

    Example:
        >>> schedule = SettingsSchedule({"default": lambda position: 0.5 if position < 2 else 0.25}, {})
        >>> schedule(0, 1.0).by_group, schedule(0, 1.0) is schedule(1, 1.0)
        ({'default': {'lr': 0.5}}, True)
        >>> schedule(2, 0.5).lr
        FrozenDict({'default': 0.125})
    """

    def __init__(self, lr: Mapping[str, ValueSchedule], weight_decay: Mapping[str, ValueSchedule]) -> None:
        self._lr, self._weight_decay = lr, weight_decay
        # Values, and the settings made of them; threads replace both at once.
        self._last: tuple[tuple[list[float], list[float]], UpdateSettings | None] = ([], []), None

    def __call__(self, position: int, lr_scale: float) -> UpdateSettings:
        """Return the settings of the update after `position` completed ones.

        Args:
            position: Number of completed updates.
            lr_scale: Multiplies the learning rates.
        """
        lr = [schedule(position) * lr_scale for schedule in self._lr.values()]
        weight_decay = [schedule(position) for schedule in self._weight_decay.values()]
        values, settings = self._last
        if settings is None or values != (lr, weight_decay):
            settings = self._make_settings(lr, weight_decay)
            self._last = (lr, weight_decay), settings
        return settings

    def _make_settings(self, lr_values: list[float], weight_decay_values: list[float]) -> UpdateSettings:
        lr = FrozenDict(zip(self._lr, lr_values, strict=True))
        weight_decay = FrozenDict(zip(self._weight_decay, weight_decay_values, strict=True))
        by_group = {group: {"lr": value} for group, value in lr.items()}
        for group, value in weight_decay.items():
            by_group[group]["weight_decay"] = value
        return UpdateSettings(by_group, lr, weight_decay)
