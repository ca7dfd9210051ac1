"""What tests of callbacks and schedules are written with; `strategies` needs hypothesis."""

from noether.testing.compare import same

__all__ = ["same"]
