"""Every private API of PyTorch that noether uses, each with the reason why no public one is enough.

`python -m noether.core.tensors.torch_internals` tries each of them on small tensors and names those that the installed
version of torch has changed. A name that torch no longer has fails when it is called, not when noether is imported.
"""

from __future__ import annotations

import re
from contextlib import nullcontext, suppress
from functools import cache
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from noether.core.errors import NoetherError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


def _find(path: str) -> Any:
    """Return the object at a dotted path in torch; if it is missing, a function that raises an error naming it."""
    try:
        return attrgetter(path)(torch)
    except AttributeError:

        def fail(*_: object, **__: object) -> NoReturn:
            raise RuntimeError(
                f"torch {torch.__version__} has no torch.{path}: install a version that noether supports"
            )

        return fail


storage_use_count: Final[Callable[[int], int]] = _find("_C._storage_Use_Count")
"""Return how many objects use the storage with a handle; torch has no public count."""

USERS_OF_ONE_TENSOR: Final = 2
"""The count of a storage that one tensor uses: the tensor, and the storage object through which the count is read."""

foreach_add_: Final[Callable[[Sequence[Tensor], float], None]] = _find("_foreach_add_")
"""Add a number to each tensor in place, in one call; torch has no public name for the foreach functions."""

foreach_copy_: Final[Callable[[Sequence[Tensor], Sequence[Tensor]], None]] = _find("_foreach_copy_")
"""Copy each tensor to another, in one call; torch has no public name for the foreach functions."""

foreach_lerp: Final[Callable[[Sequence[Tensor], Sequence[Tensor], float], tuple[Tensor, ...]]] = _find("_foreach_lerp")
"""Interpolate each tensor towards another, in one call; torch has no public name for the foreach functions."""

foreach_lerp_: Final[Callable[[Sequence[Tensor], Sequence[Tensor], float], None]] = _find("_foreach_lerp_")
"""Do what `foreach_lerp` does, in place."""

fused_adam_: Final[Callable[..., None]] = _find("_fused_adam_")
"""Write an update of Adam in one kernel; the public `torch.optim.adam.adam` first sorts all tensors by device."""

fused_adamw_: Final[Callable[..., None]] = _find("_fused_adamw_")
"""Write an update of AdamW in one kernel; see `fused_adam_`."""

default_store: Final[Callable[[], Any]] = _find("distributed.distributed_c10d._get_default_store")
"""Return the store of the default process group; a group that a framework made has no public way to it."""

reparametrize: Final[Callable[..., Any]] = _find("nn.utils.stateless._reparametrize_module")
"""Return a context in which a module has other parameters and buffers.

`torch.func.functional_call` leaves this context after the forward pass, but activation checkpointing calls parts of the
model again in the backward pass.
"""

set_grad_enabled: Final[Callable[[bool], None]] = _find("_C._set_grad_enabled")
"""Set whether autograd records; `torch.no_grad()` takes longer than an operation on few numbers."""

_write_count: Final = attrgetter("_version")


def storage_handle(storage: torch.UntypedStorage) -> int:
    """Return the handle of a storage, which `storage_use_count` takes. It is valid while `storage` is referenced."""
    return int(storage._cdata)  # noqa: SLF001  # torch has no public handle


def has_other_users(storage: torch.UntypedStorage) -> bool:
    """Return whether a storage has other users than one tensor that is known to use it."""
    return storage_use_count(storage_handle(storage)) > USERS_OF_ONE_TENSOR


def write_counts(tensors: Iterable[Tensor]) -> list[int]:
    """Return how often each tensor was written to in place, as autograd counts it."""
    return list(map(_write_count, tensors))


def run_backward(loss: Tensor, leaves: Sequence[Tensor], *, keep_graph: bool = False) -> Sequence[Tensor | None]:
    """Return the gradients of a loss on the CPU, without the preparations of `torch.autograd.grad` for other cases."""
    engine: Any = torch.autograd.Variable._execution_engine  # noqa: SLF001  # the engine has no public name
    gradients: Sequence[Tensor | None] = engine.run_backward(
        (loss,),
        (_find_ones(loss),),
        keep_graph,
        False,
        tuple(leaves),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return gradients


_ones: Final[dict[torch.dtype, Tensor]] = {}


def _find_ones(loss: Tensor) -> Tensor:
    """Return ones in the form of a loss; for a loss without dimensions, the same tensor each time.

    The gradients of a loss such as `weight.sum()` are views of it. Nothing writes to gradients in place, but a backward
    pass of the user's might; then the next loss gets another tensor.
    """
    if loss.dim():
        return torch.ones_like(loss)
    ones = _ones.get(loss.dtype)
    if ones is None or _write_count(ones):
        ones = _ones[loss.dtype] = torch.ones_like(loss)
    return ones


def children_in(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the dict of the submodules of a module; reading all names by generators takes four times as long."""
    return module._modules  # noqa: SLF001  # torch has no public dict; a compiler cannot read through an `attrgetter`


def parameters_in(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dict of the parameters of a module; see `children_in`."""
    return module._parameters  # noqa: SLF001  # likewise


def buffers_in(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict of the buffers of a module; `setattr` takes longer and registers what it assigns."""
    return module._buffers  # noqa: SLF001  # likewise


def non_persistent_in(module: nn.Module) -> frozenset[str] | set[str]:
    """Return the names of the buffers of a module that its `state_dict` leaves out; torch has no public set."""
    return getattr(module, "_non_persistent_buffers_set", frozenset())


def select_view() -> Callable[[Tensor], Tensor]:
    """Return the function that makes a view of a tensor without a gradient: `detach` or, in a transform, another one.

    Inside of a transform of `torch.func`, `detach` returns a tensor that the transform tracks already, and that no
    further argument of it may be.
    """
    return torch.Tensor.detach if _innermost_transform() is None else _read_data


_innermost_transform: Final[Callable[[], Any]] = _find("_C._functorch.peek_interpreter_stack")


def _read_data(tensor: Tensor) -> Tensor:
    return tensor.data


def register_torch_pytree(
    cls: type[Any],
    flatten: Callable[[Any], tuple[Sequence[Any], Any, Sequence[Any]]],
    unflatten: Callable[[Any, Iterable[Any]], Any],
    *,
    dump: Callable[[Any], Any],
    load: Callable[[Any], Any],
    has_fields: bool,
) -> None:
    """Register a class as a pytree of torch, which has no public name for its registry.

    Args:
        cls: The class; module and name identify it in serialized structures.
        flatten: Returns `(children, context, keys of the children)` of an object.
        unflatten: `(context, children) -> object`.
        dump: Returns a context as JSON.
        load: Returns the context that was dumped.
        has_fields: Whether keys are names of attributes, and not what `object[key]` takes.
    """
    pytree: Any = torch.utils._pytree  # noqa: SLF001  # see above
    key_type = pytree.GetAttrKey if has_fields else pytree.MappingKey

    def flatten_with_keys(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, context, keys = flatten(tree)
        return [(key_type(key), child) for key, child in zip(keys, children, strict=True)], context

    pytree.register_pytree_node(
        cls,
        lambda tree: (list((flat := flatten(tree))[0]), flat[1]),
        lambda children, context: unflatten(context, children),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=dump,
        from_dumpable_context=load,
        flatten_with_keys_fn=flatten_with_keys,
    )


def find_torch_pytree(cls: type[Any]) -> Callable[[Any], tuple[Sequence[Any], Callable[[list[Any]], Any]]] | None:
    """Return how torch flattens a class that is registered as a pytree; else None.

    Returns:
        `container -> (children, children -> container)`, or None.
    """
    node: Any = torch.utils._pytree.SUPPORTED_NODES.get(cls)  # noqa: SLF001  # as `register_torch_pytree`
    if node is None:
        return None

    def flatten(container: Any) -> tuple[Sequence[Any], Callable[[list[Any]], Any]]:
        children, context = node.flatten_fn(container)
        return children, lambda mapped: node.unflatten_fn(mapped, context)

    return flatten


@cache
def optimizer_attributes() -> frozenset[str]:
    """Return the names of the attributes that torch itself sets on every optimizer.

    Call it only where an optimizer exists already: constructing the first one imports torch's compiler, which takes
    about as long as importing torch.
    """
    # A fused optimizer sets the last one at its first step.
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)]))) | {"_need_device_dtype_check_for_fused"}


_REFUSED: Final = "not compiled: "
_REGISTERED: Final = re.compile(r"\._(parameters|buffers)$")
_DEFINITIONS: Final = (FunctionType, BuiltinFunctionType, ModuleType, type)
_DEFINITION_GUARD: Final = re.compile(
    r"G\['\w+'\]|G\['(?!__import_)\w+'\]\.\w+|G\['__import_(torch|noether)\w*'\][.\w]*|__import__\('torch'\)"
    r"|G\['__builtins_dict___\d+'\]\['\w+'\]"
)
_CONSTANT_GUARD: Final = re.compile(
    r".*\bG\['__import_noether\w*'\]\.(_?[A-Z]|\w+\.__closure__).*"
    r"|.*\bG\['__import_torch_dot_(_functorch|nn_dot_utils|optim)\w*'\]\..*\.__(func|closure|(kw)?defaults)__.*"
    r"|G\['\w+'\]\.__(kw)?defaults__.*"
    r"|dict\(type\(self\..*\['named_(buffers|modules|parameters)'\]\.__defaults__.*"
    r"|.*__import_(torch|_\('torch).*\.(SUPPORTED_NODES|_LEAF_SPEC|_MISSING|_initial_missing)\b.*"
)
"""Constants of noether and torch, and the defaults and closures of functions of noether and of torch that it calls."""


class NewGraphError(NoetherError):
    """A call compiled a graph, which has not run yet: nothing is changed but the generators of torch; call again."""


class RefusedGraphError(NoetherError):
    """A function that a `CompiledGraph` does not compile; the message says why."""


class Trace(NamedTuple):
    """What one graph would do.

    Args:
        changes: Where the function changes Python objects that exist already, such as `self.calls`.
        unused: For each call of `torch.func.grad` the indices of the inputs that its output does not depend on.
    """

    changes: list[str]
    unused: list[frozenset[int]]


class CompiledGraph:
    """A function compiled as one graph, for static shapes, without the guards that cannot fail.

    A call that has to compile a graph raises an error and changes nothing, so it may use the caller's own tensors and
    objects. The next call runs the graph.

    Torch evaluates about a thousand guards before each call, which takes as long as some of the kernels. Most of them
    check that the name of a function, class or module still has the same meaning, check constants of torch and noether,
    or check arguments and attributes that `watched` does not name; the compiled function has none of these.

    A compiled function of torch finds its graph in the interpreter of Python, which takes as long again. So a call
    evaluates the guards of the graphs that it knows itself, and calls torch only if all of them fail.

    Args:
        function: The method to compile; it takes positional arguments.
        watched: Beginnings of the names of arguments and attributes whose type, value or form may change between calls,
            such as `self.model`. All others stay as they are, but tensors may have other values.
        backend: Name of the compiler.
        refuse: Returns why a function must not be compiled, from a trace of what it does, or None.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        refuse: Callable[[Trace], str | None],
        watched: tuple[str, ...],
        backend: str = "inductor",
    ) -> None:
        self._has_begun = False  # whether the last call ran its graph
        self._begin: Callable[[], object] = nullcontext
        self._backend, self._refuse = backend, refuse
        self._method: Any = function
        code = function.__func__.__code__  # type: ignore[attr-defined]  # it is a method
        self._names = names = code.co_varnames[: code.co_argcount]
        self._graphs: list[tuple[Any, Callable[..., Any]]] = []  # guards of each graph, and the code that calls it

        def keep(guards: Sequence[Any]) -> list[bool]:
            return [not (_is_definition(guard) or is_fixed(guard.name)) for guard in guards]

        def is_fixed(name: str) -> bool:
            is_local = re.split(r"\W", name, maxsplit=1)[0] in names
            return not name.startswith(watched) if is_local else _CONSTANT_GUARD.fullmatch(name) is not None

        self._function = torch.compile(
            function, fullgraph=True, dynamic=False, backend=self._compile, options={"guard_filter_fn": keep}
        )

    def __call__(self, *args: Any, begin: Callable[[], object]) -> Any:
        """Run the graph for these arguments.

        Args:
            args: The arguments of the function.
            begin: Is called right before the graph runs, which may write to tensors.

        Raises:
            NewGraphError: If this call compiled it.
            RefusedGraphError: If it cannot be compiled, or is refused; then nothing has run.
        """
        self._has_begun, self._begin = False, begin
        arguments = (self._method.__self__, *args)
        values = dict(zip(self._names, arguments, strict=True))
        try:
            for index, (guards, run) in enumerate(self._graphs):
                if guards.cache_entry is not None and guards.check(values):  # torch has not discarded the graph
                    if index:  # the next call probably runs it, too
                        self._graphs.insert(0, self._graphs.pop(index))
                    return run(*arguments)
            # Without calls of torch's profiler in the code around the graph.
            with torch._dynamo.config.patch(record_runtime_overhead=False):  # noqa: SLF001  # the module of its settings
                result = self._function(*args)
        except NewGraphError:
            raise
        except Exception as error:  # torch, its compiler and the traced code raise errors of any type
            if self._has_begun:
                raise
            _, marker, reason = str(error).partition(_REFUSED)  # torch adds words before and after it
            raise RefusedGraphError(reason.splitlines()[0] if marker else str(error)) from error
        self._graphs = self._find_graphs()
        return result

    def _find_graphs(self) -> list[tuple[Any, Callable[..., Any]]]:
        """Return the guards of each graph that was compiled here, and the code that calls it."""
        function = self._method.__func__
        entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(function)  # noqa: SLF001  # torch has no public way to the graphs of a function
        ours = [entry for entry in entries if getattr(entry.backend, "compiler_fn", None) == self._compile]
        return [(entry.guard_manager, FunctionType(entry.code, function.__globals__)) for entry in ours]

    def _compile(self, graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        reason = self._refuse(_read_trace(graph))
        if reason is not None:
            raise RefusedGraphError(_REFUSED + reason)
        compiler = torch._dynamo.backends.registry.lookup_backend(self._backend)  # noqa: SLF001  # the compilers by name
        # The guards have checked all tensors that the graph gets; its own checks, at each call, would find nothing else
        # than faults of the compiler.
        with torch._inductor.config.patch(size_asserts=False, alignment_asserts=False):  # noqa: SLF001  # the module of its settings
            run = compiler(graph, inputs)
        # Torch wraps what this returns, so that nothing compiles the code that calls a graph; once is enough.
        run = getattr(run, "_torchdynamo_orig_callable", run)
        is_new = True

        def call(*args: Any) -> Any:
            nonlocal is_new
            if is_new:
                is_new = False
                raise NewGraphError
            self._has_begun = True
            self._begin()
            return run(*args)

        return call


def refuse_to_compile(reason: str) -> None:
    """End the compilation of the function that calls this."""
    torch._dynamo.graph_break(_REFUSED + reason)  # noqa: SLF001  # torch.compiler has no function for it


def _read_trace(graph: Any) -> Trace:
    """Return what the graph that torch is compiling would do; only its backend can call this."""
    mutations = torch._dynamo.variables.base  # noqa: SLF001  # torch tells no backend what else a function changes
    existing = (mutations.AttributeMutationExisting, mutations.ValueMutationExisting)
    effects = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.side_effects  # noqa: SLF001  # this file is the one for private parts of torch
    changes = []
    for changed in effects._get_modified_vars():  # noqa: SLF001  # this file is the one for private parts of torch
        if isinstance(changed.mutation_type, existing) and (source := getattr(changed, "source", None)) is not None:
            name = source.name if isinstance(source.name, str) else source.name()
            attributes = effects.store_attr_mutations.get(changed, {})
            changes += [f"{name}.{attribute}" for attribute in attributes] or [name]
    # A functional call exchanges these, and returns them.
    return Trace([name for name in changes if not _REGISTERED.search(name)], _find_unused(graph))


def _find_unused(graph: Any) -> list[frozenset[int]]:
    """Return `Trace.unused` of a graph, by running it without values: torch returns zeros for an unused input."""
    unused = []

    class GradientReader(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is _autograd_grad():
                outputs, inputs = ([each for each in args[0] if each.requires_grad], args[1])
                grads = torch.autograd.grad(outputs, inputs, retain_graph=True, allow_unused=True) if outputs else ()
                used = {index for index, grad in enumerate(grads) if grad is not None}
                unused.append(frozenset(range(len(inputs))) - used)
            return super().call_function(target, args, kwargs)

    examples = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    modes = [each.fake_mode for each in examples if hasattr(each, "fake_mode")]
    with modes[0] if modes else nullcontext():
        GradientReader(graph).run(*[each.clone() if isinstance(each, Tensor) else each for each in examples])
    return unused


def _autograd_grad() -> Any:
    return torch._functorch.eager_transforms._autograd_grad  # noqa: SLF001  # the node of a gradient in a graph


def _is_definition(guard: Any) -> bool:
    is_definition = guard.has_value and isinstance(guard.value, _DEFINITIONS)
    return is_definition and _DEFINITION_GUARD.fullmatch(guard.name) is not None


class _Check(NamedTuple):
    """A private API, what uses it, and a function that raises if it does not work."""

    name: str
    use: str
    check: Callable[[], None]


def self_test() -> list[str]:
    """Return a line for each private API that does not work with this torch: its name, what uses it, and the error.

    Example:
        >>> self_test()
        []
    """
    problems = []
    for name, use, check in _CHECKS:
        try:
            check()
        except Exception as error:  # noqa: BLE001  # what another version of torch raises is unknown
            problems.append(f"{name} ({use}) does not work with torch {torch.__version__}: {error!r}")
    return problems


def _expect(found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"expected {expected!r}, got {found!r}")


def _check_storages() -> None:
    tensor = torch.zeros(1)
    storage = tensor.untyped_storage()
    counts = [storage_use_count(storage_handle(storage))]
    view = tensor.detach()
    counts.append(storage_use_count(storage_handle(storage)))
    del view
    counts.append(storage_use_count(storage_handle(storage)))
    _expect(counts, [2, 3, 2])


def _check_write_counts() -> None:
    tensor = torch.zeros(1)
    counts = write_counts([tensor, tensor.add_(1)])
    _expect(counts, [1, 1])


def _check_run_backward() -> None:
    leaf, unused = (torch.tensor(2.0, requires_grad=True) for _ in range(2))
    gradient, none = run_backward(leaf.square(), [leaf, unused])
    _expect((float(gradient if gradient is not None else 0), none, leaf.grad), (4.0, None, None))


def _check_reparametrize() -> None:
    model = nn.Linear(1, 1, bias=False)
    before, weights = model.weight, {"weight": torch.full((1, 1), 3.0)}
    with reparametrize(model, weights, tie_weights=True):
        _expect(model(torch.ones(1, 1)).tolist(), [[3.0]])
    _expect(model.weight is before, expected=True)


def _check_buffers() -> None:
    model = nn.BatchNorm1d(1)
    buffers_in(model)["running_mean"] = replaced = torch.ones(1)
    _expect(model.running_mean is replaced, expected=True)
    model.register_buffer("table", torch.ones(1), persistent=False)
    _expect(non_persistent_in(model), {"table"})


def _check_members() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    norm = model[0]
    _expect(children_in(model), {"0": norm})
    _expect((list(parameters_in(norm)), next(iter(buffers_in(norm)))), (["weight", "bias"], "running_mean"))
    norm.register_buffer("cache", torch.zeros(1), persistent=False)
    _expect(non_persistent_in(norm), {"cache"})


def _check_set_grad_enabled() -> None:
    enabled = torch.is_grad_enabled()
    set_grad_enabled(False)
    found = torch.is_grad_enabled()
    set_grad_enabled(enabled)
    _expect((found, torch.is_grad_enabled()), (False, enabled))


def _check_foreach() -> None:
    tensors = [torch.zeros(1), torch.ones(2)]
    foreach_add_(tensors, 1)
    _expect([tensor.tolist() for tensor in tensors], [[1.0], [2.0, 2.0]])
    ends = [torch.full_like(tensor, 3.0) for tensor in tensors]
    out_of_place = [tensor.tolist() for tensor in foreach_lerp(tensors, ends, 0.5)]
    _expect(out_of_place, [[2.0], [2.5, 2.5]])
    foreach_lerp_(tensors, ends, 0.5)
    _expect([tensor.tolist() for tensor in tensors], out_of_place)
    foreach_copy_(tensors, ends)
    _expect([tensor.tolist() for tensor in tensors], [[3.0], [3.0, 3.0]])


def _check_fused_adam() -> None:
    for kernel, cls in ((fused_adam_, torch.optim.Adam), (fused_adamw_, torch.optim.AdamW)):
        expected = nn.Parameter(torch.ones(2))
        expected.grad = torch.tensor([1.0, -2.0])
        cls([expected], lr=0.1, fused=True).step()
        param, grad, mean, square = torch.ones(2), expected.grad, torch.zeros(2), torch.zeros(2)
        settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False}
        decay = 0.0 if cls is torch.optim.Adam else 0.01
        kernel([param], [grad], [mean], [square], [], [torch.tensor(1.0)], lr=0.1, weight_decay=decay, **settings)
        _expect(param.tolist(), expected.tolist())


def _check_optimizer_attributes() -> None:
    param = nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    for fused in (False, True):
        optimizer = torch.optim.AdamW([param], fused=fused)
        constructed = set(vars(optimizer))
        optimizer.step()
        _expect(vars(optimizer).keys() - constructed - optimizer_attributes(), set())


class _Box:
    """A container of one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _check_pytrees() -> None:
    pytree: Any = torch.utils._pytree  # noqa: SLF001  # as `register_torch_pytree`
    if _Box not in pytree.SUPPORTED_NODES:
        register_torch_pytree(
            _Box, lambda box: ([box.tensor], (), ["tensor"]), lambda _, children: _Box(*children),
            dump=list, load=tuple, has_fields=True,
        )  # fmt: skip
    box = _Box(torch.ones(3))
    paths, structure = pytree.tree_flatten_with_path(box)
    _expect([pytree.keystr(path) for path, _ in paths], [".tensor"])
    _expect(pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure, expected=True)
    _expect(torch.func.grad(lambda box: box.tensor.square().sum())(box).tensor.tolist(), [2.0, 2.0, 2.0])
    children, unflatten = find_torch_pytree(_Box)(box)  # type: ignore[misc]  # it is registered
    _expect(unflatten([child + 1 for child in children]).tensor.tolist(), [2.0, 2.0, 2.0])


def _check_select_view() -> None:
    tensor = torch.ones(2)
    tensor.add_(1)
    _expect(write_counts([select_view()(tensor)]), [1])  # a write to one of them is counted for both
    views: list[Tensor] = []

    def read_view(factor: Tensor) -> Tensor:
        views.append(select_view()(tensor))
        return factor.sum()

    torch.func.grad(read_view)(torch.ones(1))
    _expect(views[0].data_ptr() == tensor.data_ptr(), expected=True)  # a tracked tensor has no memory of its own


class _Scaling:
    """Multiplies by one number that a compiled call has to read again, and by one that it may treat as fixed."""

    def __init__(self) -> None:
        self.read, self.fixed = 2.0, 10.0

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor * self.read * self.fixed

    def count(self, inputs: tuple[Tensor, Tensor]) -> Any:
        self.read += 1
        return torch.func.grad(lambda inputs: inputs[0].square())(inputs)


def _check_compile_graph() -> None:
    scaling = _Scaling()
    traces: list[Trace] = []
    compiled = CompiledGraph(scaling.__call__, watched=("self.read",), backend="eager", refuse=traces.append)

    def call() -> float | None:
        try:
            return float(compiled(torch.ones(()), begin=nullcontext))
        except NewGraphError:
            return None

    found = [call(), call()]
    scaling.fixed = 100.0
    found.append(call())
    scaling.read = 3.0
    found += [call(), call()]
    _expect(found, [None, 20.0, 20.0, None, 300.0])
    compiled._function = refuse_to_compile  # noqa: SLF001  # the known graphs must not need it
    scaling.read = 2.0
    _expect(call(), 20.0)

    with suppress(NewGraphError):
        graph = CompiledGraph(scaling.count, watched=("self.read",), backend="eager", refuse=traces.append)
        graph((torch.ones(()), torch.ones(())), begin=nullcontext)
    _expect(([name.rpartition(".")[2] for name in traces[-1].changes], traces[-1].unused), (["read"], [{1}]))
    _expect(scaling.read, 2.0)


def _check_default_store() -> None:
    if not torch.distributed.is_available():
        return
    from torch.distributed import HashStore  # type: ignore[attr-defined]  # exported without being listed
    from torch.distributed.distributed_c10d import Store

    is_new = not torch.distributed.is_initialized()
    if is_new:
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        _expect(isinstance(default_store(), Store), expected=True)
    finally:
        if is_new:
            torch.distributed.destroy_process_group()


_CHECKS: Final = (
    _Check("storage_use_count, storage_handle", "donation finds tensors that have other users", _check_storages),
    _Check("write_counts", "the step refuses a model that writes to its parameters", _check_write_counts),
    _Check("run_backward", "gradients of the step on the CPU", _check_run_backward),
    _Check("set_grad_enabled", "evaluations without gradients", _check_set_grad_enabled),
    _Check("reparametrize", "the step calls the model with the weights of a state", _check_reparametrize),
    _Check("buffers_in, non_persistent_in", "calls with the buffers of a state", _check_buffers),
    _Check("children_in, parameters_in", "states read live modules", _check_members),
    _Check(
        "foreach_add_, foreach_copy_, foreach_lerp, foreach_lerp_",
        "step counters of Adam, averages of weights, gradients of several ranks",
        _check_foreach,
    ),
    _Check("fused_adam_, fused_adamw_", "updates of fused Adam and AdamW", _check_fused_adam),
    _Check("register_torch_pytree, find_torch_pytree", "trees of states and outputs", _check_pytrees),
    _Check("select_view", "states are read inside of transforms of torch.func", _check_select_view),
    _Check("optimizer_attributes", "memory that an optimizer class keeps on itself", _check_optimizer_attributes),
    _Check("CompiledGraph", "compiled updates", _check_compile_graph),
    _Check("default_store", "failures of a rank that joined a group which exists", _check_default_store),
)

if __name__ == "__main__":
    if failed := self_test():
        raise SystemExit("\n".join(failed))
    print(f"all private APIs work with torch {torch.__version__}")  # noqa: T201  # a command reports to its user
