"""Runs functions in several processes that communicate through gloo, in the environment of torchrun."""

import functools
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch.distributed as dist

LIMIT_S = 120
"""A safeguard against tests that hang, not a measurement."""
PRELOADED = [
    "torch",
    "torch._dynamo",  # which the first DTensor imports
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "noether.training.runs.train",
    "noether.cli.main",
    "noether.cli.commands.evaluate",
    "noether.testing",  # which, like pytest, the modules of the functions import
    "pytest",
]


@functools.cache
def _context():
    """Return a context whose processes are forked from one that has imported torch and noether: that takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run(function, arguments, environment, results):
    """Call the function in a process of its own, send what it returned or raised, and end without any clean-up."""
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    dist.set_debug_level_from_env()
    try:
        outcome = "returned", function(*arguments)
    except BaseException as error:  # noqa: BLE001  # the test sees every error
        outcome = "raised", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    results.send_bytes(pickle.dumps(outcome))  # by value: the pipe would share the memory of tensors
    results.close()
    signal.raise_signal(signal.SIGKILL)


def run_on_ranks(function, world_size, *arguments, **options):
    """Return the results of `function(*arguments)` in `world_size` processes, by rank; fail if one raised.

    Args:
        function: Any function of an importable module. It joins the group with `noether.distributed.ranks.join`.
        world_size: Number of processes.
        arguments: Arguments of the function; as its result, they are sent between processes.
        options: As for `outcomes_on_ranks`.
    """
    outcomes = outcomes_on_ranks(function, world_size, *arguments, **options)
    for rank, (kind, value) in enumerate(outcomes):
        assert kind == "returned", f"rank {rank} {kind}: {value}"
    return [value for _, value in outcomes]


def outcomes_on_ranks(function, world_size, *arguments, detail=True, limit_s=LIMIT_S, environment=None):
    """Return `("returned", value)`, `("raised", traceback)` or `("ended", exit code)` of each rank.

    Args:
        function: As for `run_on_ranks`.
        world_size: Number of processes.
        arguments: Arguments of the function.
        detail: Whether torch checks that all ranks make the same collectives.
        limit_s: Seconds after which all processes are killed, and those without a result count as "hung".
        environment: Further environment variables.
    """
    # As under torchrun, the store is in a process that is no rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit_s))
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL" if detail else "OFF",
        **(environment or {}),
    }
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context().Process(target=_run, args=(function, arguments, own, sender))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    deadline = time.monotonic() + limit_s
    try:
        return [_outcome(process, pipe, deadline) for process, pipe in zip(processes, pipes, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _outcome(process, pipe, deadline):
    if not wait([pipe], timeout=max(0, deadline - time.monotonic())):
        return "hung", None
    try:
        return pickle.loads(pipe.recv_bytes())  # noqa: S301  # a process of this test wrote it
    except EOFError:
        process.join()
        return "ended", process.exitcode
