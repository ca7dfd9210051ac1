"""Pure callbacks that resemble impure ones pass the laws."""

import csv
import datetime as dt
import functools
import io
import itertools
import json
import logging
import math
import random
import re
import time
import warnings
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from law_examples import rotate
from matplotlib.figure import Figure

from noether import (
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    Effect,
    LogText,
    callback,
    every_n_epochs,
    every_n_updates,
    log,
    on,
)
from noether.core.tensors.containers import map_tensors
from noether.testing import check_pure, check_rank_agreement, check_resumable

LOGGER = logging.getLogger(__name__)
NAMES = {"w": "weight", "b": "bias"}
LIMITS = [1.0, 2.0]


@functools.lru_cache
def squares(n):
    return tuple(i * i for i in range(n))


@functools.singledispatch
def describe(value):
    return "a value"


@describe.register
def _describe_int(value: int):
    return "a number"


@dataclass(frozen=True)
class Range:
    low: float
    high: float

    @functools.cached_property
    def width(self):
        return self.high - self.low


@dataclass(frozen=True)
class LogHistogram(Effect):
    counts: np.ndarray


@dataclass(frozen=True)
class Scales:
    """A callback with a cached property."""

    limits: Range

    def __call__(self, state, event):
        return state, (LogText(f"{self.limits.width}"),) if isinstance(event, AfterEpoch) else ()

    @functools.cached_property
    def unused(self):
        return 1


def says(read):
    """Return a callback that logs `read(state, event)`."""
    return every_n_updates(1)(lambda state, event: (state, (LogText(str(read(state, event))),)))


def logs_to_the_developer(state, event):
    LOGGER.info("update %d", state.iteration.update)
    LOGGER.warning("loss %s", event.losses["total"])
    return "logged"


def warns(state, event):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("careful", stacklevel=1)
    return "warned"


def writes_csv_in_memory(state, event):
    buffer = io.StringIO()
    csv.writer(buffer).writerow([state.iteration.update, float(event.losses["total"])])
    return buffer.getvalue()


def differentiates(state, event):
    gradient = torch.func.grad(lambda w: (w * w).sum())(state.params["w"])
    leaf = state.params["w"].detach().clone().requires_grad_()
    (other,) = torch.autograd.grad((leaf * leaf).sum(), leaf)
    return torch.equal(gradient, other)


def prints_into_memory(state, event):
    stream = io.StringIO()
    print(state.iteration, file=stream)  # it is no I/O
    return stream.getvalue()


def saves_into_memory(state, event):
    stream = io.BytesIO()
    torch.save(dict(state.params), stream)
    stream.seek(0)
    return torch.load(stream)["w"].tolist()


def draws_a_figure(state, event):
    stream = io.BytesIO()
    figure = Figure()
    figure.subplots().plot([1, 2])
    figure.savefig(stream, format="raw")
    return len(stream.getvalue())


def writes_to_a_clone(state, event):
    clone = state.params["w"].clone()
    clone.mul_(2).numpy()[0] = 0.0
    return clone.tolist()


def draws_from_seeds(state, event):
    generator = torch.Generator().manual_seed(state.seed + state.iteration.update)
    numbers = np.random.default_rng([state.seed, state.iteration.update])
    own = random.Random(state.seed)  # noqa: S311  # no cryptography
    own.shuffle(order := list(range(9)))
    return torch.rand(2, generator=generator).tolist(), numbers.normal(), order


@callback("average", init=lambda state: map_tensors(torch.clone, dict(state.params)))
@every_n_updates(2)
def averages(state, event):
    mean = {name: torch.lerp(old, state.params[name], 0.5) for name, old in state.memory("average").items()}
    return state.remember("average", mean), ()


@callback("elapsed", init=lambda state: 0.0)
@on(AfterUpdate)
def measures_durations(state, event):
    return state.remember("elapsed", state.memory("elapsed") + event.duration_s), ()


def groups(state, event):
    found = defaultdict(list)
    for name in state.params:
        found[len(name)].append(name)
    return dict(found), Counter("".join(state.params)), list(itertools.islice(itertools.count(), 3))


SOUND = {
    "logging": says(logs_to_the_developer),
    "warnings": says(warns),
    "torch": says(lambda s, e: torch.stack([p.norm() for p in s.params.values()]).sum().item()),
    "linear algebra": says(lambda s, e: torch.linalg.svdvals(torch.eye(2) + s.iteration.update).max().item()),
    "gradients": says(differentiates),
    "hessian": says(lambda s, e: torch.func.hessian(lambda w: (w**3).sum())(s.params["w"]).tolist()),
    "print into memory": says(prints_into_memory),
    "save into memory": says(saves_into_memory),
    "figure": on(AfterTraining)(lambda s, e: (s, (LogText(str(draws_a_figure(s, e))),))),
    "RandomState": says(lambda s, e: np.random.RandomState(s.seed).rand()),
    "a clone": says(writes_to_a_clone),
    "numpy": says(lambda s, e: np.sort(s.params["w"].numpy()[::-1] * 2).tolist()),
    "array in an effect": every_n_epochs(1)(lambda s, e: (s, (LogHistogram(np.arange(s.iteration.epoch + 3)),))),
    "dicts": says(lambda s, e: {NAMES[name]: param.sum().item() for name, param in s.params.items()}),
    "groups": says(groups),
    "singledispatch": says(lambda s, e: describe(s.iteration.update)),
    "lru_cache": says(lambda s, e: squares(s.iteration.update % 5)),
    "dataclass": says(lambda s, e: replace(Range(0.0, 1.0), high=float(s.iteration.update)).width),
    "cached property": Scales(Range(0.0, 2.0)),
    "format": says(lambda s, e: f"{s.iteration.update:05d} {float(e.losses['total']):.3e} {LIMITS!r}"),
    "sorted set": says(lambda s, e: sorted({*s.params, *s.metrics, "a"})),
    "order-free set": says(lambda s, e: len({*s.params, "a"}) + sum({1, 2, 3})),
    "crc32": says(lambda s, e: zlib.crc32(str(s.iteration).encode()) % 3),
    "regular expression": says(lambda s, e: [name for name in s.params if re.fullmatch(r"w.*", name)]),
    "json": says(lambda s, e: json.dumps({"lr": dict(e.lr), "loss": str(e.losses["total"])}, sort_keys=True)),
    "csv in memory": says(writes_csv_in_memory),
    "seeded generators": says(draws_from_seeds),
    "time in an effect": says(lambda s, e: dt.datetime.fromtimestamp(e.time_s, tz=dt.UTC).isoformat()),
    "strftime of a time": says(lambda s, e: time.strftime("%Y", time.gmtime(e.time_s))),
    "math": says(lambda s, e: math.fsum(LIMITS) / 3),
    "average": averages,
    "durations": measures_durations,
    "metric": on(AfterEpoch)(lambda s, e: log(s, e, {"norm": s.params["w"].norm()})),
    "stop at a count": on(AfterUpdate)(lambda s, e: (s.request_stop("far") if s.iteration.update > 7 else s, ())),
}


LAWS = [(check_pure,), (check_resumable,), (check_rank_agreement,)]


@pytest.mark.parametrize(("name", "law"), rotate([(name,) for name in SOUND], LAWS))
def test_a_sound_callback_passes(name, law):
    law(SOUND[name], examples=5)
