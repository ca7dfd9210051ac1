"""Compares the samples that an update trained on with those that the dataset gave for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, final

from noether.core.errors import NoetherError
from noether.session.losses import EMPTY_UPDATE

if TYPE_CHECKING:
    from noether.core.run import Run

_LOGGER: Final = logging.getLogger(__name__)
_COUNT_DIFFERS: Final = (
    "update %d trained on %d samples, and the dataset gave %d: max_samples and every_n_samples count the samples that "
    "are trained on, while the plan counts all; this is logged once"
)


class NoSamplesError(NoetherError, ValueError):
    """No batch of a whole epoch had samples."""


@final
class SampleCounts:
    """Warns once if updates have other samples than the dataset gave, and refuses an epoch of updates without any.

    They have fewer if the dataset's `collate` leaves some out, and any number if `data.batch_size` counts otherwise.

    Args:
        run: Its sizes of epochs and updates are those before samples are left out.

    Example:
        >>> from noether import Run
        >>> counts = SampleCounts(Run(updates_per_epoch=3, samples_per_epoch=10, effective_batch_size=4))
        >>> counts.check(2, samples=2)
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._empty = range(0)  # the last updates in a row without samples
        self._warned: set[str] = set()

    def check(self, update: int, samples: int) -> None:
        """Compare the samples of one update; it need not be called where they are `run.effective_batch_size`.

        Args:
            update: Number of updates completed before it.
            samples: Samples that it trained on.

        Raises:
            NoSamplesError: If it and all updates before it, as many as an epoch has, were empty.
        """
        run = self._run
        if samples == run.effective_batch_size:
            return
        if not samples:
            self._empty = range(self._empty.start if update == self._empty.stop else update, update + 1)
        if not samples and len(self._empty) >= run.updates_per_epoch:
            raise NoSamplesError(
                f"{len(self._empty)} updates in a row, a whole epoch, have no samples: check which samples `collate` "
                "of the training set leaves out"
            )
        given = run.iteration_after(update + 1).sample - run.iteration_after(update).sample
        if not samples:
            self._warn_once(EMPTY_UPDATE, update + 1)
        elif samples != given:
            self._warn_once(_COUNT_DIFFERS, update + 1, samples, given)

    def _warn_once(self, message: str, *values: int) -> None:
        if message not in self._warned and self._run.rank == 0:
            self._warned.add(message)
            _LOGGER.warning(message, *values)
