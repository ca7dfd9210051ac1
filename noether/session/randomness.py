"""Random numbers as a function of what they are for, so that nothing has to be saved or restored."""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np
import torch


def derive(seed: int, purpose: str, *counts: int) -> int:
    """Return a seed for one purpose of a run, in [0, 2**63).

    Args:
        seed: The run's seed.
        purpose: What the numbers are for; different purposes have unrelated seeds.
        counts: Which of them, such as epoch and index.

    Example:
        >>> derive(0, "order", 1) == derive(0, "order", 1), derive(0, "order", 1) == derive(0, "order", 2)
        (True, False)
    """
    text = struct.pack(f"<{len(counts) + 1}q", seed, *counts) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_torch(seed: int) -> None:
    """Seed torch's generators of the CPU and, where it is in use, of the accelerator."""
    # The generator itself: torch.manual_seed takes a hundred times as long, and this runs at every update.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed the generators that an augmentation may use: torch's, numpy's and Python's."""
    seed_torch(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  # whoever calls numpy's global functions draws from this one
    random.seed(seed)
