"""What the ranks of a session exchange: readings of updates, and proof that they train one model."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final, final

import torch
import torch.distributed as dist
from torch import Tensor

from noether.core.state import TrainState
from noether.core.tensors.checksums import sum_bits
from noether.core.tensors.dtensors import is_distributed, whole_tensor
from noether.core.tensors.module import device_of, named_buffers, named_parameters
from noether.core.tensors.tree import map_leaves
from noether.distributed.launch import launched_world_size
from noether.distributed.ranks import ONE_PROCESS, Ranks, join
from noether.session.evaluation import SharedEvaluationData
from noether.session.losses import mean_losses
from noether.session.processes import ProcessesError
from noether.session.rank_updates import combine_updates, decode_micro_batches, encode_micro_batches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from noether.core.reducer import Reducer
    from noether.core.run import Run
    from noether.effects import RunDirectory
    from noether.session.losses import Losses, MicroBatch

_GROUP: Final = (
    "write torch.distributed.init_process_group() before the Session, and train "
    "torch.nn.parallel.DistributedDataParallel(model), which averages the gradients; if this is the only process, "
    "unset WORLD_SIZE"
)


def ranks_of_model(model: nn.Module, directory: RunDirectory | None) -> Ranks:
    """Return the ranks of the process group that exists, or the only process; start no group.

    Args:
        model: The model of the session.
        directory: Its run directory, if it has one.

    Raises:
        ProcessesError: If the model is sharded over several ranks, and not all of them write to the directory.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ONE_PROCESS
    ranks = join(device=device_of(model.parameters()))
    if not ranks.are_several:
        return ranks
    sharded = [name for name, parameter in named_parameters(model).items() if is_distributed(parameter)]
    if sharded and not (directory is not None and directory.checkpoints.needs_all_ranks(TrainState.from_module(model))):
        raise ProcessesError(
            f"model= is sharded: {sharded[0]!r} is a DTensor, of which each rank has to save its part: pass "
            "directory=noether.open_run(path, ranks=noether.distributed.ranks.join())"
        )
    return ranks


def check_joined(ranks: Ranks, *, launched: bool) -> None:
    """Refuse to train as one of several processes that have no common group, or have it only since the session exists.

    Args:
        ranks: The ranks of the session.
        launched: Whether processes that a launcher such as torchrun started count; a framework may use none of them.

    Raises:
        ProcessesError: If there are several.
    """
    if ranks.are_several:
        return
    if dist.is_available() and dist.is_initialized():
        if (size := dist.get_world_size()) > 1:
            raise ProcessesError(f"the Session was made before the group of {size} processes: make it after")
    elif launched and (size := launched_world_size()) > 1:
        raise ProcessesError(
            f"this is one of {size} processes (WORLD_SIZE={size}, as torchrun sets it), and they have no process "
            f"group, so each would train a model of its own: {_GROUP}"
        )


_AT_START: Final = "as the run begins"
_START_FIXES: Final = {
    "seed": "pass the same seed= on all ranks; the session adds the rank where it draws dropout",
    "state": "load the same checkpoint on all ranks",
    "end": "pass the same max_epochs, max_updates or max_samples on all ranks",
    "updates_per_epoch": "give each rank equally many batches, as torch.utils.data.DistributedSampler does",
    "callbacks": "pass the same callbacks on all ranks",
    "data": "pass loaders of the same kind as data= on all ranks",
}
_WHOLE_DATA: Final = (
    "each rank reads its share of whole batches, so pass a loader of the whole dataset with the same batch_size on all "
    "ranks, not of a Subset, random_split or split_dataset_by_node that differs between ranks"
)


def check_world_size(ranks: Ranks, expected: int, fix: str) -> None:
    """Refuse a framework that trains on other processes than those of the process group.

    Args:
        ranks: The ranks of the session.
        expected: Number of processes as the framework knows it.
        fix: What to write instead.

    Raises:
        ProcessesError: If they differ.

    Example:
        >>> check_world_size(ONE_PROCESS, 2, "pass devices=1")
        Traceback (most recent call last):
        noether.session.processes.ProcessesError: the loop trains on 2 ranks, and the group ... has 1: pass devices=1
    """
    if ranks.world_size != expected:
        raise ProcessesError(
            f"the loop trains on {expected} ranks, and the group of torch.distributed has {ranks.world_size}: {fix}"
        )


@final
class RankExchange:
    """Exchanges readings of a session between its ranks, each in one collective; one process exchanges nothing.

    Args:
        ranks: The ranks of the run.
        model: The model of this rank.
    """

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        self._ranks, self._model = ranks, model

    def gather(self, what: str, readings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the readings of all ranks, in their order.

        Args:
            what: Name of the exchange, for errors of ranks that are elsewhere.
            readings: A tree of JSON values and 0-dimensional tensors, which arrive as numbers.

        Raises:
            RankMismatchError: If another rank exchanges something else.
        """
        content = json.dumps(_read_tensors(readings)).encode()
        return [json.loads(each) for each in self._ranks.control.exchange(what, content)]

    def wait(self, what: str) -> None:
        """Wait until all ranks are here."""
        if self._ranks.are_several:
            self.gather(what, {})

    def load(self, directory: RunDirectory) -> TrainState | None:
        """Return the newest state in a run directory: the one that rank 0 chooses."""
        saved = directory.load() if self._ranks.is_first else None
        if not self._ranks.are_several:
            return saved
        self.wait("the checkpoint to resume from")  # an error of rank 0 ends the others here
        saved = saved if self._ranks.is_first else directory.load()
        parts = self.gather("the loaded checkpoint", {"checkpoint": None if saved is None else str(saved.iteration)})
        shared = f"{directory.path} has to be the same folder on all ranks, on a shared disk"
        check_equal(_AT_START, parts, {"checkpoint": shared})
        return saved

    def compare_batches(self, epoch: int, count: int, *, has_more: bool) -> None:
        """Refuse ranks of which some have another batch, so that some wait for gradients that do not come.

        Args:
            epoch: The epoch.
            count: Batches of it so far.
            has_more: Whether this rank has another one.

        Raises:
            ProcessesError: On all ranks.
        """
        if not self._ranks.are_several:
            return
        parts = self.gather(f"batch {count + 1} of epoch {epoch}", {"has_more": has_more})
        ended = [str(rank) for rank, part in enumerate(parts) if not part["has_more"]]
        if 0 < len(ended) < len(parts):
            raise ProcessesError(
                f"epoch {epoch} has {count} batches on rank {', '.join(ended)} of {len(parts)}, "
                "and more on the others, which would wait for its gradients: give each rank equally many batches, for "
                "example by leaving out the last ones of a stream"
            )

    def begin(self, time_s: float, state: TrainState, run: Run, reducer: Reducer) -> float:
        """Refuse ranks that do not begin the same run, copy the buffers of rank 0 to all, and return its time.

        Args:
            time_s: Time of this rank.
            state: The state at which it begins.
            run: The constants of its run.
            reducer: Its callbacks.

        Raises:
            ProcessesError: If one of them differs between ranks; with the values of all.
        """
        if not self._ranks.are_several:
            return time_s
        given = vars(run)
        readings = {
            "time_s": time_s,
            "seed": state.seed,
            "state": str(state.iteration),
            "end": str(given.get("end")),
            "updates_per_epoch": given.get("updates_per_epoch"),
            "callbacks": repr(reducer),
        }
        data = {
            f"data[{key!r}]": each.describe()
            for key, each in given.get("data", {}).items()
            if isinstance(each, SharedEvaluationData)
        }
        parts = self.gather(_AT_START, {**readings, "data": list(data), **data, **self.digests(params=False)})
        check_equal(_AT_START, parts, {**_START_FIXES, **dict.fromkeys(data, _WHOLE_DATA)})
        self.sync_model(_AT_START, parts)
        return float(parts[0]["time_s"])

    def sync_ranks(self, what: str, time_s: float) -> float:
        """Refuse ranks whose parameters differ, copy the buffers of rank 0 to all, and return the time of rank 0.

        Args:
            what: When this is, such as `after epoch 3`.
            time_s: Time of this rank.
        """
        if not self._ranks.are_several:
            return time_s
        parts = self.gather(what, {"time_s": time_s, **self.digests(params=True)})
        self.sync_model(what, parts)
        return float(parts[0]["time_s"])

    def reduce_micro_batch(self, what: str, micro_batch: MicroBatch, time_s: float) -> tuple[int, Losses, float]:
        """Return the samples of one micro-batch of each rank, the means of their losses, and the time of rank 0."""
        parts = self.gather(what, {"micro_batches": encode_micro_batches([micro_batch]), "time_s": time_s})
        micro_batches = decode_micro_batches(parts)
        losses = mean_losses(micro_batches) if micro_batches else micro_batch.losses
        return sum(each.samples for each in micro_batches), losses, float(parts[0]["time_s"])

    def reduce_update(
        self, what: str, counted: Sequence[MicroBatch], known: Mapping[str, Any], *, params: bool
    ) -> dict[str, Any]:
        """Return the readings of an update over all ranks, as fields of `AfterUpdate`.

        Args:
            what: Name of the update.
            counted: The micro-batches of this rank that have samples.
            known: The readings of this rank, and as `mean` the losses that the loop reported in place of those of its
                micro-batches, or None.
            params: Whether to refuse ranks whose parameters differ.

        Raises:
            ProcessesError: If they do.
            SessionError: If some ranks skipped the update.
        """
        durations = {name: value for name, value in known.items() if name.endswith("_s") and name != "time_s"}
        sent = {
            "micro_batches": encode_micro_batches(counted),
            "skipped": known["skipped"] if counted else None,
            "finite": known["finite"] if counted else None,
            "grad_norm": known.get("grad_norm"),
            "times": durations,
            **{name: known[name] for name in ("mean", "time_s")},
        }
        parts = self.gather(what, {**sent, **self.digests(params=params)})
        self.sync_model(f"after {what}", parts)
        return combine_updates(what, parts)

    def digests(self, *, params: bool) -> dict[str, list[str]]:
        """Return digests of the buffers and, if `params`, of the parameters of this rank, for `sync_model`."""
        parts = {"buffers": named_buffers(self._model)} | ({"params": self._whole_parameters} if params else {})
        return {
            name: [_digest_layout(tensors), _digest(sum_bits(list(tensors.values())))]
            for name, tensors in parts.items()
        }

    def sync_model(self, what: str, parts: Sequence[Mapping[str, Any]]) -> None:
        """Refuse ranks whose parameters differ, and copy the buffers of rank 0 to all if these differ.

        Args:
            what: When this is, for the error.
            parts: What `gather` returned, with `digests` of each rank.

        Raises:
            ProcessesError: If the parameters differ, or the ranks have other tensors.
        """
        for name in ("params", "buffers"):
            digests = [part[name] for part in parts if name in part]
            if any(layout != digests[0][0] for layout, _ in digests):
                raise ProcessesError(f"the ranks have different models {what}: their {name} differ in names or shapes")
            if all(each == digests[0] for each in digests):
                continue
            if name == "params":
                self._raise_difference(what)
            self._broadcast_buffers()

    @property
    def _whole_parameters(self) -> dict[str, Tensor]:
        """The parameters that each rank has whole; of the others the ranks have different parts."""
        return {name: each for name, each in named_parameters(self._model).items() if not is_distributed(each)}

    def _raise_difference(self, what: str) -> None:
        parameters = self._whole_parameters
        sums = [part["sums"] for part in self.gather("params", {"sums": sum_bits(list(parameters.values()))})]
        rank = next(rank for rank, each in enumerate(sums) if each != sums[0])
        names = list(parameters)
        differing = [name for name, own, first in zip(names, sums[rank], sums[0], strict=True) if own != first]
        raise ProcessesError(
            f"the parameters of rank {rank} differ from those of rank 0 {what}, first {differing[0]!r}: each rank "
            "trains a model of its own; wrap it before training, as "
            "model = torch.nn.parallel.DistributedDataParallel(model), and call the wrapped one in the loop, so that "
            "gradients are averaged"
        )

    @torch.no_grad()
    def _broadcast_buffers(self) -> None:
        """Copy the buffers of rank 0 to all ranks, as DDP does before its next forward."""
        buffers = [each for each in named_buffers(self._model).values() if each.numel()]
        device = device_of(self._model.parameters())
        flat = torch.cat([each.to(device).contiguous().reshape(-1).view(torch.uint8) for each in buffers])
        with self._ranks.failures.explain("buffers of rank 0"):
            dist.broadcast(flat, dist.get_global_rank(self._group, 0), group=self._group)
        sizes = [each.numel() * each.element_size() for each in buffers]
        for buffer, part in zip(buffers, torch.split(flat, sizes), strict=True):
            buffer.copy_(part.clone().view(buffer.dtype).reshape(buffer.shape))

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._ranks.training
        if group is None:
            raise RuntimeError("one process has no group")
        return group


def check_equal(what: str, parts: Sequence[Mapping[str, Any]], fixes: Mapping[str, str]) -> None:
    """Refuse readings that differ between ranks.

    Args:
        what: When this is, for the error.
        parts: What `RankExchange.gather` returned.
        fixes: What to write instead, by name of the reading.

    Raises:
        ProcessesError: If one differs; with the values of all ranks.

    Example:
        >>> check_equal("at the start", [{"seed": 0}, {"seed": 1}], {"seed": "pass one seed="})
        Traceback (most recent call last):
        noether.session.processes.ProcessesError: seed differs between ranks at the start: pass one seed=
          rank 0: 0
          rank 1: 1
    """
    for name, fix in fixes.items():
        values = [part[name] for part in parts]
        if any(value != values[0] for value in values):
            listed = "\n".join(f"  rank {rank}: {value}" for rank, value in enumerate(values))
            raise ProcessesError(f"{name} differs between ranks {what}: {fix}\n{listed}")


def _read_tensors(tree: Any) -> Any:
    """Return a tree with numbers in place of 0-dimensional tensors; those of one device are read in one transfer."""
    found: dict[int, Tensor] = {}
    map_leaves(lambda leaf: found.setdefault(id(leaf), whole_tensor(leaf)) if isinstance(leaf, Tensor) else leaf, tree)
    numbers: dict[int, float] = {}
    for device in {each.device for each in found.values()}:
        here = {key: each for key, each in found.items() if each.device == device}
        dtype = torch.float32 if device.type == "mps" else torch.float64
        read = torch.stack([each.detach().reshape(()).to(dtype) for each in here.values()]).tolist()
        numbers |= dict(zip(here, read, strict=True))
    return map_leaves(lambda leaf: numbers.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _digest_layout(tensors: Mapping[str, Tensor]) -> str:
    return _digest([(name, str(each.dtype), tuple(each.shape)) for name, each in tensors.items()])


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
