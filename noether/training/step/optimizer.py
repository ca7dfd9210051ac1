"""torch's optimizers as two pure functions: `init(params)` and `update(grads, opt_state, params)`.

torch's own class (or a user's) computes the update, so results have the same bits. The class writes to copies; `update`
then reads its memory from its state, its parameter groups and its attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor

from noether.config.optimizer_settings import DEFAULT_GROUP, ParamGroup
from noether.core.errors import Problem, raise_problems
from noether.core.tensors.tree import SCALARS, clone_tensors, unpack
from noether.training.step import kernels
from noether.training.step.layout import Layout, UpdateCopies, assign_groups
from noether.training.step.optimizer_class import (
    OptState,
    accepted_settings,
    class_problem,
    construct,
    placeholders,
    read_memory,
    step_class,
    stored_params_problem,
    unknown_settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.optim.optimizer import Optimizer

_REPLACED: Final = frozenset({"state", "param_groups"})
"""Attributes of an instance that each update replaces."""


@final
@dataclass(frozen=True, eq=False)
class FunctionalOptimizer:
    """An optimizer class and its settings, as a pure function of gradients, memory and parameters.

    The state of the optimizer has these entries; the last two only for a class that uses them:

    - `state`: each parameter's memory, by name of the parameter.
    - `groups`: entries of a parameter group that the class changes in its steps (a counter, an estimate), by group.
    - `shared`: entries of the class's state that belong to no parameter.
    - `attributes`: attributes that the steps assign to the optimizer itself.

    Settings are not memory: a resumed run takes them from its configuration. If a class stores
    an object on itself and changes it in place, the change is not detected and a resume loses it.

    For Adam, AdamW and SGD it calls torch's kernels directly, with the same bits; step hooks of the class do not run.

    Args:
        optimizer: Class of the optimizer; any whose `step` needs no closure.
        settings: Settings of the class, e.g. `{"lr": 1e-3, "fused": True}`; a list counts as a tuple.
        groups: Parameters with separate settings; the first group that matches wins. The class gets the groups in this
            order, and last the group `default` of all other parameters.
        frozen: Exact names of further parameters not to train, e.g. those that require no gradient.
        tied: Names that the groups may match, too: the name in `params`, by each other name of a parameter.

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
    tied: Mapping[str, str] = field(default_factory=dict)
    # A layout is a pure function of the settings and the names of the parameters, cached because it takes long.
    _layouts: dict[tuple[str, ...], Layout] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        raise_problems([class_problem(self.optimizer)])
        raise_problems([*self._name_problems(), *self._group_problems()])
        self._construct(placeholders(self._trained_groups() or [DEFAULT_GROUP]))
        for group in self._trained_groups().values():
            overrides = group.overrides()
            # torch's classes check the arguments of the constructor, and take any value in a group.
            if overrides and overrides.keys() <= (accepted_settings(self.optimizer) or set()):
                settings = {**self.settings, **overrides}
                construct(self.optimizer, placeholders([DEFAULT_GROUP]), {}, settings, f"groups.{group.name}")

    def init(self, params: Mapping[str, Tensor]) -> OptState:
        """Return the state of the optimizer before its first update.

        Args:
            params: Parameters by name, frozen ones included.

        Raises:
            SettingsError: If a pattern matches no parameter, no parameter is trained, or the class refuses one.
        """
        layout = self._layout(params)
        # Copies, so that no class can keep a view of the caller's parameters; those with kernels never keep one.
        trained = {name: params[name].detach() for name in layout.trainable}
        trained = trained if kernels.has_kernel(self.optimizer) else clone_tensors(trained)
        trained = {name: param.requires_grad_() for name, param in trained.items()}
        optimizer = self._construct({group: [trained[n] for n in names] for group, names in layout.members.items()})
        # Numbers and tensors that the constructor derives from the parameters are memory. Other objects are not: they
        # differ from those of the layout only because each instance creates new ones.
        objects = {key: value for key, value in vars(optimizer).items() if not isinstance(value, (tuple, *SCALARS))}
        layout = layout._replace(attributes=layout.attributes | objects)
        return read_memory(optimizer, layout, trained, layout.entries)

    def update(
        self,
        grads: Mapping[str, Tensor | None],
        opt_state: Mapping[str, Any],
        params: Mapping[str, Tensor],
        *,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[dict[str, Tensor], OptState]:
        """Return the parameters and the state of the optimizer after one update, bit by bit those of the class.

        It writes to no argument, and the results share no memory with the arguments, except for frozen parameters.

        Args:
            grads: Gradients by parameter name; for a parameter without one, or with None, the class sees None.
            opt_state: Result of `init` or of the last `update`, or `{}` for a class that starts without memory.
            params: Parameters by name, frozen ones included.
            settings: Settings by group name that hold for this update, e.g. `{"default": {"lr": 0.1}}`, as if set in
                the class's parameter groups before its step. Other settings keep their values.

        Raises:
            ValueError: If a gradient, a memory or a setting does not match any trained parameter or group.

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
            entries = layout.entries.items()
            groups = {group: {**unpack(defaults), **settings.get(group, {})} for group, defaults in entries}
            trained = {name: params[name].clone() for name in layout.trainable}
            memory = {name: unpack(packed) for name, packed in opt_state.get("state", {}).items()}
            copies = UpdateCopies(layout, groups, trained, memory, present)
            new_state = kernels.step_kernel(self.optimizer, copies, opt_state)
            if new_state is None:
                new_state = step_class(self.optimizer, copies, opt_state)
        return {name: trained.get(name, param) for name, param in params.items()}, new_state

    def can_write(self, grads: Mapping[str, Tensor], opt_state: Mapping[str, Any], params: Iterable[str]) -> bool:
        """Return whether a `writer` can make this update: the class has a kernel, and no memory is missing."""
        if any(opt_state.get("groups", {}).values()):
            return False
        memory, settings = opt_state.get("state", {}), self._layout(params).entries.values()
        return kernels.can_run(self.optimizer, grads, memory) and kernels.has_all_memory(settings, grads, memory)

    def check_names(self, opt_state: Mapping[str, Any], params: Iterable[str]) -> None:
        """Check that the memory in `opt_state` is of trained parameters and of groups of this optimizer.

        Raises:
            ValueError: If it is not, naming the nearest name.
        """
        self._layout(params).check({}, opt_state, {})

    def add_first_memory(
        self, opt_state: Mapping[str, Any], params: Mapping[str, Tensor], names: Iterable[str]
    ) -> Mapping[str, Any]:
        """Return `opt_state` with the first memory of parameters that have none, where torch has a kernel.

        Args:
            opt_state: As for `update`.
            params: As for `update`.
            names: Names of the parameters that have gradients.
        """
        if not kernels.has_kernel(self.optimizer):
            return opt_state
        layout, memory = self._layout(params), dict(opt_state.get("state", {}))
        group_of = {name: group for group, members in layout.members.items() for name in members}
        for name in names:
            if not memory.get(name):
                memory[name] = kernels.first_memory(self.optimizer, layout.entries[group_of[name]], params[name])
        return {**opt_state, "state": {name: dict(tensors) for name, tensors in memory.items() if tensors}}

    def writer(
        self, opt_state: Mapping[str, Any], params: Mapping[str, Tensor], names: Sequence[str]
    ) -> Callable[[Mapping[str, Tensor], Mapping[str, Mapping[str, Any]]], None]:
        """Return a function that makes the updates of `update`, to the same bits, in place in `params` and `opt_state`.

        Args:
            opt_state: As for `update`.
            params: As for `update`.
            names: Names of the parameters that have gradients; `can_write` returns True for them.

        Returns:
            `write(grads, settings)`, with the arguments of `update`; one writer makes any number of updates.

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
            tensors, memories = [params[name] for name in present], [memory.get(name, {}) for name in present]
            run = kernels.make_writer(self.optimizer, layout.entries[group], tensors, memories)
            parts.append((group, present, run))

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
            >>> {group: (values["lr"], values["weight_decay"]) for group, values in settings.items()}
            {'no_decay': (0.1, 0.0), 'default': (0.1, 0.01)}
        """
        return {group: dict(entries) for group, entries in self._layout(params).entries.items()}

    def members(self, params: Iterable[str]) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
        """Return, for each group that has parameters, all settings of the class and the names of the parameters."""
        layout = self._layout(params)
        return {group: (dict(layout.entries[group]), names) for group, names in layout.members.items()}

    def _trained_groups(self) -> dict[str, ParamGroup]:
        return {group.name: group for group in self.groups if not group.frozen}

    def _construct(self, members: Mapping[str, Sequence[Tensor]]) -> Optimizer:
        """Return an instance of the class over `members` by group."""
        overrides = {group: settings.overrides() for group, settings in self._trained_groups().items()}
        return construct(self.optimizer, members, overrides, self.settings)

    def _name_problems(self) -> Iterator[Problem]:
        accepted = accepted_settings(self.optimizer)
        if accepted is None:
            return
        yield from unknown_settings(self.optimizer, self.settings, accepted)
        for group in self.groups:
            # A class whose constructor has no settings reads them from the groups.
            if accepted:
                yield from unknown_settings(self.optimizer, group.overrides(), accepted, f"groups.{group.name}.")

    def _group_problems(self) -> Iterator[Problem]:
        names = [group.name for group in self.groups]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield Problem(f"groups.{name}", "two groups have this name")

    def _layout(self, params: Iterable[str]) -> Layout:
        names = tuple(params)
        if names not in self._layouts:
            self._layouts[names] = self._make_layout(names)
        return self._layouts[names]

    def _make_layout(self, names: tuple[str, ...]) -> Layout:
        members, trainable = assign_groups(names, self.groups, self.frozen, self.tied)
        params = placeholders(members)
        instance = self._construct(params)
        raise_problems([stored_params_problem(instance, params)])
        entries = {
            group: {key: value for key, value in entry.items() if key != "params"}
            for group, entry in zip(members, instance.param_groups, strict=True)
        }
        return Layout(members, trainable, entries, {k: v for k, v in vars(instance).items() if k not in _REPLACED})
