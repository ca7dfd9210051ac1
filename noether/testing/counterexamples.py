"""Tries a law on many random examples and reports the simplest one that breaks it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import tuples

from noether.core.errors import NoetherError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

_PHASES: Final = (Phase.generate, Phase.shrink)


class LawError(NoetherError, AssertionError):
    """A callback or a schedule does not obey a law."""


def assert_law(law: Callable[..., object], *strategies: SearchStrategy[Any], examples: int) -> None:
    """Raise the error of the simplest example for which `law` raises; return if it holds for every example.

    Args:
        law: Called with one value from each strategy; raises if they break it.
        strategies: Strategies of its arguments.
        examples: Largest number of examples to try, >= 1.

    Raises:
        Exception: The error of `law` for the simplest example found.
    """

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=_PHASES,
        suppress_health_check=list(HealthCheck),
    )
    @given(tuples(*strategies))
    def try_examples(values: tuple[Any, ...]) -> None:
        law(*values)

    try:
        try_examples()
    except Flaky as error:
        # A callback that keeps memory outside of the state behaves differently when the same run is tried again.
        raise next((each for each in getattr(error, "exceptions", ()) if isinstance(each, LawError)), error) from None
