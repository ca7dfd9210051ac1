"""Settings that choose parameters by name accept each name of a tied one: parts, averages, groups, saved weights."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_runs import CALLBACKS, make_config
from torch import nn

from noether import BeforeTraining, Run, SaveCheckpoint, Session, TrainingIteration, TrainState, open_run
from noether.config import ConfigError
from noether.config.optimizer_settings import DEFAULT_GROUP, ParamGroup
from noether.core.callbacks import CheckpointCallback, EMACallback
from noether.core.errors import SettingsError
from noether.core.tensors.live.weights import MismatchError
from noether.testing import check_resumable
from noether.training.runs.train import train
from noether.training.step.layout import assign_groups
from noether.training.weights import fit_weights

TIED = """
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.emb(x))
"""
PARTS = [
    {"kind": f"{CALLBACKS}.EMACallback", "target_factors": [0.9], "model_paths": ["head"]},
    {"kind": f"{CALLBACKS}.CheckpointCallback", "save_latest_optim": False, "model_names": ["head"]},
    {"kind": f"{CALLBACKS}.BestCheckpointCallback", "metric_key": "loss/online/square/U1", "model_names": ["head"]},
]
LOSS = {"kind": f"{CALLBACKS}.OnlineLossCallback", "every_n_updates": 1}


class Tied(nn.Module):
    """Has its first parameter under another name, too; `head_first` decides which name is the first."""

    def __init__(self, *, head_first=False, tie=True):
        super().__init__()
        layers = {"emb": nn.Linear(2, 2), "head": nn.Linear(2, 2)}
        for name in sorted(layers, reverse=head_first):
            self.add_module(name, layers[name])
        if tie:
            self.head.weight = self.emb.weight


def tied_config(*callbacks, **more):
    Path("tiny.py").write_text(Path("tiny.py").read_text() + TIED)
    config = make_config(max_epochs=1, **more)
    return config | {"model": {"kind": "tiny.Tied"}, "callbacks": [LOSS, *callbacks]}


@pytest.mark.parametrize("part", PARTS, ids=[part["kind"].rpartition(".")[2] for part in PARTS])
def test_a_checkpoint_of_a_part_holds_the_tied_weights_of_the_part(tiny_module, part):
    run = train(tied_config({**part, "every_n_epochs": 1}))
    files = [path / "weights.safetensors" for path in (run.directory / "checkpoints").iterdir() if path.is_dir()]
    parts = [weights for weights in map(load_file, files) if "emb.bias" not in weights]
    assert parts
    for weights in parts:
        assert weights.keys() == {"head.weight", "head.bias"}
        nn.Linear(2, 2).load_state_dict({name.removeprefix("head."): each for name, each in weights.items()})
        if "model_names" in part:
            assert torch.equal(weights["head.weight"], run.state.params["emb.weight"])


def test_an_average_of_a_part_is_that_of_its_tied_weights():
    state = TrainState.from_module(Tied())
    ema = EMACallback(every_n_updates=1, target_factors=(0.5,), model_paths=("head",))
    averages = ema.init(state)["weights/ema=0.5"]["params"]
    assert averages.keys() == {"emb.weight", "head.bias"}
    with pytest.raises(SettingsError, match=r"'heads' names no sub-module .* has emb, head; did you mean 'head'"):
        EMACallback(every_n_updates=1, target_factors=(0.5,), model_paths=("heads",)).init(state)
    check_resumable(ema, model=Tied(), examples=5)


def test_the_size_of_a_checkpoint_counts_each_name():
    state = TrainState.from_module(Tied())
    run = Run(end=TrainingIteration(epoch=1), updates_per_epoch=2, samples_per_epoch=4, effective_batch_size=2)
    for models, numbers in (((), 12), (("head",), 6), (("emb", "head"), 12)):
        callback = CheckpointCallback(every_n_epochs=1, model_names=models, save_latest_optim=False)
        (line,) = callback(state, BeforeTraining(run=run))[1]
        assert f"({numbers * 4} B)" in line.text


def group(name, *match, **more):
    return ParamGroup(name=name, match=match, **more)


NAMES = ["emb.weight", "emb.bias", "head.bias"]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([group("head", "head.weight")], {"head": ("emb.weight",), DEFAULT_GROUP: ("emb.bias", "head.bias")}),
        ([group("head", "head.*"), group("rest", "*")], {"head": ("emb.weight", "head.bias"), "rest": ("emb.bias",)}),
        ([group("all", "*.weight")], {"all": ("emb.weight",), DEFAULT_GROUP: ("emb.bias", "head.bias")}),
        ([group("fixed", "head.weight", frozen=True)], {DEFAULT_GROUP: ("emb.bias", "head.bias")}),
    ],
    ids=["an alias", "a part and the rest", "both names", "frozen"],
)
def test_groups_match_each_name_of_a_parameter(groups, expected):
    assert assign_groups(NAMES, groups, frozenset(), {"head.weight": "emb.weight"})[0] == expected


def test_two_groups_that_match_different_names_of_one_parameter_are_refused():
    groups = [group("one", "emb.*"), group("two", "head.*", frozen=True)]
    with pytest.raises(SettingsError, match=r"groups.two.match: matches 'head.weight', and the group 'one' .*'emb.we"):
        assign_groups(NAMES, groups, frozenset(), {"head.weight": "emb.weight"})


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=4))
def test_groups_are_those_of_the_plain_names_where_nothing_is_tied(patterns):
    groups = [group(f"g{index}", f"{letter}*", frozen=frozen) for index, (letter, frozen) in enumerate(patterns)]
    names = ["a1", "b1", "c1", "d1"]
    members, trained = assign_groups(names, groups, frozenset())
    for name in names:
        first = next((each for each in groups if each.match[0][0] == name[0]), None)
        owner = DEFAULT_GROUP if first is None else first.name
        assert (name in trained) == (first is None or not first.frozen)
        assert name not in trained or name in members[owner]


def test_a_configured_group_takes_an_alias_and_its_errors_name_the_line(tiny_module):
    optimizer = {"groups": [{"name": "head", "match": ["head.weight"], "lr": 0.0}]}
    config = tied_config(optimizer=optimizer)
    run = train(config)
    assert run.finished
    config["optimizer"]["groups"].append({"name": "emb", "match": ["emb.*"], "lr": 0.5})
    with pytest.raises(ConfigError, match=r"optimizer.groups\[1\].match: matches 'emb.weight', and the group 'head'"):
        train(config)


@pytest.mark.parametrize("head_first", [False, True])
def test_saved_weights_load_whichever_name_is_the_first(head_first):
    saved = TrainState.from_module(Tied(head_first=not head_first))
    model = Tied(head_first=head_first)
    saved.into_module(model)
    name = "emb.weight" if head_first else "head.weight"
    assert torch.equal(model.head.weight, saved.params[name])
    fresh = Tied(head_first=head_first)
    ours = TrainState.from_module(fresh)
    fitted = fit_weights(ours, saved, fresh)
    assert fitted.params.keys() == ours.params.keys()
    assert fitted.tied_names == ours.tied_names


def test_untied_weights_load_into_a_tied_model_only_where_they_agree():
    untied, model = Tied(tie=False), Tied()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(MismatchError, match=r"'emb.weight' and 'head.weight' have different values, and are one"):
        TrainState.from_module(untied).into_module(model)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    with torch.no_grad():
        untied.head.weight.copy_(untied.emb.weight)
    TrainState.from_module(untied).into_module(model)
    assert torch.equal(model.head.weight, untied.emb.weight)


def test_a_state_shows_names_that_are_tied_later():
    model = Tied(tie=False)
    state = TrainState.from_module(model)
    assert state.tied_names == {}
    model.head.weight = model.emb.weight
    assert state.tied_names == {"head.weight": "emb.weight"}
    assert SaveCheckpoint(models=("head",)).models == ("head",)


def test_a_loop_of_the_users_saves_averages_and_resumes_tied_weights(tmp_path):
    def run_until(updates, *, tie=True):
        torch.manual_seed(0)
        model = Tied(tie=tie)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        callbacks = [
            EMACallback(every_n_updates=1, target_factors=(0.5,), model_paths=("head",)),
            CheckpointCallback(every_n_updates=1),
            CheckpointCallback(every_n_updates=1, id="part", model_names=("head",), save_latest_optim=False),
        ]
        with open_run(tmp_path / "run") as directory:
            session = Session(callbacks, directory=directory, model=model, optimizer=optimizer, max_updates=updates)
            for batch in session.batches([torch.ones(2, 2)] * 4):
                loss = model.head(model.emb(batch)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                session.update(loss)
        return model

    run_until(2)
    model = run_until(3)
    checkpoints = tmp_path / "run/checkpoints"
    whole, part, average = (
        load_file(checkpoints / (checkpoints / pointer).read_text().split()[0] / "weights.safetensors")
        for pointer in ("latest", "latest.head", "last.ema=0.5")
    )
    Tied().load_state_dict(whole)
    assert all(torch.equal(each, whole[name]) for name, each in model.state_dict().items())
    assert part == {name: each for name, each in part.items() if torch.equal(each, whole[name])}
    assert part.keys() == average.keys() == {"head.weight", "head.bias"}
    with pytest.raises(MismatchError, match=r"parameter 'head.weight' is not in the state"):
        run_until(4, tie=False)
