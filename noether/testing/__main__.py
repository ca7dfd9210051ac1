"""`python -m noether.testing`: check every law for every shipped callback, and print how often it acted."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from noether.core.callbacks.registry import SHIPPED
from noether.core.errors import suggest
from noether.testing.acts import count_acts
from noether.testing.law_runs import record_runs
from noether.testing.shipped import LAWS, law_example

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROW = "{:26} {:15} {:>6} {:>8} {:>8}  {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each shipped callback and law: its runs, in how many calls it acted, and its effects.

    Args:
        arguments: Names of callbacks and `--examples N`; None for those of the command line.

    Returns:
        1 if a law does not hold or a callback never acted, 2 if an argument is wrong, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m noether.testing", description=__doc__)
    parser.add_argument("names", nargs="*", help="shipped callbacks; all by default")
    parser.add_argument("--examples", type=int, default=20, metavar="N", help="runs to try for each law (20)")
    chosen = parser.parse_args(arguments)
    unknown = next((name for name in chosen.names if name not in SHIPPED), None)
    if unknown is not None:
        parser.error(f"no shipped callback is named {unknown!r}{suggest(unknown, SHIPPED)}")
    if chosen.examples < 1:
        parser.error(f"--examples: {chosen.examples} is not a whole number of at least 1")
    sys.stdout.write(_ROW.format("callback", "law", "runs", "acts", "effects", "result") + "\n")
    failures = [
        (name, law, failure)
        for name in chosen.names or SHIPPED
        for law in LAWS
        if (failure := _print_row(name, law, chosen.examples)) is not None
    ]
    for name, law, failure in failures:
        sys.stdout.write(f"\n{name}, {law}: {type(failure).__name__}: {failure}\n")
    return 1 if failures else 0


def _print_row(name: str, law: str, examples: int) -> Exception | None:
    """Check one law for one callback and print the line; return the error if the law does not hold."""
    tested, failure = law_example(name, "every_n_updates", 2), None
    with record_runs() as tried:
        try:
            LAWS[law](tested, examples)
        except Exception as error:  # noqa: BLE001  # any error of a callback is a row
            failure = error
    kind = SHIPPED[name].load()
    parts = [] if failure else [p for p in count_acts(tested, tried, every=True) if isinstance(p.callback, kind)]
    acts, effects = sum(part.acts for part in parts), sum(part.effects for part in parts)
    result = "fails" if failure else "holds"
    sys.stdout.write(_ROW.format(name, law, len(tried), acts, effects, result) + "\n")
    sys.stdout.flush()
    return failure


if __name__ == "__main__":
    sys.exit(main())
