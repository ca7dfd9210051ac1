"""Every shipped callback satisfies every law of `noether.testing`."""

from itertools import product

import pytest
from law_examples import rotate

from noether.core.callbacks.registry import SHIPPED
from noether.testing.shipped import LAWS, law_example

INTERVALS = [("every_n_epochs", 1), ("every_n_updates", 2), ("every_n_samples", 3)]


@pytest.mark.parametrize(("name", "law", "interval", "n"), rotate(product(SHIPPED, LAWS), INTERVALS))
def test_every_callback_obeys_every_law(name, law, interval, n):
    LAWS[law](law_example(name, interval, n), 6)
