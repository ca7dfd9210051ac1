"""What `pytest` checks of the longest laws, and what `pytest -m slow`: a part, or all, of examples or of a matrix."""

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


def slow_except(default, values):
    """Mark all values of a parameter as slow, except those in `default`, which differ most.

    Returns:
        What `pytest.mark.parametrize` takes.
    """
    if missing := set(default) - set(values):
        raise ValueError(f"default: {sorted(missing)} are not among the values")
    return [pytest.param(value, marks=() if value in default else pytest.mark.slow) for value in values]


def rotate(rows, choices):
    """Pair each row of arguments with each choice: of a row one is not slow, and the next one of the next row.

    Args:
        rows: Tuples of the first arguments of a test.
        choices: Tuples of the other arguments.

    Returns:
        What `pytest.mark.parametrize` takes.
    """
    return [
        pytest.param(*row, *choice, marks=() if place == number % len(choices) else pytest.mark.slow)
        for number, row in enumerate(rows)
        for place, choice in enumerate(choices)
    ]
