"""How many examples a law over training runs has: a part of them by default, all of them with `pytest -m slow`."""

import inspect

import pytest
from hypothesis import settings

_run = {"is_exhaustive": False}


def select_examples(mark_expression):
    """Let the laws have all their examples unless `-m` excludes slow tests, as it does by default."""
    _run["is_exhaustive"] = "not slow" not in mark_expression


def examples(full, *, quick, **options):
    """Decorate a law that takes seconds: `quick` examples by default, and `full` examples as a slow test.

    Args:
        full: The number of examples of `pytest -m slow`.
        quick: The number of examples of `pytest`.
        **options: Other arguments of `hypothesis.settings`.

    Returns:
        A decorator of a law, or of a state machine.
    """
    if not 5 <= quick < full:
        raise ValueError(f"quick: {quick} is not a number of examples from 5 to {full - 1}, fewer than the law has")

    def decorate(law):
        law = settings(max_examples=full if _run["is_exhaustive"] else quick, **options)(law)
        if _run["is_exhaustive"]:
            pytest.mark.slow(law.TestCase if inspect.isclass(law) else law)
        return law

    return decorate
