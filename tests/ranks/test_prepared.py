"""Modules that the user prepared by DDP or `fully_shard`: their states and updates equal those of one process."""

import json

import pytest
import torch
from processes import run_on_ranks
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import noether
from noether import AfterUpdate, Session, TrainState, open_run
from noether.core.callbacks import (
    CheckpointCallback,
    EMACallback,
    GradNormCallback,
    HistogramCallback,
    NanGuardCallback,
    OfflineLossCallback,
)
from noether.core.loop import dispatch
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.shares import share_of
from noether.core.tensors.dtensors import is_distributed, whole_tensor
from noether.core.tensors.tree import map_leaves, tensors
from noether.distributed.ranks import ONE_PROCESS, join
from noether.session.processes import ProcessesError
from noether.testing.array_bits import same_tensors
from noether.training.step.prepared import PreparedStep

SAMPLES = 11
"""Divisible by no number of ranks."""
UPDATES = 4


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 33), torch.nn.LayerNorm(33), torch.nn.ReLU(), torch.nn.Linear(33, 5))


def prepare(kind, model):
    if kind == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0])
    return fully_shard(model)


def loss(outputs, batch):
    return {"ce": cross_entropy(outputs, batch[1])}


def make_batch(update, rank=0, world_size=1):
    generator = torch.Generator().manual_seed(update)
    batch = torch.randn(SAMPLES, 6, generator=generator), torch.randint(5, (SAMPLES,), generator=generator)
    share = share_of(rank, world_size, SAMPLES)
    return [each[share.start : share.stop] for each in batch]


def cut(batch):
    """Return two micro-batches of different sizes."""
    return [[each[:1] for each in batch], [each[1:] for each in batch]]


def whole(tree):
    return map_leaves(lambda leaf: whole_tensor(leaf).clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def callbacks():
    return compose(
        EMACallback(every_n_epochs=1, target_factors=(0.5,)),
        NanGuardCallback(action="rollback", every_n_updates=2, tolerance=1),
        GradNormCallback(every_n_updates=1),
    )


def train(ranks, kind):
    """Return the events and the state of a few updates, with weights that callbacks averaged."""
    model = make_model() if kind is None else prepare(kind, make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    step = PreparedStep(
        model=model,
        loss=loss,
        optimizer=optimizer,
        ranks=ranks,
        lr={"default": lambda update: 0.05 / (1 + update)},
        clip_grad_norm=0.5,
        gradients=True,
    )
    run = Run(world_size=ranks.world_size, rank=ranks.rank, forward=noether.forward(model, loss))
    state, reducer, events, logged = TrainState.from_module(model, optimizer), callbacks(), [], []
    gradients = []
    for update in range(UPDATES):
        state, event = step(state, cut(make_batch(update, ranks.rank, ranks.world_size)))
        event = event.complete(run=run)
        state = dispatch(
            state.advance(samples=event.samples), event, reducer, lambda effects, *_: logged.extend(effects)
        )
        events.append((event.samples, float(event.losses["ce"]), float(event.grad_norm), dict(event.lr)))
        gradients.append(event.gradients)
    assert {"LogScalars"} == {type(effect).__name__ for effect in logged}
    return model, optimizer, state, events, [whole(each) for each in gradients]  # as later updates leave them


def compare_updates(ranks, train_alone, kind):
    _, _, alone, expected, gradients_alone = train_alone
    model, optimizer, state, events, gradients = train(ranks, kind)
    _, _, again, _, _ = train(ranks, kind)
    torch.testing.assert_close([dict(each) for each in gradients], [dict(each) for each in gradients_alone])
    norms = [float(torch.nn.utils.get_total_norm(list(each.values()))) for each in gradients]
    assert norms == pytest.approx([norm for _, _, norm, _ in events])  # before clipping
    for (*numbers, lr), (*others, other_lr) in zip(events, expected, strict=True):
        assert numbers == pytest.approx(others, rel=1e-5)
        assert lr == other_lr
    assert any(map(is_distributed, state.params.values())) == (kind != "ddp")
    trees = [{"params": each.params, "opt": each.opt_state, "memory": each.callback_states} for each in (state, alone)]
    repeated = dict(tensors({"params": again.params, "memory": again.callback_states}))
    found, wanted = (dict(tensors(whole(tree))) for tree in trees)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=2e-5, msg=name)
    for name, tensor in tensors(trees[0]):
        assert name not in repeated or same_tensors(tensor, repeated[name]), name
    compare_evaluations(model, state)
    compare_loading(model, optimizer, state)


def compare_evaluations(model, state):
    """Compare evaluations with the module's own weights and with averages to those of a plain module."""
    predict, plain, batch = noether.forward(model, loss), make_model(1), make_batch(9)
    average = state.callback_states["weights/ema=0.5"]["params"]
    for params in (state.params, average, state.params):
        plain.load_state_dict(whole(params))
        expected = cross_entropy(plain(batch[0]), batch[1])
        torch.testing.assert_close(predict(state.replace(params=params), batch)[0]["ce"], expected)


def compare_loading(model, optimizer, state):
    """Load whole tensors and shards into the module, and roll back to a snapshot."""
    saved = whole({"params": state.params, "opt_state": state.opt_state})
    memory = state.callback_states
    event = AfterUpdate(samples=1, losses={"total": torch.tensor(torch.nan)}, grad_norm=1.0, finite=False)
    rolled_back, _ = callbacks()(state.advance(samples=1), event)
    for source in (state.replace(**saved), rolled_back):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        optimizer.state.clear()
        loaded = TrainState.from_module(model, optimizer, saved=source)
        for part in ("params", "opt_state"):
            expected = saved[part] if source is not rolled_back else whole(getattr(rolled_back, part))
            for (name, tensor), (_, other) in zip(tensors(getattr(loaded, part)), tensors(expected), strict=True):
                assert same_tensors(whole_tensor(tensor), other), name
        assert any(map(is_distributed, loaded.params.values())) == any(map(is_distributed, state.params.values()))
    assert loaded.remember("all", memory).memory("all") == memory


def refuse_shares(ranks):
    messages = []
    for kind, empty in (("ddp", True), ("fsdp", False)):
        model = prepare(kind, make_model())
        step = PreparedStep(model=model, loss=loss, optimizer=torch.optim.SGD(model.parameters()), ranks=ranks)
        batch = make_batch(0)
        batches = ([] if empty else [batch]) if ranks.rank else cut(batch)
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
            step(TrainState.from_module(model), batches)
        messages.append(str(caught.value))
    return messages


def train_in_session(ranks, folder, updates):
    """Train a sharded module in a loop of its own; the run resumes where the folder has one."""
    model = prepare("fsdp", make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    save = CheckpointCallback(every_n_updates=2, save_weights=True, save_optim=True)
    members = [EMACallback(every_n_epochs=1, target_factors=(0.5,)), GradNormCallback(every_n_updates=1), save]
    members.append(HistogramCallback(every_n_updates=2, of=("gradients", "weights"), patterns=("0.*",)))
    guard = NanGuardCallback(action="rollback", every_n_updates=2, tolerance=1)
    check = OfflineLossCallback(every_n_epochs=1, dataset_key="val", weights="ema=0.5")
    loader = [make_batch(update, ranks.rank, ranks.world_size) for update in range(UPDATES)]
    with open_run(folder, ranks=ranks) as directory:
        session = Session(
            [*members, guard, check],
            directory=directory,
            model=model,
            optimizer=optimizer,
            data={"val": DataLoader(TensorDataset(*make_batch(9)), batch_size=4)},  # more batches than ranks
            loss=loss,
            max_updates=updates,
        )
        for batch in session.batches(loader):
            losses = loss(model(batch[0]), batch)
            optimizer.zero_grad()
            losses["ce"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            session.update(losses)
        state = session.state
        trees = {"params": state.params, "opt": state.opt_state, "memory": state.callback_states}
    artifacts = {each.key: each.path.read_text() for each in noether.read_run(directory.path).artifacts}
    parts = [f"{kind}/0.{part}" for kind in ("gradients", "weights") for part in ("bias", "weight")]
    assert sorted(artifacts) == parts
    counted = {key: sum(json.loads(text)["counts"]) for key, text in artifacts.items()}
    assert (counted["gradients/0.weight"], counted["gradients/0.bias"]) == (6 * 33, 33)  # those of both ranks
    return ({key: each.value for key, each in state.metrics.items()}, artifacts), dict(tensors(whole(trees)))


def compare_sessions(ranks, folder):
    """Compare a session that is cut and resumed with one that is not."""
    metrics, uncut = train_in_session(ranks, folder / "uncut", 2 * UPDATES)
    train_in_session(ranks, folder / "cut", UPDATES - 1)
    resumed_metrics, resumed = train_in_session(ranks, folder / "cut", 2 * UPDATES)
    assert metrics == resumed_metrics
    assert metrics[0].keys() >= {"loss/val/ce/ema=0.5", "optim/grad_norm/max/U1"}
    assert uncut.keys() == resumed.keys()
    for name, tensor in uncut.items():
        assert same_tensors(tensor, resumed[name]), name
    model = prepare("fsdp", make_model())
    with (
        open_run(folder / "alone") as directory,
        pytest.raises(ProcessesError, match="of which each rank has to save its part"),
    ):
        Session([], directory=directory, model=model, max_updates=1)


def check_everything(folder):
    ranks = join(timeout_s=60)
    compare_sessions(ranks, folder)
    alone = train(ONE_PROCESS, None)
    for kind in ("ddp", "fsdp"):
        compare_updates(ranks, alone, kind)
    return refuse_shares(ranks)


def test_prepared_modules_train_like_one_process(tmp_path):
    first, second = run_on_ranks(
        check_everything, 2, tmp_path, detail=False
    )  # torch's DDP crashes under its own debug level
    assert first == second
    assert "a rank has no samples in this update" in first[0]
    assert "ranks have different numbers of micro-batches" in first[1]
