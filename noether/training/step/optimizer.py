"""torch's optimizers as a pure pair: `init(params)` and `update(grads, opt_state, params)`.

The class that does the work is torch's own (or a user's), so the numbers are its numbers. It is given copies to write
to, and everything that it remembers is read back from where torch keeps it: its state and its parameter groups.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from noether.config.optimizer_settings import DEFAULT_GROUP, ParamGroup
from noether.core.errors import Problem, SettingsError, raise_problems, suggest
from noether.core.tensors.packing import pack, unpack
from noether.core.tensors.torch_internals import optimizer_attributes
from noether.core.tensors.tree import SCALARS, clone_tensors, leaves
from noether.training.step import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

OptState = dict[str, Any]
"""What an optimizer remembers: a tree of dicts, tuples, tensors and JSON scalars, keyed by names of parameters."""


@final
@dataclass(frozen=True, eq=False)
class FunctionalOptimizer:
    """An optimizer class and its settings, as a pure function of gradients, memory and parameters.

    A state of the optimizer holds `state`, each parameter's memory by the parameter's name; `groups`, by the group's
    name, the entries of a parameter group that the class changed in its steps (a counter, an estimate); and, only for
    a class that has them, `shared`, the entries of its state that belong to no parameter, and `attributes`, what its
    steps assigned to the optimizer itself. Settings are not memory: a resumed run takes them from its configuration.
    What a class changes in place inside of an attribute of its own is seen by no one, and is not resumed.

    Adam, AdamW and SGD call torch's kernels directly, past the class and its step hooks, to the same bits.

    Args:
        optimizer: Class of the optimizer; any whose `step` needs no closure.
        settings: Settings of the class, e.g. `{"lr": 1e-3, "fused": True}`; a list counts as a tuple.
        groups: Parameters with settings of their own; the first that matches wins, and the class sees the groups in
            this order, the group `default` of all other parameters last.
        frozen: Exact names of further parameters not to train, e.g. those that require no gradient.

    Raises:
        SettingsError: If the class needs a closure, has no such setting, or refuses the value of one.

    Example:
        >>> sgd = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})
        >>> params = {"weight": torch.tensor([1.0, 2.0])}
        >>> opt_state = sgd.init(params)
        >>> new_params, opt_state = sgd.update({"weight": torch.tensor([1.0, 1.0])}, opt_state, params)
        >>> new_params
        {'weight': tensor([0.5000, 1.5000])}
        >>> opt_state
        {'state': {'weight': {'momentum_buffer': tensor([1., 1.])}}, 'groups': {'default': {}}}
        >>> FunctionalOptimizer(torch.optim.SGD, {"momentun": 0.9})
        Traceback (most recent call last):
        noether.core.errors.SettingsError: momentun: SGD has no such setting; it has lr, momentum, dampening, ...;
        did you mean 'momentum'?
    """

    optimizer: type[Optimizer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[ParamGroup, ...] = ()
    frozen: frozenset[str] = frozenset()
    # A layout is a pure function of the settings and the names of the parameters, remembered because it takes long.
    _layouts: dict[tuple[str, ...], _Layout] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        raise_problems([_class_problem(self.optimizer)])
        raise_problems([*self._name_problems(), *self._group_problems()])
        self._construct(_stand_ins(self._trained() or [DEFAULT_GROUP]))
        for group in self._trained().values():
            overrides = group.overrides()
            # Torch's classes check their own arguments only, and take any value in a group.
            if overrides and overrides.keys() <= (_accepted(self.optimizer) or set()):
                self._construct(_stand_ins([DEFAULT_GROUP]), overrides, f"groups.{group.name}")

    def init(self, params: Mapping[str, Tensor]) -> OptState:
        """Return the state of the optimizer before its first update.

        Args:
            params: Parameters by name, frozen ones included.

        Raises:
            SettingsError: If a pattern matches no parameter, no parameter is trained, or the class refuses one.
        """
        layout = self._layout(params)
        # Copies, so that no class can keep a view of the caller's parameters in its state; some are known not to.
        given = {name: params[name].detach() for name in layout.trainable}
        given = given if kernels.known(self.optimizer) else clone_tensors(given)
        copies = {name: param.requires_grad_() for name, param in given.items()}
        members = {group: [copies[name] for name in names] for group, names in layout.members.items()}
        optimizer = self._construct(members)
        # What the constructor took from the parameters is memory; other objects it made are there in every instance.
        made = {key: value for key, value in vars(optimizer).items() if not isinstance(value, (tuple, *SCALARS))}
        return _read(optimizer, layout._replace(attributes=layout.attributes | made), copies, layout.entries)

    def update(
        self,
        grads: Mapping[str, Tensor | None],
        opt_state: Mapping[str, Any],
        params: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[dict[str, Tensor], OptState]:
        """Return the parameters and the state of the optimizer after one update, bit by bit those of the class.

        No argument is written to, and the results share no memory with them; only frozen parameters are handed on.

        Args:
            grads: Gradients by parameter name; a parameter without one, or with None, is left to the class as such.
            opt_state: What `init` or the last `update` returned, or `{}` for a class that starts from nothing.
            params: Parameters by name, frozen ones included.
            settings: Settings by group name that hold for this update, e.g. `{"default": {"lr": 0.1}}`, as if set in
                the class's parameter groups before its step. A setting not named here keeps its own value.

        Raises:
            ValueError: If a gradient, a memory or a setting belongs to nothing that is trained.

        Example:
            >>> sgd = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.5})
            >>> params = {"weight": torch.tensor([1.0])}
            >>> sgd.update(params, {}, params, settings={"default": {"lr": 0.25}})[0]
            {'weight': tensor([0.7500])}
        """
        layout, settings = self._layout(params), settings or {}
        present = {name: grad for name, grad in grads.items() if grad is not None}
        layout.check(present, opt_state, settings)
        with torch.no_grad():
            given = {group: {**unpack(own), **settings.get(group, {})} for group, own in layout.entries.items()}
            trained = {name: params[name].clone() for name in layout.trainable}
            memory = {name: unpack(kept) for name, kept in opt_state.get("state", {}).items()}
            work = _Work(layout, given, trained, memory, present)
            new_state = _by_kernel(self.optimizer, work, opt_state) or _by_class(self.optimizer, work, opt_state)
        return {name: trained.get(name, param) for name, param in params.items()}, new_state

    def writes(self, grads: Mapping[str, Tensor], opt_state: Mapping[str, Any], params: Iterable[str]) -> bool:
        """Return whether a `writer` can make this update: torch has a kernel for the class, and all memory is there."""
        if any(opt_state.get("groups", {}).values()):
            return False
        memory, settings = opt_state.get("state", {}), self._layout(params).entries.values()
        return kernels.takes(self.optimizer, grads, memory) and kernels.whole(settings, grads, memory)

    def remembering(
        self, opt_state: Mapping[str, Any], params: Mapping[str, Tensor], names: Iterable[str]
    ) -> Mapping[str, Any]:
        """Return `opt_state` with the first memory of parameters that have none, as far as torch has a kernel.

        Args:
            opt_state: As for `update`.
            params: As for `update`.
            names: Of the parameters that have gradients.
        """
        if not kernels.known(self.optimizer):
            return opt_state
        layout, memory = self._layout(params), dict(opt_state.get("state", {}))
        group_of = {name: group for group, members in layout.members.items() for name in members}
        for name in names:
            if not memory.get(name):
                memory[name] = kernels.first_memory(self.optimizer, layout.entries[group_of[name]], params[name])
        return {**opt_state, "state": {name: dict(kept) for name, kept in memory.items() if kept}}

    def writer(
        self, opt_state: Mapping[str, Any], params: Mapping[str, Tensor], names: Sequence[str]
    ) -> Callable[[Mapping[str, Tensor], Mapping[str, Mapping[str, Any]]], None]:
        """Return what makes an update as `update` does, to the same bits, by writing to `params` and `opt_state`.

        Args:
            opt_state: As for `update`.
            params: As for `update`.
            names: Of the parameters that have gradients, for which `writes` holds.

        Returns:
            `write(grads, settings)`, with those of `update`; it may be called again and again.

        Example:
            >>> sgd = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.5})
            >>> params = {"weight": torch.tensor([1.0])}
            >>> write = sgd.writer({}, params, ["weight"])
            >>> write({"weight": torch.tensor([1.0])}, {})
            >>> params
            {'weight': tensor([0.5000])}
        """
        layout, memory = self._layout(params), opt_state.get("state", {})
        parts = []
        for group, members in layout.members.items():
            present = [name for name in members if name in names]
            tensors, kept = [params[name] for name in present], [memory.get(name, {}) for name in present]
            parts.append((group, present, kernels.prepared(self.optimizer, layout.entries[group], tensors, kept)))

        def write(grads: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]]) -> None:
            for group, present, run in parts:
                run(settings.get(group, {}), [grads[name] for name in present])

        return write

    def trainable(self, params: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the parameters that are trained, in the order of `params`.

        Args:
            params: Names of all parameters, or the parameters by name.

        Raises:
            SettingsError: If a pattern matches no parameter or no parameter is trained.

        Example:
            >>> backbone = ParamGroup(name="backbone", match=("backbone.*",), frozen=True)
            >>> sgd = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1}, (backbone,))
            >>> sgd.trainable(["backbone.weight", "head.weight", "head.bias"])
            ('head.weight', 'head.bias')
        """
        return self._layout(params).trainable

    def group_settings(self, params: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return, for each group that has parameters, all settings of the class, its defaults included.

        Args:
            params: Names of all parameters, or the parameters by name.

        Raises:
            SettingsError: If a pattern matches no parameter or no parameter is trained.

        Example:
            >>> no_decay = ParamGroup(name="no_decay", match=("*.bias",), weight_decay=0.0)
            >>> adamw = FunctionalOptimizer(torch.optim.AdamW, {"lr": 0.1}, (no_decay,))
            >>> settings = adamw.group_settings(["fc.weight", "fc.bias"])
            >>> {group: (own["lr"], own["weight_decay"]) for group, own in settings.items()}
            {'no_decay': (0.1, 0.0), 'default': (0.1, 0.01)}
        """
        return {group: dict(entries) for group, entries in self._layout(params).entries.items()}

    def members(self, params: Iterable[str]) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
        """Return, for each group that has parameters, all settings of the class and the names of the parameters."""
        layout = self._layout(params)
        return {group: (dict(layout.entries[group]), names) for group, names in layout.members.items()}

    def _trained(self) -> dict[str, ParamGroup]:
        return {group.name: group for group in self.groups if not group.frozen}

    def _construct(
        self, members: Mapping[str, Sequence[Tensor]], settings: Mapping[str, Any] | None = None, where: str = ""
    ) -> Optimizer:
        """Return an instance of the class over `members` by group, its refusal as a SettingsError."""
        trained = self._trained()
        overrides = {group: trained[group].overrides() if group in trained else {} for group in members}
        groups = [{"params": list(tensors), **_tuples(overrides[group])} for group, tensors in members.items()]
        build: Callable[..., Optimizer] = self.optimizer
        try:
            return build(groups, **_tuples({**self.settings, **(settings or {})}))
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise SettingsError([Problem(where, f"{self.optimizer.__name__} refuses: {error}")]) from error

    def _name_problems(self) -> Iterator[Problem]:
        accepted = _accepted(self.optimizer)
        if accepted is None:
            return
        yield from _unknown(self.optimizer, self.settings, accepted)
        for group in self.groups:
            # A class without settings of its own reads what it needs from the groups.
            if accepted:
                yield from _unknown(self.optimizer, group.overrides(), accepted, f"groups.{group.name}.")

    def _group_problems(self) -> Iterator[Problem]:
        names = [group.name for group in self.groups]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield Problem(f"groups.{name}", "two groups have this name")

    def _layout(self, params: Iterable[str]) -> _Layout:
        names = tuple(params)
        if names not in self._layouts:
            self._layouts[names] = self._new_layout(names)
        return self._layouts[names]

    def _new_layout(self, names: tuple[str, ...]) -> _Layout:
        raise_problems([*self._unmatched(names)])
        found = {name: self._group_of(name) for name in names}
        order = [*self._trained(), DEFAULT_GROUP]
        members = {group: tuple(name for name in names if found[name] == group) for group in order}
        members = {group: own for group, own in members.items() if own}
        if not members:
            raise_problems([Problem("groups", f"all {len(names)} parameters are frozen; leave at least one to train")])
        stand_ins = _stand_ins(members)
        instance = self._construct(stand_ins)
        raise_problems([_keeps_params(instance, stand_ins)])
        entries = {
            group: {key: value for key, value in entry.items() if key != "params"}
            for group, entry in zip(members, instance.param_groups, strict=True)
        }
        trainable = tuple(name for name in names if found[name] is not None)
        return _Layout(members, trainable, entries, {k: v for k, v in vars(instance).items() if k not in _REPLACED})

    def _group_of(self, name: str) -> str | None:
        """Return the name of the group of a parameter, or None if the parameter is frozen."""
        if name in self.frozen:
            return None
        for group in self.groups:
            if any(fnmatchcase(name, pattern) for pattern in group.match):
                return None if group.frozen else group.name
        return DEFAULT_GROUP

    def _unmatched(self, names: tuple[str, ...]) -> Iterator[Problem]:
        for group in self.groups:
            for pattern in group.match:
                if not any(fnmatchcase(name, pattern) for name in names):
                    yield Problem(f"groups.{group.name}.match", _no_parameter(pattern, names))
        for name in sorted(self.frozen - set(names)):
            yield Problem("frozen", _no_parameter(name, names))


class _Layout(NamedTuple):
    """What is fixed for parameters of given names; `entries` and `attributes` are those of a fresh instance."""

    members: dict[str, tuple[str, ...]]
    trainable: tuple[str, ...]
    entries: dict[str, dict[str, Any]]
    attributes: dict[str, Any]

    def check(
        self, grads: Mapping[str, Tensor], opt_state: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
    ) -> None:
        trainable = set(self.trainable)
        _check_known("gradient", grads.keys() - trainable, self.trainable)
        _check_known("optimizer state", opt_state.get("state", {}).keys() - trainable, self.trainable)
        kept = {group for group, entries in opt_state.get("groups", {}).items() if entries}
        _check_known("optimizer state of the group", kept - self.entries.keys(), self.entries)
        _check_known("settings of the group", settings.keys() - self.entries.keys(), self.entries)
        for group, values in settings.items():
            _check_known(f"setting of {group!r}", values.keys() - self.entries[group].keys(), self.entries[group])


class _Work(NamedTuple):
    """The copies that one update may write to; `given` holds every setting by group, `grads` is the caller's."""

    layout: _Layout
    given: dict[str, dict[str, Any]]
    trained: dict[str, Tensor]
    memory: dict[str, dict[str, Any]]
    grads: dict[str, Tensor]


def _by_class(cls: type[Optimizer], work: _Work, opt_state: Mapping[str, Any]) -> OptState:
    """Let the class itself step on the copies, and return its state."""
    optimizer = object.__new__(cls)  # what the constructor sets, without running it: this is every update's path
    attributes = work.layout.attributes | unpack(opt_state.get("attributes", {}))
    vars(optimizer).update({key: v.clone() if isinstance(v, Tensor) else v for key, v in attributes.items()})
    kept = opt_state.get("groups", {})
    optimizer.param_groups = [
        {"params": [work.trained[name] for name in names], **entries, **unpack(kept.get(group, {}))}
        for (group, names), entries in zip(work.layout.members.items(), work.given.values(), strict=True)
    ]
    optimizer.state = defaultdict(dict, unpack(opt_state.get("shared", {})))
    optimizer.state.update({work.trained[name]: memory for name, memory in work.memory.items()})
    for name, param in work.trained.items():
        param.requires_grad = True
        grad = work.grads.get(name)
        param.grad = grad if grad is None or kernels.spares_gradients(cls) else grad.clone()
    optimizer.step()
    for param in work.trained.values():
        param.grad = None
        param.requires_grad = False
    return _read(optimizer, work.layout, work.trained, work.given)


def _by_kernel(cls: type[Optimizer], work: _Work, opt_state: Mapping[str, Any]) -> OptState | None:
    """Step on the copies with torch's kernel, or return None where only the class knows the way."""
    if any(opt_state.get("groups", {}).values()):
        return None  # memory that these classes do not keep: whatever it is, the class reads it
    if not kernels.takes(cls, work.grads, work.memory):
        return None
    groups = [(work.given[group], names) for group, names in work.layout.members.items()]
    kernels.run(cls, groups, work.trained, work.grads, work.memory)
    state = {name: memory for name, memory in work.memory.items() if memory}
    return {"state": state, "groups": {group: {} for group in work.layout.members}}


def _read(
    optimizer: Optimizer, layout: _Layout, trained: Mapping[str, Tensor], given: Mapping[str, Mapping[str, Any]]
) -> OptState:
    """Return what `optimizer` remembers beyond the settings it was `given`, with names for parameters."""
    names = {id(param): name for name, param in trained.items()}
    by_key = {names.get(id(key), key): value for key, value in optimizer.state.items()}
    entries = zip(layout.members, optimizer.param_groups, strict=True)
    torchs = optimizer_attributes()
    own = {
        key: value
        for key, value in vars(optimizer).items()
        if key not in torchs and (isinstance(value, Tensor) or value is not layout.attributes.get(key, _ABSENT))
    }
    memory: OptState = {
        "state": pack("optimizer.state", {key: value for key, value in by_key.items() if key in trained}),
        "groups": {group: _changed("param_groups", entry, given[group]) for group, entry in entries},
        "shared": pack("optimizer.state", {key: value for key, value in by_key.items() if key not in trained}),
        "attributes": _changed("self", own, layout.attributes),
    }
    return {key: value for key, value in memory.items() if value or key in {"state", "groups"}}


def _changed(where: str, after: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries in which `after` differs from `given`, and all that could have been written to in place."""
    return {
        key: pack(f"optimizer.{where}.{key}", value)
        for key, value in after.items()
        if key != "params" and not _same(value, given.get(key, _ABSENT))
    }


def _same(value: object, given: object) -> bool:
    if isinstance(value, (Tensor, dict, list)):
        return False
    return value is given or (
        isinstance(value, (tuple, *SCALARS)) and type(value) is type(given) and bool(value == given)
    )


def _class_problem(cls: object) -> Problem | None:
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        return Problem("optimizer", f"{cls!r} is not a class of torch.optim.Optimizer")
    arguments = list(inspect.signature(cls.step).parameters.values())[1:]
    if any(argument.default is argument.empty and argument.kind not in _VARIADIC for argument in arguments):
        return Problem("optimizer", f"{cls.__name__} calls the loss itself (a closure); take one whose step needs none")
    return None


def _accepted(cls: type[Optimizer]) -> AbstractSet[str] | None:
    """Return the names of the settings of `cls`, in its order, or None if it takes any."""
    parameters = list(inspect.signature(cls).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return dict.fromkeys(parameter.name for parameter in parameters).keys()


def _unknown(
    cls: type[Optimizer], settings: Mapping[str, Any], accepted: AbstractSet[str], prefix: str = ""
) -> Iterator[Problem]:
    for name in settings:
        if name not in accepted:
            known = f"it has {', '.join(accepted)}{suggest(name, accepted)}"
            yield Problem(f"{prefix}{name}", f"{cls.__name__} has no such setting; {known}")


def _keeps_params(optimizer: Optimizer, members: Mapping[str, Sequence[Tensor]]) -> Problem | None:
    """Return the problem of a class that would step on parameters of its own instead of those it is given."""
    own = {id(param) for params in members.values() for param in params}
    torchs = optimizer_attributes()
    for path, leaf in leaves({key: value for key, value in vars(optimizer).items() if key not in torchs}):
        if id(leaf) in own or isinstance(leaf, Optimizer):
            message = f"{type(optimizer).__name__} keeps parameters in self.{'.'.join(path)}; read self.param_groups"
            return Problem("optimizer", message)
    return None


def _no_parameter(pattern: str, names: tuple[str, ...]) -> str:
    close = get_close_matches(pattern, names, n=1, cutoff=0.0)
    return f"{pattern!r} matches no parameter" + (f"; the nearest is {close[0]!r}" if close else "")


def _check_known(what: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    for name in sorted(unknown):
        raise ValueError(f"{what} {name!r} belongs to nothing that is trained{suggest(name, known)}")


def _stand_ins(groups: Iterable[str]) -> dict[str, list[Tensor]]:
    """Return a parameter for each group, to build an instance before there are any; of two dimensions, for Muon."""
    return {group: [torch.nn.Parameter(torch.zeros(1, 1))] for group in groups}


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


_ABSENT: Final = object()
_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_REPLACED: Final = frozenset({"state", "param_groups"})
