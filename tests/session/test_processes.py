"""A training on several processes, and evaluation data that is split over processes, are refused."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from noether import BeforeTraining, Run, Session, TrainState, compose, dispatch, forward
from noether.core.callbacks import OfflineLossCallback
from noether.core.shards import ShardedDataError
from noether.session.processes import ProcessesError, refuse_several_processes


@pytest.mark.parametrize("value", ["", " ", "1", "none"])
def test_a_single_process_is_not_refused(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    refuse_several_processes("noether export")


def test_a_command_for_one_process_is_refused_on_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = (
        r"one of 2 processes \(WORLD_SIZE=2, as torchrun sets it\), and noether export works in one: start it without"
    )
    with pytest.raises(ProcessesError, match=message):
        refuse_several_processes("noether export")


def test_processes_that_a_launcher_started_are_refused_before_a_plain_loop(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    session = Session([], interpreter=lambda *_: None, model=nn.Linear(1, 1))
    message = r"this is one of 2 processes \(WORLD_SIZE=2, as torchrun sets it\).* no process group.* unset WORLD_SIZE"
    with pytest.raises(ProcessesError, match=message):
        session.batches([torch.ones(1)])
    session.begin()  # a framework knows how many processes train together


def sharded(replicas):
    data = torch.ones(4, 1)
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, num_replicas=replicas, rank=0))


def error(outputs, batch):
    return {"total": outputs.square().mean()}


def test_a_share_of_the_data_is_refused_by_a_session():
    message = r"data\['val'\] yields one of 2 shares: its DistributedSampler has num_replicas=2, .* the whole data set"
    with pytest.raises(ShardedDataError, match=message):
        Session([], interpreter=lambda *_: None, model=nn.Linear(1, 1), data={"val": sharded(2)}, loss=error)
    Session([], interpreter=lambda *_: None, model=nn.Linear(1, 1), data={"val": sharded(1)}, loss=error)


def test_a_share_of_the_data_is_refused_by_a_plain_loop():
    model = nn.Linear(1, 1)
    reducer = compose(OfflineLossCallback(every_n_epochs=1, dataset_key="val"))
    for replicas in (1, 2):
        run = Run(data={"val": sharded(replicas)}, forward=forward(model, error))
        with pytest.raises(ShardedDataError) if replicas > 1 else nullcontext():
            dispatch(TrainState.from_module(model), BeforeTraining(run=run), reducer, lambda *_: None)
