"""Every shipped callback satisfies every law of `noether.testing`."""

import pytest

from noether.core.callbacks.registry import SHIPPED
from noether.testing.shipped import LAWS, law_example


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("interval", "n"), [("every_n_epochs", 1), ("every_n_updates", 2), ("every_n_samples", 3)])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_callback_obeys_every_law(name, interval, n, law):
    LAWS[law](law_example(name, interval, n), 6)
