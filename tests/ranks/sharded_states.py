"""States whose tensors are shards on several ranks, of all kinds that checkpoints have to keep."""

import torch

from noether import TrainState


def full_tensors():
    """Return the whole tensors by name."""
    generator = torch.Generator().manual_seed(3)
    return {
        "uneven": torch.randn(7, 4, generator=generator),
        "one_row": torch.randn(1, 4, generator=generator),
        "image": torch.randn(5, 3, 4, 2, generator=generator).to(memory_format=torch.channels_last),
        "half": torch.randn(9, generator=generator).bfloat16(),
        "counts": torch.arange(11),
        "mask": torch.arange(6) % 2 == 0,
        "empty": torch.empty(0, 3),
        "complex": torch.randn(4, generator=generator, dtype=torch.complex128),
    }


def sharded_tensors(world_size, replicated=()):
    """Return the tensors as DTensors over all ranks, of which those in `replicated` are whole on each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    return {
        name: distribute_tensor(tensor, mesh, [Replicate() if name in replicated else Shard(0)])
        for name, tensor in full_tensors().items()
    }


def state_of(tensors, updates=1):
    """Return a state after some updates that has the tensors in every part of it, and a tied name."""
    state = TrainState(
        params=tensors,
        buffers={"running_mean": torch.arange(4.0), "scale": torch.tensor(2.5)},
        tied_names={"head": "uneven"},
        opt_state={"state": {name: {"exp_avg": each, "step": torch.tensor(3.0)} for name, each in tensors.items()}},
        callback_states={"weights/ema=0.9": {"params": tensors, "buffers": {}}, "seen": updates},
    )
    for _ in range(updates):
        state = state.advance(samples=4)
    return state
