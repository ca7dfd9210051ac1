"""Metric keys: patterns of them, and whether higher or lower values of a metric are better."""

from __future__ import annotations

import re
from typing import Final, Literal

from noether.core.errors import Problem, check_choice, suggest

Mode = Literal["higher", "lower"]
MODES: Final = ("higher", "lower")

HIGHER: Final = frozenset({"accuracy", "f1", "auc", "iou", "psnr", "r2"})
LOWER: Final = frozenset({"loss", "error", "rmse", "mse", "mae", "perplexity"})


def direction_of(metric_key: str) -> Mode | None:
    """Return the direction that the words of a metric key imply; None if they imply neither or both.

    Example:
        >>> direction_of("val/accuracy@5"), direction_of("loss/val/total"), direction_of("val/dice")
        ('higher', 'lower', None)
    """
    words = set(_words(metric_key))
    if bool(words & HIGHER) == bool(words & LOWER):
        return None
    return "higher" if words & HIGHER else "lower"


def _words(metric_key: str) -> list[str]:
    return re.split(r"[\W_]+", metric_key.lower())


def mode_problem(metric_key: str, mode: str | None) -> Problem | None:
    """Return the problem of `mode`, or of its absence for this key, or None."""
    if mode is not None:
        return check_choice("mode", mode, MODES)
    if direction_of(metric_key) is None:
        like = next(filter(None, (suggest(word, HIGHER | LOWER) for word in _words(metric_key))), "")
        return Problem(
            "mode", f"the key {metric_key!r} does not say whether higher or lower is better; give mode{like}"
        )
    return None


def keys_overlap(pattern: str, key: str) -> bool:
    """Return whether a pattern and a key, or two patterns, can match the same key; `*` does not match a `/`.

    Example:
        >>> keys_overlap("loss/val/*", "loss/val/total"), keys_overlap("loss/val/*", "loss/val/total/ema=0.9")
        (True, False)
    """
    patterns, others = pattern.split("/"), key.split("/")
    return len(patterns) == len(others) and all(map(_parts_overlap, patterns, others))


def patterns_containing(part: str) -> tuple[str, ...]:
    """Return the key patterns for names that contain `part` and at most one `/`.

    Example:
        >>> patterns_containing("loss")
        ('*loss*', '*/*loss*', '*loss*/*')
    """
    return (f"*{part}*", f"*/*{part}*", f"*{part}*/*")


def _parts_overlap(a: str, b: str) -> bool:
    """Return whether some text matches both patterns, in which `*` stands for any text."""
    if not a or not b:
        return set(a + b) <= {"*"}
    if a[0] == "*":
        return _parts_overlap(a[1:], b) or _parts_overlap(a, b[1:])
    if b[0] == "*":
        return _parts_overlap(b, a)
    return a[0] == b[0] and _parts_overlap(a[1:], b[1:])
