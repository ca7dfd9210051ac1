"""Every shipped callback satisfies every law of `noether.testing`."""

import pytest
from examples import examples_of

from noether import (
    AfterUpdate,
    compose,
    log,
    on,
)
from noether.core.callbacks import EMACallback
from noether.core.callbacks.registry import SHIPPED
from noether.testing import (
    check_composition,
    check_independent,
    check_pure,
    check_rank_agreement,
    check_resumable,
)

# Callbacks that stop training do so earlier here, because the runs of the laws are short.
SOONER = {"MetricEarlyStopping": {"tolerance": 2}, "FixedUpdateEarlyStopping": {"stop_at_update": 4}}
AVERAGES = EMACallback(target_factors=(0.5, 0.9), save_latest_weights=True, every_n_updates=2, at_end=True)


@on(AfterUpdate)
def notes(state, event):
    return log(state, event, {"noted": state.iteration.sample})


@on(AfterUpdate)
def stops(state, event):
    return (state.request_stop("it is late") if state.iteration.update >= 6 else state), ()


LAWS = {
    "pure": check_pure,
    "resumable": check_resumable,
    "rank agreement": check_rank_agreement,
    "composition": lambda callback, examples: check_composition(callback, notes, stops, examples=examples),
    "independence": lambda callback, examples: check_independent(callback, notes, examples=examples),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("interval", "n"), [("every_n_epochs", 1), ("every_n_updates", 2), ("every_n_samples", 3)])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_callback_obeys_every_law(name, interval, n, law):
    examples = examples_of(name, interval, n, at_end=True, **SOONER.get(name, {}))
    reads_weights = any(key.startswith("weights/") for example in examples for key in example.consumes)
    LAWS[law](compose(*([AVERAGES] if reads_weights else []), *examples), examples=6)
