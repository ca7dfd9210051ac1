"""Ranks that are threads of one process, in lock-step: for laws of arithmetic, which need no processes."""

import threading

import torch

from noether.distributed.ranks import Ranks

LIMIT_S = 60
"""A safeguard against tests that hang, not a measurement."""


class _Meeting:
    """Gives each thread what all threads bring, in the order of ranks."""

    def __init__(self, world_size):
        self._brought = [None] * world_size
        self._barrier = threading.Barrier(world_size)

    def exchange(self, rank, value):
        self._brought[rank] = value
        self._barrier.wait(LIMIT_S)
        brought = list(self._brought)
        self._barrier.wait(LIMIT_S)
        return brought

    def abort(self):
        self._barrier.abort()


class _Done:
    def wait(self):
        pass


class ThreadRank:
    """What a step needs of its ranks: a channel, and a function that begins to sum a tensor; it counts both."""

    def __init__(self, rank, meeting, world_size):
        self._rank, self._meeting = rank, meeting
        self.reductions = 0
        self.gathered = []
        self.ranks = Ranks(rank=rank, world_size=world_size, control=self)

    def start(self, tensor):
        """Sum in the order of ranks."""
        self.reductions += 1
        tensors = self._meeting.exchange(self._rank, tensor.clone())
        tensor.copy_(sum(tensors[1:], start=tensors[0]))
        return _Done()

    def gather(self, what, value):
        self.gathered.append(what)
        brought = self._meeting.exchange(self._rank, (what, value))
        assert {name for name, _ in brought} == {what}
        return [each for _, each in brought]


def run_in_threads(function, world_size):
    """Return the results of `function(thread_rank)` by rank; raise the first error."""
    meeting = _Meeting(world_size)
    results, errors = [None] * world_size, []

    def run(rank):
        torch.set_num_threads(1)
        try:
            results[rank] = function(ThreadRank(rank, meeting, world_size))
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((each for each in errors if not isinstance(each, threading.BrokenBarrierError)), errors[0])
    return results
