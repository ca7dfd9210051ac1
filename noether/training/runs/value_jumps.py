"""Jumps of the learning rate and the weight decay where a resumed run has other settings than before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.training.experiment import build_value_schedules, configured_end

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.config import Config
    from noether.core.state import TrainState
    from noether.training.experiment import Experiment


def describe_jumps(state: TrainState, old: Config, experiment: Experiment) -> Iterator[str]:
    """Yield a line for each hyperparameter whose next value differs from the one under the old configuration.

    Args:
        state: The state that the run resumes from.
        old: The configuration before it was resumed.
        experiment: The resumed run.
    """
    old_run = experiment.run.replace(end=configured_end(old))
    schedules_before = build_value_schedules(old, experiment.step.optimizer, state, old_run)
    schedules_after = (experiment.step.lr, experiment.step.weight_decay)
    position = state.iteration.update
    sections = (
        ("learning rate", "schedule", float(state.hyperparams.get("lr_scale", 1.0))),
        ("weight decay", "weight_decay_schedule", 1.0),
    )
    for (name, section, scale), before, after in zip(sections, schedules_before, schedules_after, strict=True):
        values = {group: (before[group](position), schedule(position)) for group, schedule in after.items()}
        jumps = [(group, early * scale, late * scale) for group, (early, late) in values.items() if early != late]
        if jumps:
            group, early, late = jumps[0]
            others = f", and of {len(jumps) - 1} more," if len(jumps) > 1 else ""
            of_group = "" if len(after) == 1 else f" of the group {group!r}{others}"
            line = f"the {name}{of_group} jumps from {early:.6g} to {late:.6g} at update {position + 1}"
            schedule = getattr(old.optimizer, section)
            if schedule is not None and schedule.has_length:
                length = schedule.length or old_run.final.update
                line += f"; to keep its old schedule, set optimizer.{section}.length={length}"
            yield line
