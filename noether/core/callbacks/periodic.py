"""The base classes of periodic callbacks, by the path that they have in the class-based framework."""

from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.tensors.means import Mean, Sum

__all__ = ["Mean", "PeriodicCallback", "PeriodicDataIteratorCallback", "Sum"]
