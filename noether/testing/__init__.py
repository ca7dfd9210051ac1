"""Property tests for callbacks and schedules: one function for each law, and functions that drive and compare runs.

A line here may touch whatever its test needs: temporary files, clocks and generators that it watches. Needs hypothesis:
`pip install 'noether[testing]'`. Strategies are in `noether.testing.strategies`.
"""

from noether.testing.agreement import check_rank_agreement
from noether.testing.comparison import assert_same, differences, same
from noether.testing.counterexamples import LawError
from noether.testing.independence import check_independent
from noether.testing.laws import check_composition, check_resumable
from noether.testing.models import ModelArguments
from noether.testing.purity import ImpureError, call_purely, check_pure
from noether.testing.schedule_laws import check_schedule
from noether.testing.stretches import check_stretches
from noether.testing.traces import DrivenRun, Reading, Trace, drive, effects_of

__all__ = [
    "DrivenRun",
    "ImpureError",
    "LawError",
    "ModelArguments",
    "Reading",
    "Trace",
    "assert_same",
    "call_purely",
    "check_composition",
    "check_independent",
    "check_pure",
    "check_rank_agreement",
    "check_resumable",
    "check_schedule",
    "check_stretches",
    "differences",
    "drive",
    "effects_of",
    "same",
]
