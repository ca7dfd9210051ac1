"""Callbacks of a module, which a spawned process imports by name."""

import functools

from noether.core.callbacks import OnlineLossCallback
from noether.core.combinators import callback, every_n_updates, on, when
from noether.core.effect import LogText
from noether.core.event import AfterEpoch, AfterUpdate, BeforeTraining
from noether.core.reducer import compose
from noether.core.schedules.schedule import EveryNUpdates
from noether.core.state import TrainState
from noether.core.wrappers import bind_settings


def plain(state, event, *, text="plain"):
    return state, (LogText(text),) if isinstance(event, AfterUpdate) else ()


@every_n_updates(2)
def gated(state, event, *, text="gated"):
    return state, (LogText(text),)


@callback("seen", init=lambda state: 0, track=lambda seen, event: seen + event.samples)
@every_n_updates(3, at_end=True)
def tracked(state, event):
    return state, (LogText(f"seen {state.memory('seen')}"),)


@on(AfterUpdate)
@when(lambda state, event: state.iteration.update % 2 == 1)
def odd(state, event):
    return state, (LogText("odd"),)


class Group:
    """Callbacks below a class, which have qualified names."""

    @staticmethod
    @every_n_updates(2)
    def inner(state, event):
        return state, (LogText("inner"),)


EXAMPLES = {
    "plain": plain,
    "gated": gated,
    "tracked": tracked,
    "odd": odd,
    "class member": Group.inner,
    "function behind a second gate": every_n_updates(5)(plain),
    "function inside of a decorator": every_n_updates(3)(gated.__wrapped__),
    "settings": bind_settings(gated, {"text": "other"}),
    "settings of a plain function": bind_settings(plain, {"text": "other"}),
    "partial": functools.partial(plain, text="partial"),
    "partial in a gate": when(EveryNUpdates(2) | EveryNUpdates(3))(functools.partial(plain, text="partial")),
    "class": OnlineLossCallback(every_n_updates=2),
    "reducer": compose(gated, tracked, compose(odd, plain), OnlineLossCallback(every_n_updates=2)),
    "decorated reducer": every_n_updates(4)(compose(plain, callback("both")(compose(plain, odd)))),
}


def texts_of_a_run(member):
    """Return what `member` requests in six updates and an epoch, as text."""
    reducer, found = compose(member), []
    state, _ = reducer(TrainState(), BeforeTraining())
    for update in range(6):
        event = AfterUpdate(samples=4, losses={"total": float(update)})
        state, effects = reducer(state.advance(samples=4), event)
        found.append(repr(effects))
    return [*found, repr(reducer(state.next_epoch(), AfterEpoch())[1])]


def texts_by_name(examples):
    return {name: texts_of_a_run(each) for name, each in examples.items()}
