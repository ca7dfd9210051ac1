"""Every shipped callback satisfies every law of `noether.testing`."""

import pytest

from noether.core.callbacks.registry import SHIPPED
from noether.testing.shipped import LAWS, law_example

INTERVALS = [("every_n_epochs", 1), ("every_n_updates", 2), ("every_n_samples", 3)]


def cases():
    """Return each callback with each law and interval; one interval of three is not slow, another for the next law."""
    return [
        pytest.param(
            *(name, interval, n, law),
            id=f"{name}-{interval}-{n}-{law}",
            marks=() if place == (first + second) % len(INTERVALS) else pytest.mark.slow,
        )
        for first, name in enumerate(SHIPPED)
        for second, law in enumerate(LAWS)
        for place, (interval, n) in enumerate(INTERVALS)
    ]


@pytest.mark.parametrize(("name", "interval", "n", "law"), cases())
def test_every_callback_obeys_every_law(name, interval, n, law):
    LAWS[law](law_example(name, interval, n), 6)
