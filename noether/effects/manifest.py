"""What a checkpoint is made of, and which checkpoints stay."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from attrs import field, frozen
from cattrs.preconf.json import make_converter

from noether.core.iteration import TrainingIteration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT: Final = 1
_CONVERTER: Final = make_converter(forbid_extra_keys=True)
_CONVERTER.register_unstructure_hook(TrainingIteration, str)
_CONVERTER.register_structure_hook(TrainingIteration, lambda text, _: TrainingIteration.parse(text))


@frozen(kw_only=True)
class Part:
    """One file of a checkpoint."""

    size_bytes: int
    sha256: str


@frozen(kw_only=True)
class Manifest:
    """What a checkpoint is made of.

    Args:
        tag: Name of its directory.
        run_id: Run that wrote it.
        segment: How many times the run had been started when it was written, >= 1.
        parent: Tag of the checkpoint from which that segment went on, or None.
        iteration: Where it was taken.
        event: Name of the event at which it was taken.
        number: The n in a tag like `TAG.n`, given where `TAG` was taken already; 1 without one.
        parts: Its files.
        weights_of: Whose weights it holds, such as `ema=0.999`; None stands for those in training.
        models: Names of the sub-modules whose weights it holds; empty stands for all.
        retention: By name of who asked for it, how many of the newest stay; None stands for all.
        format: Version of the layout.
    """

    tag: str
    run_id: str
    segment: int
    parent: str | None
    iteration: TrainingIteration
    event: str
    parts: dict[str, Part]
    number: int = 1
    weights_of: str | None = None
    models: tuple[str, ...] = ()
    retention: dict[str, int | None]
    format: int = field(default=FORMAT)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """What checkpoints are ordered by: segment, then counters, then number among equals."""
        return self.segment, self.iteration.update, self.iteration.epoch, self.number

    @property
    def resumable(self) -> bool:
        """Whether it holds all weights, optimizer and state."""
        whole = {"weights.safetensors", "state.json"} <= set(self.parts)
        return whole and not self.models and self.weights_of is None

    def dumps(self) -> str:
        """Return the manifest as JSON text."""
        return json.dumps(_CONVERTER.unstructure(self), indent=1)

    @classmethod
    def loads(cls, text: str) -> Manifest:
        """Return the manifest in JSON text.

        Raises:
            Exception: If it is not one; cattrs says why.
        """
        return _CONVERTER.loads(text, cls)


def superfluous(manifests: Iterable[Manifest], pointers: Mapping[str, str], parent: str | None) -> tuple[str, ...]:
    """Return the tags of the checkpoints that nobody keeps, oldest first.

    Args:
        manifests: All checkpoints of the run.
        pointers: Tag by name of pointer; what a pointer names stays.
        parent: The checkpoint that was resumed from, which stays.

    Example:
        >>> def taken(update):
        ...     return Manifest(tag=f"U{update}", run_id="r", segment=1, parent=None, event="AfterUpdate", parts={},
        ...                     iteration=TrainingIteration(update=update), retention={"CheckpointCallback": 1})
        >>> superfluous([taken(1), taken(2), taken(3)], {"best": "U1"}, parent=None)
        ('U2',)
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.order)
    kept = {*pointers.values(), parent}
    newest: dict[str, int] = {}
    for manifest in reversed(ordered):
        for owner, keep in manifest.retention.items():
            newest[owner] = newest.get(owner, 0) + 1
            if keep is None or newest[owner] <= keep:
                kept.add(manifest.tag)
    return tuple(manifest.tag for manifest in ordered if manifest.tag not in kept)
