"""How a law is put to the test: many examples, and of those that break it the simplest one is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import tuples

from noether.core.errors import NoetherError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy


class LawError(NoetherError, AssertionError):
    """A callback or a schedule does not obey a law."""


def assert_law(law: Callable[..., object], *drawn: SearchStrategy[Any], examples: int) -> None:
    """Return if `law` raises for none of the examples that are drawn.

    Args:
        law: Called with one value of each strategy; raises where it does not hold.
        drawn: What it is about.
        examples: How many to try at most, >= 1.

    Raises:
        Exception: What `law` raises for the simplest example that was found.
    """

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(tuples(*drawn))
    def prove(values: tuple[Any, ...]) -> None:
        law(*values)

    try:
        prove()
    except Flaky as error:
        # Whoever remembers outside of the state does otherwise when the same run is tried again.
        raise next((each for each in getattr(error, "exceptions", ()) if isinstance(each, LawError)), error) from None
