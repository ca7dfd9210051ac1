"""The state of a run in the checkpoints of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from noether.core.tensors.live.loading import find_problems, write_model
from noether.core.tensors.live.optimizer import write_optimizer
from noether.core.tensors.live.weights import raise_mismatch
from noether.effects.checkpoints.state_codec import encode_state
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import make_directories, replace_file
from noether.effects.disk.tensor_files import read_tensors, tensor_pieces
from noether.session.generators import take_states, unpack_states, warn_without_states
from noether.session.scheduler import SchedulerMemory, position

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import TrainingArguments

    from noether.core.state import TrainState

FILE: Final = "noether.safetensors"
"""File with the state of the run in a checkpoint of transformers."""


def to_checkpoint(saved: TrainState, trainer: Trainer) -> str:
    """Write a state as a checkpoint of transformers and return its path, to resume from it.

    The path is in `args.output_dir`, with the name that transformers gives a checkpoint after the same updates.

    Args:
        saved: A state that a `NoetherCallback` saved, such as `open_run("runs/mine").load()`.
        trainer: A new trainer for the same model; the weights and the optimizer state are written into it.

    Raises:
        MismatchError: If the state does not fit the model and the optimizer; nothing is written then.
        ValueError: If the trainer has no model yet.
    """
    path = checkpoint_path(trainer.args, saved.iteration.update)
    model, optimizer = trainer.model, trainer.create_optimizer()
    if model is None:
        raise ValueError("the trainer has a model_init and no model yet: give Trainer(model=...)")
    raise_mismatch(find_problems(model, optimizer, saved))
    write_model(model, saved)
    write_optimizer(saved.opt_state, model, optimizer, lr_scale=1.0)
    trainer.save_model(str(path))
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    scheduler = trainer.lr_scheduler  # None if the trainer creates it in `train`
    scheduler_state = position(saved) if scheduler is None else SchedulerMemory(scheduler).state_dict(saved)
    torch.save(scheduler_state, path / "scheduler.pt")
    exported = [each for each in (*trainer.callback_handler.callbacks, trainer.control) if hasattr(each, "state")]
    state = TrainerState(
        global_step=saved.iteration.update,
        train_batch_size=trainer.args.train_batch_size,
        stateful_callbacks=exported,
    )
    # transformers compares these with its arguments and warns if they differ.
    state.compute_steps(trainer.args, trainer.args.max_steps)
    state.save_to_json(str(path / "trainer_state.json"))
    write_memory(path, encode_state(saved))
    _write_generators(path, saved)
    return str(path)


def _write_generators(path: Path, saved: TrainState) -> None:
    """Write the states of random generators as transformers reads them."""
    _, states = take_states(saved)
    if states is None:
        warn_without_states()
        return
    known = unpack_states(states)
    if cuda := known.pop("cuda"):
        known["cuda"] = cuda[torch.cuda.current_device()] if torch.cuda.is_available() else cuda[0]
    torch.save({"cpu": known.pop("torch"), **known}, path / "rng_state.pth")


def checkpoint_path(args: TrainingArguments, update: int) -> Path:
    """Return the folder of the checkpoint that transformers writes after `update` updates."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{update}"


def write_memory(checkpoint: Path, memory: Mapping[str, Any]) -> None:
    """Write what `Session.state_dict` returned into the folder of a checkpoint."""
    make_directories(checkpoint, DISK)
    replace_file(checkpoint / FILE, tensor_pieces(memory["tensors"], state=memory["state"]), DISK)


def read_memory(checkpoint: Path) -> dict[str, Any]:
    """Return what `write_memory` wrote into the folder of a checkpoint.

    Raises:
        FileNotFoundError: If the checkpoint does not contain the state of a run.
    """
    path = checkpoint / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the checkpoint was written without NoetherCallback and has no state of the run; train "
            "without the callback, or resume from a checkpoint that it wrote"
        )
    tensors, facts = read_tensors(path.read_bytes())
    return {"state": facts["state"], "tensors": tensors}
