"""A run that is cut at any update and resumed equals the uncut run bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_examples import examples, rotate
from plain_loop import SCHEDULERS, Loop, Points, make_model
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

import noether
from noether.session.errors import ResumeWarning
from noether.testing import assert_same

SAVE = noether.CheckpointCallback(every_n_updates=1, save_weights=True, save_optim=True)


def acting_callbacks():
    """Return every shipped callback that acts or remembers, in an order in which they fit together."""
    return [
        noether.NanGuardCallback(every_n_updates=2, tolerance=1, action="rollback"),
        noether.OnlineLossCallback(every_n_updates=2),
        noether.OnlineLossCallback(every_n_epochs=1),
        noether.LrCallback(every_n_updates=1),
        noether.GradNormCallback(every_n_updates=3),
        noether.EMACallback(every_n_epochs=1, target_factors=(0.9,)),
        noether.EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", "accuracy")),
        noether.OfflineLossCallback(every_n_updates=3, dataset_key="val", weights="ema=0.9"),
        noether.ReduceLROnPlateauCallback(
            every_n_epochs=1, metric_key="loss/val/total", tolerance=1, factor=0.5, min_delta=100.0
        ),
        noether.BestCheckpointCallback(every_n_epochs=1, metric_key="val/accuracy"),
    ]


ENDINGS = {
    "end": [],
    "fixed": [noether.FixedUpdateEarlyStopping(stop_at_update=5)],
    "metric": [
        noether.MetricEarlyStopping(
            every_n_epochs=1, metric_key="val/accuracy", tolerance=1, min_delta=2.0, mode="higher"
        )
    ],
}


def spoil(model, update):
    """Make the gradients of one update NaN, which the guard rolls back."""
    if update == 4:
        next(model.parameters()).grad.fill_(float("nan"))


@examples(25, quick=8)
@given(
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    accumulation=st.sampled_from([1, 2, 4]),
    precision=st.sampled_from([None, torch.bfloat16]),
    ending=st.sampled_from(sorted(ENDINGS)),
    leave=st.sampled_from(["raise", "break"]),
    cuts=st.lists(st.integers(1, 17), max_size=3),
)
def test_uncut_equals_cut_anywhere(tmp_path_factory, scheduler, accumulation, precision, ending, leave, cuts):
    path = tmp_path_factory.mktemp("runs")
    callbacks = [*acting_callbacks(), *ENDINGS[ending], SAVE]
    whole, cut = (
        Loop(path / name, callbacks, scheduler, accumulation, precision, before_step=spoil) for name in ("whole", "cut")
    )
    whole.train()
    for update in sorted(cuts):
        cut.train(cut=update, leave=leave)
    cut.train()
    assert_same(cut.result(), whole.result())
    assert cut.log == whole.log
    assert whole.session.state.ended
    assert ending == "end" or whole.session.stop


def test_a_loop_that_is_left_by_break_saves_and_resumes(tmp_path):
    whole, cut = (Loop(tmp_path / name, [noether.OnlineLossCallback(every_n_epochs=1)]) for name in ("whole", "cut"))
    whole.train()
    for update in (2, 6, 11):
        assert cut.train(cut=update, leave="break").state.iteration.update == update
    cut.train()
    assert_same(cut.result(), whole.result())
    assert cut.log == whole.log


class Streamed(IterableDataset):
    def __iter__(self):
        points = Points(22, 1)
        yield from (points[index] for index in torch.randperm(22))


class Counting(RandomSampler):
    """Its order depends on how often it was iterated."""

    calls = 0

    def __iter__(self):
        self.calls = self.calls + 1
        yield from torch.randperm(22, generator=torch.Generator().manual_seed(self.calls)).tolist()


class Numbers:
    """A sampler with a generator of numpy."""

    def __init__(self):
        self.generator = np.random.default_rng(3)

    def __len__(self):
        return 22

    def __iter__(self):
        yield from self.generator.permutation(22).tolist()


class Epochs:
    """A sampler with `set_epoch`."""

    def __init__(self):
        self.epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 22

    def __iter__(self):
        yield from torch.randperm(22, generator=torch.Generator().manual_seed(self.epoch)).tolist()


POINTS = Points(22, 1)
LOADERS = {
    "workers": lambda: DataLoader(POINTS, batch_size=4, shuffle=True, num_workers=2),
    "generator": lambda: DataLoader(POINTS, batch_size=4, shuffle=True, generator=torch.Generator()),
    "weighted": lambda: DataLoader(POINTS, batch_size=4, sampler=WeightedRandomSampler(torch.rand(22), 22)),
    "replacement": lambda: DataLoader(
        POINTS, batch_size=4, sampler=RandomSampler(POINTS, replacement=True, generator=torch.Generator())
    ),
    "numpy": lambda: DataLoader(POINTS, batch_sampler=BatchSampler(Numbers(), 4, drop_last=False)),
    "set_epoch": lambda: DataLoader(POINTS, batch_size=4, sampler=Epochs()),
    "streamed": lambda: DataLoader(Streamed(), batch_size=4),
    "list": lambda: [
        tuple(map(torch.stack, zip(*[POINTS[i] for i in range(at, at + 4)], strict=True))) for at in (0, 9)
    ],
}


@pytest.mark.parametrize(("loader", "accumulation"), rotate([(loader,) for loader in LOADERS], [(4,), (1,)]))
@pytest.mark.filterwarnings("error::noether.session.errors.ResumeWarning")
def test_every_loader_resumes_exactly(loader, accumulation, tmp_path):
    make = LOADERS[loader]
    if loader in {"weighted", "list"}:
        made = make()
        make = lambda: made  # noqa: E731  # the weights and batches of the second process are those of the first
    parts = {"loader": make, "accumulation": accumulation}
    whole, cut = (Loop(tmp_path / name, [SAVE], "lambda", **parts) for name in ("whole", "cut"))
    whole.train()
    updates = whole.session.state.iteration.update
    for update in range(1, updates, max(1, updates // 4)):
        cut.train(cut=update)
    cut.train()
    assert_same(cut.result(), whole.result())


def test_hidden_state_is_named_once(tmp_path):
    sampler = Counting(POINTS)
    loop = Loop(tmp_path / "run", [SAVE], loader=lambda: DataLoader(POINTS, batch_size=4, sampler=sampler))
    with pytest.warns(ResumeWarning, match=r"an epoch changed Counting\.calls, .* set_epoch\(epoch\)") as caught:
        loop.train()
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: iter(DataLoader(POINTS, batch_size=4)), "the loader is an iterator .* pass an iterable"),
        (lambda: DataLoader(POINTS, batch_size=4, num_workers=1, persistent_workers=True), "persistent_workers=False"),
    ],
)
def test_what_cannot_be_read_again_is_named_at_the_start(loader, message, tmp_path):
    loop = Loop(tmp_path / "run", [SAVE], loader=loader, settings={"max_epochs": 1})
    with pytest.warns(ResumeWarning, match=message):
        loop.train()


def test_an_evaluation_leaves_the_generators_of_the_loop_as_they_were(tmp_path):
    """Losses with and without evaluations are equal, whatever the validation loader draws."""
    evaluate = [noether.OfflineLossCallback(every_n_updates=1, dataset_key="val")]
    first, second = Loop(tmp_path / "with", evaluate), Loop(tmp_path / "without", [])
    first.train()
    second.train()
    assert_same(first.result()["weights"], second.result()["weights"])


def test_the_seed_changes_the_run(tmp_path):
    runs = [Loop(tmp_path / str(seed), [], settings={"max_epochs": 1, "seed": seed}) for seed in (0, 1)]
    weights = [(run.train(), run.result()["weights"])[1] for run in runs]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_saved_run_needs_the_accumulation_that_it_was_made_with(tmp_path):
    Loop(tmp_path / "run", [SAVE]).train(cut=2)
    message = "2 batches into an epoch, with accumulation=1, and this session has accumulation=2: pass what the run was"
    with pytest.raises(ValueError, match=message):
        Loop(tmp_path / "run", [SAVE], accumulation=2).train()


def test_a_saved_run_needs_its_seed(tmp_path):
    Loop(tmp_path / "run", [SAVE]).train(cut=2)
    with pytest.raises(ValueError, match="the saved run has seed 0, and this session 1: pass the saved seed="):
        Loop(tmp_path / "run", [SAVE], settings={"max_epochs": 3, "seed": 1}).train()


def test_an_error_in_a_callback_saves_no_state_that_the_model_is_ahead_of(tmp_path):
    @noether.on(noether.AfterUpdate)
    def fail(state, event):
        if state.iteration.update == 3 and fails:
            raise ZeroDivisionError
        return state, ()

    fails = False
    whole, cut = Loop(tmp_path / "whole", [fail]), Loop(tmp_path / "cut", [fail])
    whole.train()
    fails = True
    with pytest.raises(ZeroDivisionError):
        cut.train()
    fails = False
    cut.train()
    assert_same(cut.result(), whole.result())


def test_a_loop_that_is_left_after_its_directory_was_closed_was_saved_there(tmp_path, caplog):
    loop = Loop(tmp_path / "run", [])
    loop.train(cut=2, leave="hold")
    assert (tmp_path / "run/checkpoints/E0_U2_S8").is_dir()
    loop.batches.close()
    assert "without an open directory" not in caplog.text


def test_a_model_that_draws_in_evaluations_resumes_exactly(tmp_path):
    """Evaluations on a list of batches draw from the global generators, which are seeded for them."""

    class Noisy(torch.nn.Module):
        def forward(self, outputs):
            return outputs + torch.rand_like(outputs)

    evaluate = noether.OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    parts = {"val": list(DataLoader(POINTS, batch_size=11)), "head": Noisy}
    whole, cut = Loop(tmp_path / "whole", [evaluate, SAVE], **parts), Loop(tmp_path / "cut", [evaluate, SAVE], **parts)
    whole.train()
    cut.train(cut=6, leave="hold")
    cut.train()
    assert_same(cut.result(), whole.result())


def test_every_n_epochs_fires_and_totals_are_added(tmp_path):
    loop = Loop(tmp_path / "run", [noether.OnlineLossCallback(every_n_epochs=1)])
    loop.train()
    assert loop.log.count("loss/online/total/E1") == 3
    assert list(itertools.islice(loop.session.state.metrics, 3)) == [
        "loss/online/ce/E1", "loss/online/size/E1", "loss/online/total/E1"
    ]  # fmt: skip


def test_a_plain_loop_resumes_what_a_session_saved(tmp_path):
    Loop(tmp_path / "run", [SAVE, noether.OnlineLossCallback(every_n_epochs=1)]).train(cut=3, leave="break")
    model, reducer = make_model(), noether.compose(SAVE, noether.OnlineLossCallback(every_n_epochs=1))
    with noether.open_run(tmp_path / "run") as run:
        saved = run.resume()
        assert "session" in saved.callback_states
        state = noether.TrainState.from_module(model, torch.optim.Adam(model.parameters()), saved=saved)
        state = noether.dispatch(state, noether.BeforeTraining(resumed=True), reducer, run.interpreter)
    assert state.iteration == saved.iteration
    assert list(state.callback_states) == ["OnlineLossCallback/E1"]


def test_a_session_resumes_without_a_callback_that_was_removed(tmp_path):
    Loop(tmp_path / "run", [SAVE, noether.OnlineLossCallback(every_n_epochs=3)]).train(cut=3, leave="break")
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())

    def resume(**settings):
        with noether.open_run(tmp_path / "run", **settings) as run:
            session = noether.Session([SAVE], directory=run, model=model, optimizer=optimizer)
            next(session.batches([(torch.ones(4, 3), torch.ones(4))] * 10))
            return session.state

    with pytest.raises(LookupError, match=r"drop_memory=\['OnlineLossCallback/E3'\]"):
        resume()
    assert list(resume(drop_memory=["OnlineLossCallback/E3", "a name that it lacks"]).callback_states) == ["session"]
