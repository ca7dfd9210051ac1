"""The places of a live model's buffers: what its constructor made there, and calls with the buffers of a state."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final
from weakref import WeakKeyDictionary

import torch
from torch.nn.parameter import is_lazy

from noether.core.tensors.module import named_modules, non_persistent_names
from noether.core.tensors.torch_internals import buffers_in, non_persistent_in
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from noether.core.state import TrainState
    from noether.core.tensors.module import Modules

    HeldBuffers = Sequence[Mapping[str, Tensor | None]]
    """The buffers of each module of a model by key; empty if no module has any."""

_NONE: Final = "none"
_MISSING: Final = "missing"
_NO_BUFFERS: Final = FrozenDict()
_WITHOUT_BUFFERS: Final = FrozenDict(buffers=_NO_BUFFERS, non_persistent=_NO_BUFFERS)
_CONSTRUCTED: WeakKeyDictionary[nn.Module, FrozenDict] = WeakKeyDictionary()
"""Result of `describe_constructed` for each model."""


def describe_constructed(model: nn.Module) -> FrozenDict:
    """Return the form of each buffer as the constructor of a model made it; read once, when a model is first seen.

    Returns:
        Dtype and shape by name, `none` for a buffer registered as None. For non-persistent buffers, a digest too.

    Example:
        >>> model = torch.nn.BatchNorm1d(2)
        >>> describe_constructed(model)["running_mean"]
        'float32[2]'
        >>> model.running_mean = torch.zeros(3)
        >>> describe_constructed(model)["running_mean"]
        'float32[2]'
    """
    constructed = _CONSTRUCTED.get(model)
    if constructed is None:
        constructed = _CONSTRUCTED[model] = FrozenDict(_describe_places(model, non_persistent_names(model)))
    return constructed


def describe_form(buffer: Tensor) -> str:
    """Return dtype and shape as text.

    Example:
        >>> describe_form(torch.zeros(0, 2))
        'float32[0,2]'
    """
    return f"{str(buffer.dtype).removeprefix('torch.')}[{','.join(map(str, buffer.shape))}]"


def describe_values(buffer: Tensor) -> str:
    """Return dtype and shape with a digest of the values; of a tensor without values, no digest.

    Example:
        >>> describe_values(torch.zeros(1)) == describe_values(torch.ones(1))
        False
    """
    if buffer.is_meta:
        return describe_form(buffer)
    digest = hashlib.blake2b(digest_size=16)
    for part in _dense_parts(buffer.detach().cpu()):
        plain = part.resolve_conj().resolve_neg().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{describe_form(buffer)} {digest.hexdigest()}"


def _dense_parts(buffer: Tensor) -> Iterable[Tensor]:
    """Return dense tensors that have the values of a buffer of any kind."""
    if buffer.is_nested:
        return buffer.unbind()
    if buffer.is_quantized:
        return [buffer.int_repr()]
    if buffer.layout is torch.strided:
        return [buffer]
    sparse = buffer.to_sparse().coalesce()
    return [sparse.indices(), sparse.values()]


def changed_buffers(state: TrainState) -> dict[str, Tensor]:
    """Return the non-persistent buffers whose values are not those that the constructor made.

    Example:
        >>> from noether import TrainState
        >>> class Cached(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("table", torch.ones(2), persistent=False)
        >>> model = Cached()
        >>> state = TrainState.from_module(model)
        >>> changed_buffers(state)
        {}
        >>> _ = model.table.zero_()
        >>> changed_buffers(state)
        {'table': tensor([0., 0.])}
    """
    before = state.constructed or {}
    return {name: each for name, each in state.non_persistent.items() if before.get(name) != describe_values(each)}


def changed_forms(state: TrainState) -> dict[str, str]:
    """Return what the constructor made of each buffer that has another dtype or shape now.

    Example:
        >>> from noether import TrainState
        >>> model = torch.nn.Module()
        >>> model.register_buffer("scale", None)
        >>> state = TrainState.from_module(model)
        >>> model.scale = torch.ones(2)
        >>> changed_forms(state)
        {'scale': 'none'}
    """
    before = state.constructed
    if before is None:  # nothing is known of the model
        return {}
    forms = {name: before.get(name, _MISSING) for name in state.buffers}
    return {name: form for name, form in forms.items() if form != describe_form(state.buffers[name])}


def find_reshaped_buffers(model: nn.Module, saved: TrainState) -> set[str]:
    """Return the names of the buffers of a saved state that may have another shape or dtype than those of a model.

    These are buffers that training reshaped or converted, in the state or in the model, if the constructor of the model
    makes what that of the saved model made; and non-persistent buffers that forward registers in a module of the model.
    """
    constructed, before = describe_constructed(model), saved.constructed or {}
    live = {name: form for name, form in _describe_places(model, ()).items() if form != constructed.get(name)}
    same = {
        name for name in live.keys() & before.keys() & saved.buffers.keys() if before[name] == constructed.get(name)
    }
    changed = {*changed_forms(saved).items(), *((name, _MISSING) for name in saved.non_persistent)}
    paths = dict(named_modules(model)).keys()
    return same | {
        name for name, form in changed if constructed.get(name, _MISSING) == form and name.rpartition(".")[0] in paths
    }


def move_non_persistent(saved: TrainState, ours: Mapping[str, Tensor]) -> TrainState:
    """Return a state that an earlier version saved, which had non-persistent buffers among the others.

    Args:
        saved: The saved state.
        ours: Non-persistent buffers of the model; one of another form stays as the model has it.
    """
    moved = saved.buffers.keys() & ours.keys()
    if not moved:
        return saved
    fitting = {name for name in moved if describe_form(saved.buffers[name]) == describe_form(ours[name])}
    kept = {name: saved.buffers[name] for name in fitting}
    buffers = {name: buffer for name, buffer in saved.buffers.items() if name not in moved}
    return saved.replace(buffers=buffers, non_persistent={**kept, **saved.non_persistent})


def find_none_buffers(constructed: Mapping[str, str]) -> set[str]:
    """Return the names of the buffers that the constructor registered as None."""
    return {name for name, form in constructed.items() if form == _NONE}


def split_buffers(buffers: Mapping[str, Tensor], non_persistent: Collection[str]) -> dict[str, FrozenDict]:
    """Return the fields of a state that hold these buffers.

    Args:
        buffers: All buffers of a model by name.
        non_persistent: Names of those with `persistent=False`.

    Example:
        >>> split_buffers({"scale": torch.ones(1), "table": torch.zeros(1)}, ["table"])
        {'buffers': FrozenDict({'scale': tensor([1.])}), 'non_persistent': FrozenDict({'table': tensor([0.])})}
    """
    if not non_persistent:
        return {"buffers": FrozenDict(buffers), "non_persistent": _NO_BUFFERS}
    return {
        "buffers": FrozenDict({name: buffer for name, buffer in buffers.items() if name not in non_persistent}),
        "non_persistent": FrozenDict({name: buffer for name, buffer in buffers.items() if name in non_persistent}),
    }


@final
class BufferPlaces:
    """The places of a model's buffers, for calls with the buffers of a state.

    A place is an entry in the `_buffers` of a module. The `forward` of a model may register a buffer, or set one that
    was registered as None. A state has the buffers that forward made; before the next call, `place` resets those that
    the state does not have to what the constructor made.

    Args:
        model: The model.
        modules: What `named_modules` returns of it, where that is known.

    Example:
        >>> model = torch.nn.BatchNorm1d(1)
        >>> places = BufferPlaces(model)
        >>> buffers = places.read()
        >>> with places.exchange(buffers):
        ...     _ = model(torch.tensor([[1.0], [3.0]]))
        ...     after = places.read()
        >>> [float(each["running_mean"]) for each in (buffers, after, places.read())]
        [0.0, 0.20000000298023224, 0.0]
    """

    def __init__(self, model: nn.Module, modules: Modules | None = None) -> None:
        self._model = model
        self._constructed = describe_constructed(model)
        modules = modules or named_modules(model)
        self._prefixes = [f"{path}." if path else "" for path, _ in modules]
        self._dicts = [buffers_in(module) for _, module in modules]
        self._read_places()

    def collect(self, state: TrainState) -> Mapping[str, Tensor]:
        """Return all buffers of a state, for a call."""
        non_persistent = state.non_persistent
        return FrozenDict({**state.buffers, **non_persistent}) if non_persistent else state.buffers

    def split(self, buffers: Mapping[str, Tensor]) -> Mapping[str, FrozenDict]:
        """Return the fields of a state that hold these buffers."""
        if not buffers:
            return _WITHOUT_BUFFERS
        return split_buffers(buffers, self._non_persistent)

    def place(self, buffers: Mapping[str, Tensor]) -> None:
        """Put copies of buffers into the model."""
        if sum(map(len, self._dicts)) != len(self._places):  # forward may register buffers
            self._read_places()
        if not self._places and not buffers:
            return
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        late = []
        for place, key, name, first in self._places:
            copy = copies.get(name)
            if copy is None:
                copy = copies.get(first)  # a buffer at two places has the name of the first
                if copy is None and name not in self._constructed:
                    late.append((place, key))
            place[key] = copy
        if late:  # forward registered them, and the state has none
            for place, key in late:
                del place[key]
            self._read_places()
        if not copies.keys() <= self._names:
            self._register({name: copy for name, copy in copies.items() if name not in self._names})

    def read(self) -> FrozenDict:
        """Return the buffers in the model by name, each once, without gradients."""
        if sum(map(len, self._dicts)) != len(self._places):
            self._read_places()
        if not self._places:
            return _NO_BUFFERS
        found: dict[int, tuple[str, Tensor]] = {}
        # Batch norm writes to the copies, other modules assign new tensors: the place holds the current one either way.
        for place, key, name, _ in self._places:
            buffer = place[key]
            if buffer is not None and id(buffer) not in found:
                found[id(buffer)] = name, buffer
        return FrozenDict({name: buffer.detach() for name, buffer in found.values()})

    @contextmanager
    def exchange(self, buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Return a context in which the model has copies of other buffers."""
        before = self.replace(buffers)
        try:
            yield
        finally:
            self.restore(before)

    def replace(self, buffers: Mapping[str, Tensor]) -> HeldBuffers:
        """Put copies of buffers into the model, and return what `restore` puts back: `exchange` in two calls."""
        before = [dict(place.items()) for place in self._dicts] if any(self._dicts) else []
        if before or buffers:
            self.place(buffers)
        return before

    def restore(self, before: HeldBuffers) -> None:
        """Put back the buffers that the model had before `replace`, and remove those that it registered since."""
        if not before:
            if not any(self._dicts):
                return
            before = [{}] * len(self._dicts)  # forward registered the first ones
        for place, held in zip(self._dicts, before, strict=True):
            for key in [key for key in place.keys() if key not in held]:  # noqa: SIM118  # TorchScript has no other
                del place[key]
            for key, buffer in held.items():
                place[key] = buffer

    def _read_places(self) -> None:
        first: dict[int, str] = {}
        self._places: list[tuple[dict[str, Any], str, str, str]] = []
        for prefix, place in zip(self._prefixes, self._dicts, strict=True):
            for key, buffer in place.items():
                name = prefix + key
                alias = name if buffer is None else first.setdefault(id(buffer), name)
                self._places.append((place, key, name, alias))
        self._names = {name for _, _, name, _ in self._places}
        self._non_persistent = non_persistent_names(self._model) if self._places else frozenset()

    def _register(self, buffers: Mapping[str, Tensor]) -> None:
        """Register buffers that forward registered before, maybe in another process."""
        modules = dict(named_modules(self._model))
        for name, buffer in buffers.items():
            path, _, key = name.rpartition(".")
            modules[path].register_buffer(key, buffer, persistent=key not in non_persistent_in(modules[path]))
        self._read_places()


def register_forward_buffers(model: nn.Module, saved: TrainState) -> None:
    """Register, as None, the buffers of a saved state that the model registers at its first forward call."""
    modules = dict(named_modules(model))
    for name in sorted(find_reshaped_buffers(model, saved) - describe_constructed(model).keys()):
        path, _, key = name.rpartition(".")
        if key not in buffers_in(modules[path]):
            modules[path].register_buffer(key, None, persistent=name in saved.buffers)


def _describe_places(model: nn.Module, digested: Collection[str]) -> dict[str, str]:
    """Return the form of each buffer, with a digest for those in `digested`."""
    forms = {}
    for path, module in named_modules(model):
        for key, buffer in buffers_in(module).items():
            name = f"{path}.{key}" if path else key
            if buffer is None or is_lazy(buffer):
                forms[name] = _NONE
            else:
                forms[name] = describe_values(buffer) if name in digested else describe_form(buffer)
    return forms
