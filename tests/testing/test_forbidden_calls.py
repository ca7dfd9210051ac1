"""Calls are watched in one thread only, and nothing stays changed afterwards."""

import gc
import os
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch

from noether import AfterUpdate, LogText, TrainState, on
from noether.testing import ImpureError, call_purely, check_pure
from noether.testing.forbidden_calls import watch_call

EVENT = AfterUpdate(samples=4)


def reads_the_time(state, event):
    return state, (LogText(str(time.time())),)


def does_nothing(state, event):
    return state, ()


def fails(state, event):
    raise IndexError("no such batch")


def checks_another(state, event):
    with pytest.raises(ImpureError):
        call_purely(reads_the_time, state, event)
    return state, ()


def globals_now():
    return time.time, time.sleep, os.getpid, sys.getprofile(), gc.isenabled(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("callback", [reads_the_time, does_nothing, fails, checks_another])
def test_nothing_stays_changed(callback):
    before = globals_now()
    with suppress(ImpureError, IndexError):
        call_purely(callback, TrainState(), EVENT)
    assert globals_now() == before
    with suppress(ImpureError, IndexError):
        check_pure(on(AfterUpdate)(callback), examples=2)
    assert globals_now() == before
    assert time.time() > 0


def test_another_profile_function_is_restored():
    calls = []

    def profile(frame, what, argument):
        calls.append(what)

    sys.setprofile(profile)
    try:
        call_purely(does_nothing, TrainState(), EVENT)
        found = sys.getprofile()
    finally:
        sys.setprofile(None)
    assert found is profile


def test_other_threads_are_left_alone():
    answers, inside, finished = [], threading.Event(), threading.Event()

    def work():
        inside.wait()
        answers.append((time.time(), os.getpid(), os.environ.get("PATH")))
        finished.set()

    def waits(state, event):
        inside.set()
        while not finished.is_set():
            pass
        return state, ()

    thread = threading.Thread(target=work)
    thread.start()
    watch_call("waits", ImpureError, waits, TrainState(), EVENT)
    thread.join()
    assert len(answers) == 1


def test_an_error_of_the_callback_is_raised():
    with pytest.raises(IndexError, match="no such batch"):
        watch_call("fails", ImpureError, fails, None, None)


def test_a_forbidden_call_is_reported_though_the_callback_fails_after_it():
    def hides(state, event):
        with suppress(AssertionError):
            os.getpid()
        raise IndexError("hidden")

    with pytest.raises(ImpureError, match=r"hides reads the state of the process: os.getpid\(\)"):
        watch_call("hides", ImpureError, hides, None, None)
