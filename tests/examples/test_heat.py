"""Heat equation example: laws of the solver, the cache, the network and its losses."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from noether.config.loading import load
from noether.core.errors import SettingsError
from noether.core.progress import show_progress_on
from noether.core.tensors.batch import batch_size, model_arguments, target_of
from noether.examples import heat
from noether.examples.heat import DIFFUSIVITY, GRADIENT_WEIGHT, FourierNet, HeatFields, losses, relative_l2, solve
from noether.training.experiment import build

ROOT = Path(__file__).parents[2]
SIZE = 8

sizes = st.integers(4, 12)
seeds = st.integers(0, 2**32 - 1)
times = st.floats(0, 5)
factors = st.floats(-10, 10)


def noise(size, seed, *leading):
    return np.random.default_rng(seed).standard_normal((*leading, size, size))


def close(left, right):
    return np.allclose(left, right, rtol=1e-9, atol=1e-12)


# The solver.


@given(sizes, seeds, times, times)
def test_solving_twice_is_solving_for_the_sum_of_the_times(size, seed, first, second):
    field = noise(size, seed)
    assert close(solve(solve(field, first), second), solve(field, first + second))


@given(sizes, seeds)
def test_solving_for_time_zero_changes_nothing(size, seed):
    field = noise(size, seed)
    assert close(solve(field, 0), field)


@given(sizes, seeds, times)
def test_heat_is_conserved_and_evens_out(size, seed, time):
    field = noise(size, seed)
    after = solve(field, time)
    assert close(after.mean(), field.mean())
    assert after.std() <= field.std() + 1e-12


@given(sizes, seeds, times, factors, factors)
def test_the_solver_is_linear(size, seed, time, one, other):
    left, right = noise(size, seed, 2)
    assert close(solve(one * left + other * right, time), one * solve(left, time) + other * solve(right, time))


@given(sizes, seeds, times, st.integers(-12, 12), st.integers(-12, 12))
def test_the_solver_commutes_with_shifts(size, seed, time, down, right):
    field, shift = noise(size, seed), {"shift": (down, right), "axis": (0, 1)}
    assert close(solve(np.roll(field, **shift), time), np.roll(solve(field, time), **shift))


@given(sizes, seeds)
def test_fields_of_a_batch_are_solved_for_their_times(size, seed):
    fields, times = noise(size, seed, 3), [0.0, 0.5, 2.0]
    separately = [solve(field, time) for field, time in zip(fields, times, strict=True)]
    assert close(solve(fields, times), separately)


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 2), (3, -2)])
def test_a_single_mode_decays_as_computed_by_hand(down, right):
    points = np.arange(16) / 16
    wave = np.cos(2 * math.pi * np.add.outer(down * points, right * points) + 0.3)
    decay = math.exp(-DIFFUSIVITY * 4 * math.pi**2 * (down**2 + right**2) * 0.7)
    assert close(solve(1.5 + wave, 0.7), 1.5 + decay * wave)


# The fields.


def arrays(fields):
    return {name: torch.stack([sample[name] for sample in fields]).numpy() for name in fields[0]}


def equal(left, right):
    left, right = arrays(left), arrays(right)
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.fixture
def fields(tmp_path):
    def make_fields(split="val", samples=3, folder="cache", size=SIZE):
        return HeatFields(split, size=size, samples=samples, cache=str(tmp_path / folder))

    return make_fields


@pytest.mark.parametrize("size", [7, 8])
def test_samples_have_the_promised_shapes_and_are_solutions(fields, size):
    dataset = fields(samples=5, size=size)
    assert len(dataset) == 5
    stacked = arrays(dataset)
    assert {name: array.shape for name, array in stacked.items()} == {
        "initial": (5, 1, size, size),
        "time": (5,),
        "target": (5, 1, size, size),
    }
    assert {array.dtype for array in stacked.values()} == {np.dtype(np.float32)}
    assert (stacked["time"] >= 0).all()
    assert (stacked["time"] < 1).all()
    solved = solve(stacked["initial"][:, 0], stacked["time"])
    assert np.allclose(stacked["target"][:, 0], solved, atol=1e-6)


def test_initial_fields_have_mean_0_and_variance_1_and_times_are_uniform(fields):
    stacked = arrays(fields("train", samples=2000))
    assert abs(stacked["initial"].mean()) < 0.05
    assert abs(stacked["initial"].var() - 1) < 0.05
    assert np.allclose(np.quantile(stacked["time"], [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)


def test_batches_follow_the_conventions_of_the_library(fields):
    batch = default_collate(list(fields()))
    assert batch_size(batch) == 3
    assert set(model_arguments(FourierNet(), batch)[1]) == {"initial", "time"}
    assert target_of(batch) is batch["target"]


def test_fields_do_not_depend_on_the_cache_directory(fields):
    assert equal(fields(folder="here"), fields(folder="there"))
    assert not equal(fields("train"), fields("val"))


def test_the_first_samples_do_not_depend_on_the_number_of_samples(fields):
    few, more = fields(samples=2), fields(samples=5)
    assert equal(few, [more[0], more[1]])


@pytest.mark.parametrize(("split", "samples"), heat.SAMPLES.items())
def test_default_number_of_samples(tmp_path, split, samples):
    assert len(HeatFields(split, size=4, cache=str(tmp_path))) == samples


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tset"}, "split: 'tset' is not one of 'train', 'val', 'test'; did you mean 'test'?"),
        ({"size": 3}, "size: 3 is not a whole number of at least 4"),
        ({"samples": 0}, "samples: 0 is not a whole number of at least 1"),
        ({"size": 8.0, "samples": True}, "size: 8.0 is not .*\nsamples: True is not .*"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(SettingsError, match=message.replace("?", r"\?")):
        HeatFields(**{"split": "val", "cache": str(tmp_path), **settings})
    assert list(tmp_path.iterdir()) == []


# The cache.


def only_file(folder):
    (file,) = folder.iterdir()
    return file


def test_fields_are_generated_once(fields, tmp_path, monkeypatch):
    first = fields()
    written = only_file(tmp_path / "cache").stat()
    monkeypatch.setattr(heat, "_generate", None)
    assert equal(fields(), first)
    again = only_file(tmp_path / "cache").stat()
    assert (again.st_mtime_ns, again.st_ino) == (written.st_mtime_ns, written.st_ino)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
        lambda content: bytes(len(content)),
    ],
    ids=["empty", "digest cut", "half", "last byte lost", "byte added", "digest", "one bit", "zeros"],
)
def test_a_damaged_file_is_generated_again(fields, tmp_path, damage):
    first = fields()
    file = only_file(tmp_path / "cache")
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert equal(fields(), first)
    assert only_file(tmp_path / "cache").read_bytes() == content


@pytest.mark.parametrize("stage", ["write_bytes", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_an_interrupted_write_leaves_nothing(fields, tmp_path, monkeypatch, stage, error):
    def write_partly(path, content):
        if stage == "write_bytes":
            with path.open("wb") as file:
                file.write(content[:10])
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Path, stage, write_partly)
        with pytest.raises((SettingsError, KeyboardInterrupt)) as caught:
            fields()
    assert list((tmp_path / "cache").iterdir()) == []
    if isinstance(error, OSError):
        reason = "cannot be written (No space left on device); give a writable directory"
        assert str(caught.value) == f"cache: '{tmp_path / 'cache'}' {reason}"
    assert len(fields()) == 3


def test_a_cache_that_is_a_file_is_refused(fields, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SettingsError, match=r"cache: .* cannot be written"):
        fields()


def test_concurrent_writers_leave_one_intact_file(fields, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: fields(samples=20), range(8)))
    assert all(equal(datasets[0], other) for other in datasets)
    assert heat._read(only_file(tmp_path / "cache")) is not None  # noqa: SLF001  # intact


def test_the_default_cache_follows_the_xdg_specification(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    HeatFields("val", size=4, samples=1)
    assert only_file(tmp_path / "xdg/noether/heat").name == "v1-val-4x4-1.fields"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        HeatFields("val", size=4, samples=1)
    assert only_file(tmp_path / "home/.cache/noether/heat").name == "v1-val-4x4-1.fields"


def test_generation_shows_its_progress_where_there_is_a_display(fields, capsys):
    shown = []

    class Display:
        def track(self, iterable, description, total=None):
            for done, item in enumerate(iterable):
                shown.append((description, done, total))
                yield item

    with show_progress_on(Display()):
        fields("test")
        count = len(shown)
        fields("test")
    assert shown[0] == ("generating heat fields (test)", 0, None)
    assert len(shown) == count, "cached fields need no progress bar"
    assert capsys.readouterr() == ("", "")


# The network.


def random_batch(seed=0, samples=4):
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, 1, SIZE, SIZE)
    return {
        "initial": torch.randn(shape, generator=generator),
        "time": torch.rand(samples, generator=generator),
        "target": torch.randn(shape, generator=generator),
    }


def small_net(seed=0):
    torch.manual_seed(seed)
    return FourierNet(width=6, modes=3)


def test_heat_drift_is_the_change_of_the_mean():
    batch, net = random_batch(), small_net()
    outputs = net(batch["initial"], batch["time"])
    predicted, before = outputs["field"].detach().numpy(), batch["initial"].numpy()
    by_hand = [abs(float(after.mean()) - float(first.mean())) for after, first in zip(predicted, before, strict=True)]
    assert outputs["heat_drift"].tolist() == pytest.approx(by_hand, abs=1e-6)
    assert min(by_hand) > 1e-4, "an untrained network does not conserve heat"


def test_samples_of_a_batch_are_independent():
    batch, net = random_batch(), small_net()
    together = net(batch["initial"], batch["time"])["field"]
    alone = [net(batch["initial"][[i]], batch["time"][[i]])["field"] for i in range(4)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_network_commutes_with_shifts():
    batch, net = random_batch(), small_net()
    moved = net(batch["initial"].roll((2, -3), dims=(-2, -1)), batch["time"])["field"]
    assert torch.allclose(moved, net(batch["initial"], batch["time"])["field"].roll((2, -3), dims=(-2, -1)), atol=1e-5)


def test_parameters_are_real():
    assert {parameter.dtype for parameter in FourierNet().state_dict().values()} == {torch.float32}


def test_the_network_runs_in_bfloat16():
    batch = random_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small_net()(batch["initial"], batch["time"])["field"].isfinite().all()


def test_more_modes_than_the_grid_has_are_refused():
    with pytest.raises(ValueError, match="a grid of 8 x 8 has no 5 modes; set modes to 4 or less"):
        FourierNet(width=2, modes=5)(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    with pytest.raises(SettingsError, match="width: 0 is not"):
        FourierNet(width=0)


def test_every_parameter_has_a_gradient_of_each_loss():
    batch, net = random_batch(), small_net()
    for loss in losses(net(batch["initial"], batch["time"]), batch).values():
        gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
        named = dict(zip(dict(net.named_parameters()), gradients, strict=True))
        # A constant has no gradient in space.
        without_gradient = {name for name, gradient in named.items() if gradient is None or not gradient.any()}
        assert without_gradient <= {"head.bias"}
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def test_losses_and_metric_equal_those_computed_with_numpy():
    batch, outputs = random_batch(1), {"field": random_batch(2)["target"]}
    pairs = list(zip(outputs["field"].numpy()[:, 0], batch["target"].numpy()[:, 0], strict=True))
    by_hand = [np.linalg.norm(found - right) / np.linalg.norm(right) for found, right in pairs]
    assert relative_l2(outputs, batch).tolist() == pytest.approx(by_hand, rel=1e-5)
    steps = [[np.stack([np.roll(u, -1, axis) - u for axis in (0, 1)]) for u in pair] for pair in pairs]
    slopes = [np.linalg.norm(found - right) / np.linalg.norm(right) for found, right in steps]
    computed = {name: loss.item() for name, loss in losses(outputs, batch).items()}
    assert computed == pytest.approx(
        {"field": np.mean(by_hand), "gradient": GRADIENT_WEIGHT * np.mean(slopes)}, rel=1e-5
    )


def test_the_exact_solution_has_zero_loss_and_gradients_are_finite():
    batch = random_batch()
    assert {loss.item() for loss in losses({"field": batch["target"]}, batch).values()} == {0.0}
    for target in (batch["target"], torch.zeros_like(batch["target"])):
        field = batch["target"].clone().requires_grad_()
        sum(losses({"field": field}, {"target": target}).values()).backward()
        assert field.grad.isfinite().all()


def test_training_reduces_the_error_on_unseen_fields(fields):
    batch, net = default_collate(list(fields("train", samples=32))), small_net()
    unseen = default_collate(list(fields("test", samples=16)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)

    def error():
        with torch.no_grad():
            return relative_l2(net(unseen["initial"], unseen["time"]), unseen).mean().item()

    before = error()
    for _ in range(60):
        optimizer.zero_grad()
        sum(losses(net(batch["initial"], batch["time"]), batch).values()).backward()
        optimizer.step()
    assert error() < before / 3


def test_the_shipped_configuration_makes_an_update(tmp_path):
    small = {"size": 16, "samples": 8, "cache": tmp_path}
    overrides = [f"data.{split}.{name}={value}" for split in heat.SPLITS for name, value in small.items()]
    experiment = build(load(ROOT / "configs/heat.yaml", overrides))
    state, outputs = experiment.step(experiment.state, [next(iter(experiment.run.data["val"]))])
    assert set(outputs.losses) == {"field", "gradient", "total"}
    assert outputs.outputs[0]["heat_drift"].shape == (8,)
    assert state.params["lift.weight"] is not experiment.state.params["lift.weight"]
