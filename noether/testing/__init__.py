"""What tests of callbacks and schedules are written with; `strategies` needs hypothesis."""

from noether.testing.compare import same
from noether.testing.purity import ImpureError, check_pure

__all__ = ["ImpureError", "check_pure", "same"]
