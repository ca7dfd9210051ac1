"""Impure callbacks with one fault each: `check_pure` catches each of them, with a message that says why."""

import builtins
import contextlib
import contextvars
import cProfile
import csv
import datetime as dt
import decimal
import functools
import importlib.util
import itertools
import locale
import logging
import os
import platform
import queue
import random
import resource
import secrets
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from noether import (
    AfterUpdate,
    LogText,
    callback,
    every_n_epochs,
    every_n_updates,
    log,
    on,
)
from noether.testing import (
    ImpureError,
    check_pure,
)

FOLDER = tempfile.TemporaryDirectory()
PATH = str(Path(FOLDER.name, "file"))
STREAM = Path(PATH).open("w+")  # noqa: SIM115  # a mutant writes to a file that is open already
DATABASE = sqlite3.connect(":memory:")
MODEL = torch.nn.Linear(1, 1)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)
QUEUE = queue.Queue()
CONTEXT = contextvars.ContextVar("CONTEXT", default=0)
LEGACY = np.random.RandomState(0)
NUMBERS = iter(number for number in range(10**6))
CALLS = []
TOTAL = 0


@pytest.fixture(scope="module", autouse=True)
def files():
    yield
    STREAM.close()
    DATABASE.close()
    FOLDER.cleanup()


def helper_module():
    """Return a module that imported a clock by name, as a user's helpers do."""
    Path(FOLDER.name, "helper_clock.py").write_text("from time import time\n\n\ndef now():\n    return time()\n")
    spec = importlib.util.spec_from_file_location("helper_clock", Path(FOLDER.name, "helper_clock.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HELPER = helper_module()
START = HELPER.now()


def does(action):
    """Return a callback that does something and returns the state unchanged."""

    @every_n_updates(1)
    def mutant(state, event):
        action(state, event)
        return state, ()

    return mutant


def says(read):
    """Return a callback that reads something and logs it."""
    return every_n_epochs(1)(lambda state, event: (state, (LogText(str(read())),)))


def stops(gate, decide):
    """Return a callback that stops the run if `decide(state, event)`."""
    return gate(lambda state, event: (state.request_stop("now") if decide(state, event) else state, ()))


def counts_globally(state, event):
    global TOTAL  # noqa: PLW0603  # the fault under test
    TOTAL += 1


class CountsOnItsClass:
    total = 0

    def __call__(self, state, event):
        type(self).total += 1
        return state, ()


class CountsInABox:
    def __init__(self):
        self.box = {"n": 0}

    def __call__(self, state, event):
        self.box["n"] += 1
        return state, ()


class CountsInASlot:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0

    def __call__(self, state, event):
        self.n += 1
        return state, ()


def counts_in_a_closure():
    count = 0

    def mutant(state, event):
        nonlocal count
        count += 1
        return state, ()

    return on(AfterUpdate)(mutant)


def counts_in_a_default(state, event, seen=[]):  # noqa: B006  # the fault under test
    seen.append(0)
    return state, ()


def counts_on_a_function(state, event):
    counts_on_a_function.seen = getattr(counts_on_a_function, "seen", 0) + 1
    return state, ()


def remembers_the_first_loss():
    memory = {}

    def mutant(state, event):
        memory.setdefault("first", float(event.losses["total"]))
        return log(state, event, {"since": float(event.losses["total"]) - memory["first"]})

    return every_n_updates(1)(mutant)


def counts_after(update):
    memory = {"n": 0}

    def mutant(state, event):
        if state.iteration.update < update:
            return state, ()
        memory["n"] += 1
        return log(state, event, {"n": memory["n"]})

    return on(AfterUpdate)(mutant)


def draws_from_a_generator_of_its_own():
    generator = torch.Generator().manual_seed(0)
    return does(lambda state, event: torch.rand(1, generator=generator))


def prints_and_hides_the_error(state, event):
    with contextlib.suppress(AssertionError):
        print("x")  # noqa: T201  # the fault under test
    return state, ()


@callback("since", init=lambda state: 0.0)
@on(AfterUpdate)
def remembers_the_time(state, event):
    return state.remember("since", state.memory("since") or event.time_s), ()


@callback("first", init=lambda state: {})
@every_n_updates(2)
def remembers_the_params(state, event):
    return state.replace(callback_states={**state.callback_states, "first": dict(state.params)}), ()


def writes_to_numpy(state, event):
    for param in state.params.values():
        param.numpy().fill(0)


def writes_to_data(state, event):
    for param in state.params.values():
        param.data.zero_()


def requires_gradients(state, event):
    for param in state.params.values():
        param.requires_grad_(True)  # torch's own positional flag


def clamps_outputs(state, event):
    if isinstance(event, AfterUpdate):
        event.outputs[0]["drift"].numpy().fill(7)


def hides_and_prints(state, event):
    sys.setprofile(None)
    sys.stdout.write("")


def seeds(seed):
    return does(lambda state, event: seed(0))


WRITES = "writes to its arguments"
OUTSIDE = "keeps memory outside of the state"
RANDOM = "draws from a global random generator"
ZONE = "reads the time zone"
ENVIRONMENT = "uses environment variables"
PROCESS = "reads the state of the process"
SETTING = "changes a setting of the process"

IMPURE = {
    # It writes.
    "print": (does(lambda s, e: print("x", file=sys.stderr)), r"does I/O: print\(\)"),  # noqa: T201  # the fault
    "stdout": (does(lambda s, e: sys.stdout.write("x")), "does I/O"),
    "print, error hidden": (every_n_updates(1)(prints_and_hides_the_error), r"does I/O: print\(\)"),
    "file opened before": (does(lambda s, e: STREAM.write("x")), r"does I/O: TextIOWrapper.write\(\)"),
    "file read": (does(lambda s, e: STREAM.read()), r"does I/O: TextIOWrapper.read\(\)"),
    "csv.writer": (does(lambda s, e: csv.writer(STREAM).writerow([1])), r"does I/O: csv.writer.writerow\(\)"),
    "database": (does(lambda s, e: DATABASE.execute("select 1")), r"does I/O: sqlite3.Connection.execute\(\)"),
    "print to a stream": (does(lambda s, e, f=STREAM: print("x", file=f)), r"does I/O: print\(\)"),  # the fault
    "os.write": (does(lambda s, e: os.write(STREAM.fileno(), b"x")), "does I/O"),
    "os.mkdir": (does(lambda s, e: os.mkdir(f"{PATH}.d")), r"does I/O: os.mkdir\(\)"),  # noqa: PTH102  # the call itself is tested
    "open": (does(lambda s, e: builtins.open(PATH)), r"does I/O: open"),  # noqa: PTH123, SIM115  # the call itself is tested
    "torch.save": (does(lambda s, e: torch.save({"a": 1}, f"{PATH}.pt")), "does I/O"),
    "save_file": (does(lambda s, e: save_file({"a": torch.ones(1)}, f"{PATH}.safetensors")), "does I/O"),
    "load_file": (does(lambda s, e: load_file(f"{PATH}.safetensors")), "does I/O"),
    "np.save": (does(lambda s, e: np.save(f"{PATH}.npy", np.ones(1))), "does I/O"),
    "tofile": (does(lambda s, e: np.ones(1).tofile(f"{PATH}.bin")), r"does I/O: tofile\(\)"),
    "thread": (does(lambda s, e: threading.Thread(target=int).start()), "does I/O: thread.start_new_thread"),
    "os.environ written": (does(lambda s, e: os.environ.__setitem__("NOETHER_MUTANT", "1")), ENVIRONMENT),
    "loss through numpy": (does(lambda s, e: e.losses["total"].numpy().fill(7)), f"{WRITES}: event"),
    "outputs through numpy": (does(clamps_outputs), f"{WRITES}: event"),
    "params through numpy": (does(writes_to_numpy), f"{WRITES}: state"),
    "params.data": (does(writes_to_data), f"{WRITES}: state"),
    "requires_grad_": (does(requires_gradients), f"{WRITES}: .*params"),
    "run.config": (does(lambda s, e: e.run.config.__setitem__("seen", 1)), rf"{WRITES}: event.run\['config'\]"),
    "attribute of the event": (does(lambda s, e: vars(e).update(seen=1)), f"{WRITES}: event"),
    "frozen dict": (does(lambda s, e: dict.__setitem__(s.params, "x", s.params["w"])), f"{WRITES}: state"),
    # It keeps memory outside of the state.
    "global": (does(counts_globally), f"{OUTSIDE}, in .*TOTAL"),
    "global list": (does(lambda s, e: CALLS.append(0)), f"{OUTSIDE}, in .*CALLS"),
    "a name of the module": (does(lambda s, e: globals().update(SEEN=s.iteration.update)), f"{OUTSIDE}, in .*names"),
    "mode of a model": (does(lambda s, e: MODEL.train(not MODEL.training)), f"{OUTSIDE}, in .*MODEL"),
    "optimizer": (does(lambda s, e: OPTIMIZER.param_groups[0].update(lr=s.iteration.update)), f"{OUTSIDE}, in .*OPTIM"),
    "queue": (does(lambda s, e: QUEUE.put(1)), f"{OUTSIDE}, in .*QUEUE"),
    "context variable": (does(lambda s, e: CONTEXT.set(CONTEXT.get() + 1)), f"{OUTSIDE}, in .*CONTEXT"),
    "legacy generator": (does(lambda s, e: LEGACY.rand()), f"{OUTSIDE}, in .*LEGACY"),
    "generator expression": (does(lambda s, e: next(NUMBERS)), f"{OUTSIDE}, in .*NUMBERS"),
    "class attribute": (on(AfterUpdate)(CountsOnItsClass()), f"{OUTSIDE}, in .*total"),
    "box": (on(AfterUpdate)(CountsInABox()), f"{OUTSIDE}, in .*box"),
    "slot": (on(AfterUpdate)(CountsInASlot()), f"{OUTSIDE}, in .*n"),
    "closure": (counts_in_a_closure(), f"{OUTSIDE}, in .*count"),
    "default": (on(AfterUpdate)(counts_in_a_default), f"{OUTSIDE}, in .*defaults"),
    "attribute of a function": (on(AfterUpdate)(counts_on_a_function), f"{OUTSIDE}, in .*seen"),
    "closure filled once": (remembers_the_first_loss(), f"{OUTSIDE}, in .*memory"),
    "after update 20": (counts_after(20), "returns another result"),
    "after update 50": (counts_after(50), "returns another result"),
    "after update 5000": (counts_after(5000), "returns another result"),
    "generator": (draws_from_a_generator_of_its_own(), f"{OUTSIDE}, in .*generator"),
    "count": (says(functools.partial(next, itertools.count())), "returns another result"),
    # It uses a global generator or changes a global setting.
    "torch.manual_seed": (seeds(torch.manual_seed), RANDOM),
    "np.random.seed": (seeds(np.random.seed), RANDOM),
    "random.seed": (does(lambda s, e: random.seed(0)), RANDOM),
    "torch.initial_seed": (says(torch.initial_seed), RANDOM),
    "dropout": (does(lambda s, e: torch.nn.functional.dropout(s.params["w"], 0.5)), RANDOM),
    "secrets": (does(lambda s, e: secrets.token_hex()), RANDOM),
    "uuid": (does(lambda s, e: uuid.uuid4()), RANDOM),
    "default dtype": (
        does(lambda s, e: torch.set_default_dtype(torch.float64 if s.iteration.update % 2 else torch.float32)),
        r"changes torch.get_default_dtype\(\)",
    ),
    "grad mode": (
        does(lambda s, e: torch.set_grad_enabled(not torch.is_grad_enabled())),
        "changes torch.is_grad_enabled",
    ),
    "np.seterr": (
        does(lambda s, e: np.seterr(all="call" if s.iteration.update % 2 else "warn")),
        "changes numpy.geterr",
    ),
    "decimal": (
        does(lambda s, e: setattr(decimal.getcontext(), "prec", s.iteration.update + 1)),
        "changes the context of decimal",
    ),
    "cuda seed": (does(lambda s, e: torch.cuda.manual_seed_all(0)), RANDOM),
    "locale": (does(lambda s, e: locale.setlocale(locale.LC_ALL, "C")), rf"{SETTING}: locale.setlocale\(\)"),
    "profile function": (does(hides_and_prints), rf"{SETTING}: sys.setprofile\(\)"),
    "level of a logger": (does(lambda s, e: logging.getLogger("noether.mutant").setLevel(20)), f"{SETTING}: logging"),
    "file of a logger": (does(lambda s, e: logging.FileHandler(f"{PATH}.log")), f"{SETTING}: logging.FileHandler"),
    "basicConfig": (does(lambda s, e: logging.basicConfig(filename=f"{PATH}.log")), f"{SETTING}: logging.basicConfig"),
    "default device": (
        does(lambda s, e: torch.set_default_device("meta" if s.iteration.update % 2 else "cpu")),
        r"changes torch.get_default_device\(\)",
    ),
    "matmul precision": (
        does(lambda s, e: torch.set_float32_matmul_precision("high")),
        r"changes torch.get_float32_matmul_precision\(\)",
    ),
    "cudnn": (
        does(lambda s, e: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)),
        "changes torch.backends.cudnn.benchmark",
    ),
    "sys.path": (does(lambda s, e: sys.path.append("x")), "changes sys.path"),
    # It reads the world.
    "helper's clock": (
        stops(every_n_updates(1), lambda s, e: HELPER.now() - START > 3600),
        r"reads the clock: time.time\(\)",
    ),
    "clock in a default": (says(lambda now=time.perf_counter: now()), r"reads the clock: time.perf_counter\(\)"),
    "strftime": (says(lambda: time.strftime("%Y")), r"reads the clock: time.strftime\(\)"),
    "gmtime": (says(time.gmtime), r"reads the clock: time.gmtime\(\)"),
    "date.today": (says(dt.date.today), r"reads the clock: date.today\(\)"),
    "datetime64": (says(lambda: np.datetime64("today")), r"reads the clock: numpy.datetime64"),
    "datetime64 of a default": (says(lambda now="now": np.datetime64(now)), r"reads the clock: numpy.datetime64"),
    "fromtimestamp": (
        every_n_epochs(1)(lambda s, e: (s, (LogText(str(dt.datetime.fromtimestamp(e.time_s))),))),  # noqa: DTZ006  # the fault under test
        ZONE,
    ),
    "localtime": (every_n_epochs(1)(lambda s, e: (s, (LogText(str(time.localtime(e.time_s))),))), ZONE),
    "getpid": (says(os.getpid), rf"{PROCESS}: os.getpid\(\)"),
    "cpu_count": (says(os.cpu_count), rf"{PROCESS}: os.cpu_count\(\)"),
    "getrusage": (
        says(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0),
        rf"{PROCESS}: resource.getrusage\(\)",
    ),
    "node": (says(platform.node), rf"{PROCESS}: platform.uname\(\)"),
    "rank of torch": (
        says(lambda: torch.distributed.get_rank() if torch.distributed.is_initialized() else 0),
        r"reads the rank of the process: torch.distributed.*is_initialized\(\)",
    ),
    "host name": (says(socket.gethostname), r"does I/O: socket.gethostname\(\)"),
    "environment": (says(lambda: os.environ.get("NOETHER_STOP")), ENVIRONMENT),
    "size of the environment": (says(lambda: len(os.environ)), ENVIRONMENT),
    "getenv": (says(lambda: os.getenv("NOETHER_STOP")), ENVIRONMENT),
    "identity": (on(AfterUpdate)(lambda s, e: (s, (LogText(str(id(e))),))), "returns another result"),
    # Its memory is not that of the run.
    "absolute time": (remembers_the_time, r"state.callback_states\['since'\] depends on event.time_s"),
    "decision on the time": (
        stops(on(AfterUpdate), lambda s, e: e.time_s > 2e9),
        r"state.stop depends on event.time_s",
    ),
    "time as a metric": (
        on(AfterUpdate)(lambda s, e: log(s, e, {"at": e.time_s})),
        r"state.metrics\['at'\].* depends on event.time_s",
    ),
    "memory aliases params": (remembers_the_params, "memory 'first' shares storage with the params"),
}


def test_check_pure_restores_the_settings_that_a_callback_changed():
    with pytest.raises(ImpureError, match=r"changes torch\.get_default_dtype"):
        check_pure(does(lambda state, event: torch.set_default_dtype(torch.float64)), examples=5)
    assert torch.get_default_dtype() is torch.float32


def test_a_profiler_is_on_again_after_a_law():
    with cProfile.Profile() as profiler:
        check_pure(says(lambda: "nothing"), examples=2)
        assert sys.getprofile() is profiler


@pytest.mark.usefixtures("first_counterexample")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a refused mutant cannot close what it opened
@pytest.mark.parametrize("name", IMPURE)
def test_check_pure_catches(name):
    mutant, message = IMPURE[name]
    with pytest.raises(ImpureError, match=message):
        check_pure(mutant, examples=10)
