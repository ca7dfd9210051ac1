"""The ranks of a run: this process among those that train it together, and the groups over which they communicate."""

from __future__ import annotations

import logging
import os
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Final, final

import torch
import torch.distributed as dist

from noether.core.tensors.torch_internals import default_store
from noether.distributed.channel import Channel
from noether.distributed.failures import Failures
from noether.distributed.launch import LaunchError, check_launch, launched_world_size
from noether.distributed.startup import restart_count, wait_for_startup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.distributed_c10d import Store

DEFAULT_TIMEOUT_S: Final = 600.0
LONG_WAIT_S: Final = 10.0
"""After this time a rank that waits for others to join names them in a warning."""
_POLL_S: Final = 0.02
_LOGGER: Final = logging.getLogger(__name__)
_JOINS: Final = count()
_JOINED: Final[list[tuple[Ranks, list[dist.ProcessGroup]]]] = []


@final
@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the processes that train one run together.

    Each of the three groups belongs to one kind of work and is never shared between threads: `training` reduces
    gradients, on the device of the model; `control` reduces what events carry, and `saving` is for checkpoints, both on
    the CPU.

    Args:
        rank: Index of this process, `0 <= rank < world_size`.
        world_size: Number of processes.
        training: Group for gradients, nccl for CUDA and gloo for the CPU; None for one process.
        control: Channel of the main thread.
        saving: Channel of the thread that saves.
        failures: Where ranks report failures. A collective over `training` belongs in `failures.explain("what")`.
        timeout_s: Seconds that a rank waits for the others before it gives up.

    Example:
        >>> ranks = Ranks()
        >>> ranks.rank, ranks.world_size, ranks.is_first
        (0, 1, True)
    """

    rank: int = 0
    world_size: int = 1
    training: dist.ProcessGroup | None = None
    control: Channel = field(default_factory=Channel)
    saving: Channel = field(default_factory=Channel)
    failures: Failures = field(default_factory=Failures)
    timeout_s: float = DEFAULT_TIMEOUT_S

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1


ONE_PROCESS: Final = Ranks()
"""The only process of a run."""


def count_processes() -> int:
    """Return the number of processes in the group of torch.distributed, or that a launcher started; 1 for none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return launched_world_size()


def join(*, timeout_s: float = DEFAULT_TIMEOUT_S, device: torch.device | None = None) -> Ranks:
    """Return the ranks of this run; it joins the processes that a launcher started, or a group that exists.

    All processes have to call it equally often. Each call makes groups with the timeout, which
    `leave_at_end` removes; only the first of a process that a launcher started makes the default group.

    Args:
        timeout_s: Seconds that a rank waits for the others before it gives up, above 0.
        device: Device of the model; gradients are reduced by nccl on CUDA, and by gloo elsewhere.

    Returns:
        `ONE_PROCESS` if there is only one.

    Raises:
        LaunchError: If `WORLD_SIZE` is set, but not what a launcher sets beside it; or if other processes do not join
            within the timeout, which a warning names after 10 s.
        RankError: If one of them fails before it joins.
    """
    if not dist.is_available():
        return ONE_PROCESS
    from torch.distributed.distributed_c10d import PrefixStore  # which some builds of torch lack

    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        if launched_world_size() == 1:
            return ONE_PROCESS
        _make_default_group(device, timeout)
        training = dist.group.WORLD
    elif dist.get_world_size() == 1:
        return ONE_PROCESS
    else:  # the timeout of an adopted group is its own, and it may be for another device
        _wait_for_all(PrefixStore(f"noether/adopted/{next(_JOINS)}", default_store()), timeout_s)
        training = dist.new_group(
            backend="nccl" if device is not None and device.type == "cuda" else "gloo", timeout=timeout
        )
    ranks = _make_ranks(training, timeout)
    _JOINED.append(ranks)
    return ranks[0]


def _make_ranks(training: dist.ProcessGroup | None, timeout: timedelta) -> tuple[Ranks, list[dist.ProcessGroup]]:
    """Return the ranks with new channels, and the groups that `leave_at_end` removes."""
    from torch.distributed.distributed_c10d import PrefixStore

    rank, world_size, timeout_s = dist.get_rank(), dist.get_world_size(), timeout.total_seconds()
    control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    # A name that only this call has: an adopted group may have been in use, and its store holds what was written then.
    (name, *_) = Channel(control).gather("name of the run", secrets.token_hex(8))
    failures = Failures(
        PrefixStore(f"noether/failures/{name}", default_store()),
        rank=rank,
        world_size=world_size,
        timeout_s=timeout_s,
    )
    ranks = Ranks(
        rank=rank,
        world_size=world_size,
        training=training,
        control=Channel(control, failures),
        saving=Channel(saving, failures),
        failures=failures,
        timeout_s=timeout_s,
    )
    own = [control, saving] if training is dist.group.WORLD else [control, saving, training]
    return ranks, own


def current_ranks() -> Ranks:
    """Return the ranks that this process joined last; `ONE_PROCESS` if it joined none."""
    return _JOINED[-1][0] if _JOINED and dist.is_initialized() else ONE_PROCESS


@contextmanager
def leave_at_end() -> Iterator[None]:
    """Leave the ranks that the block joined, at its end; an error of the block is reported to them and raised.

    After an error nothing else is done, because others may still use the groups.

    Example:
        >>> @leave_at_end()
        ... def train(): ...
        >>> train()
    """
    joined = len(_JOINED)
    try:
        yield
    except BaseException as error:
        current_ranks().failures.report(error)
        raise
    while len(_JOINED) > joined:
        for group in _JOINED.pop()[1]:
            dist.destroy_process_group(group)


def _wait_for_all(store: Store, timeout_s: float) -> None:
    """Wait until all ranks of an adopted group join, which a program may do on one of them only; log who is missing."""
    rank, world_size, deadline_s = dist.get_rank(), dist.get_world_size(), time.monotonic() + timeout_s
    store.set(f"joined/{rank}", "")
    if store.add("count", 1) == world_size:
        store.set("all", "")
    warn_s = time.monotonic() + LONG_WAIT_S
    while not store.check(["all"]):  # a wait of the store prints a warning of its own every few seconds
        now_s = time.monotonic()
        if now_s > deadline_s:
            raise LaunchError(_describe_missing(store, timeout_s))
        if now_s > warn_s:
            _LOGGER.warning("%s", _describe_missing(store, LONG_WAIT_S))
            warn_s = deadline_s
        time.sleep(_POLL_S)


def _describe_missing(store: Store, waited_s: float) -> str:
    missing = [str(rank) for rank in range(dist.get_world_size()) if not store.check([f"joined/{rank}"])]
    return (
        f"rank {dist.get_rank()} has waited {waited_s:g} s for rank{'s'[: len(missing) != 1]} {', '.join(missing)} of "
        "the process group: make the Session (or call noether.distributed.ranks.join) on every rank, not inside of "
        "`if rank == 0:`; rank 0 alone logs and saves"
    )


def _make_default_group(device: torch.device | None, timeout: timedelta) -> None:
    check_launch()
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    is_cuda = device is not None and device.type == "cuda"
    number = next(_JOINS)
    wait_for_startup(number, timeout.total_seconds())
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # The store of torchrun outlives a restart, with the addresses of the processes from before it.
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=PrefixStore(f"noether/{restart_count()}/{number}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if is_cuda else None,
        )
    except RuntimeError as error:
        waited = f"{timeout.total_seconds():g} s"
        raise LaunchError(f"rank {os.environ['RANK']} waited {waited} for the others to join: {error}") from error
