"""A function traced by running it: its own Python, on tensors without memory, once.

Dynamo reads bytecode and guards what it has looked at, and AOTAutograd traces twice what Dynamo has found.  A call that
owns its inputs needs none of that: a third of a second for each layer becomes a twentieth.  What cannot be traced in
this way is left to Dynamo, see :class:`NotDirectError`; most of all whatever has an effect besides its result, and
attention with masks, of which Dynamo's graph says more (``true_masks.py``).
"""

from __future__ import annotations

import inspect
import random
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx import traceback
from torch.overrides import TorchFunctionMode

from mosaic_compiler import ir
from mosaic_compiler.compat import trees
from mosaic_compiler.compat.symbols import ShapeEnv, new_number
from mosaic_compiler.compat.tensors import scaled_dot_product_attention
from mosaic_compiler.compat.tracing import (
    FakeTensorMode,
    enable_python_dispatcher,
    fake_argument,
    fake_weight,
    get_decompositions,
    make_fx,
)
from mosaic_compiler.errors import CacheError
from mosaic_compiler.owned.fingerprint import Fingerprint
from mosaic_compiler.owned.put_back import NotDirectError, ReadsTensorError, left_alone, replaced
from mosaic_compiler.planning.facts import Bindings
from mosaic_compiler.runtime.bindings import conditions_on, is_symbolic, outputs_of, spec_of


@dataclass(frozen=True)
class Direct:
    """A traced function.

    Attributes:
        module: the functional ATen graph, with fake-tensor metadata.
        inputs: for each placeholder what it is, see :class:`~mosaic_compiler.planning.facts.Bindings`.
        outputs, spec: likewise.
        static: positions of weights.
        sizes: sizes of tensors among the arguments, and whole numbers, by number: what the trace has made of them.
    """

    module: fx.GraphModule
    inputs: tuple[tuple[str, Any], ...]
    outputs: tuple[tuple[str, Any], ...]
    spec: str
    static: tuple[int, ...]
    sizes: tuple[tuple[int, tuple[Any, ...]], ...]

    def bindings(self, step: Any, leaves: Sequence[Any], values: Sequence[Any]) -> Bindings:
        """How calls of the function become calls of a step that was made of the graph.

        Args:
            leaves: of the arguments that it was traced with.
            values: the step's inputs in that call.

        Raises:
            NotDirectError: if something was taken for granted of sizes that no input says.
        """
        bound = {what for kind, what in self.inputs if kind == "argument"}
        symbols = step.numbers(values).symbols
        unread = {number: found for number, found in self.sizes if number not in bound}
        try:
            conditions = conditions_on(symbols.keys(), step.conditions)
        except CacheError as error:
            raise NotDirectError(str(error)) from None
        return Bindings(
            inputs=self.inputs,
            outputs=self.outputs,
            spec=self.spec,
            conditions=conditions,
            arguments=len(leaves),
            unread=tuple(
                (number, _told(found, symbols), leaves[number].is_contiguous())
                for number, found in unread.items()
                if isinstance(leaves[number], Tensor)
            ),
            exact=tuple((number, leaves[number]) for number in unread if not isinstance(leaves[number], Tensor)),
        )


def trace_directly(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    known: Fingerprint,
    device: torch.device | None = None,
) -> Direct:
    """Run a function on tensors without memory, and write down what it does.

    Args:
        known: what it refers to.
        device: what tensors of the meta device are planned for.

    Raises:
        NotDirectError: if it is left to Dynamo; whatever it raises itself is one, too.
    """
    leaves, spec = trees.flatten((tuple(args), dict(kwargs)))
    if known.doubts:
        raise NotDirectError("; ".join(known.doubts))
    tensors = known.tensors
    if any(tensor is None for tensor in tensors) or any(_is_strange(t) for t in (*tensors, *leaves)):
        raise NotDirectError("it has tensors of other kinds")
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    names = _names_of(function, args, kwargs)
    numbers = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor) or is_symbolic(leaf)]
    fakes: list[Any] = [
        fake_argument(mode, _on(leaf, device), names[number])
        if isinstance(leaf := leaves[number], Tensor)
        else new_number(environment, names[number], leaf)[1]
        for number in numbers
    ]
    given_sizes = [list(fake.shape) if isinstance(fake, Tensor) else [fake] for fake in fakes]
    weights = {id(tensor): fake_weight(mode, tensor, device) for tensor in tensors if tensor is not None}
    given = [*fakes, *weights.values()]
    written: list[Any] = []

    def run(*inputs: Tensor) -> list[Tensor]:
        mine = list(leaves)
        for number, value in zip(numbers, inputs, strict=False):
            mine[number] = value
        own_args, own_kwargs = trees.unflatten(mine, spec)
        result = function(*own_args, **own_kwargs)
        written.append((result, mine))
        return [leaf for leaf in trees.flatten(result)[0] if isinstance(leaf, Tensor)]

    before = random.getstate()
    try:
        with (
            left_alone(known.holders),
            replaced(known.modules, weights),
            torch.no_grad(),
            mode,
            traceback.preserve_node_meta(),
            _Places(known.modules),
            enable_python_dispatcher(),
        ):
            table: Any = get_decompositions([torch.ops.aten.rsub, torch.ops.aten._safe_softmax])
            traced = make_fx(run, table, tracing_mode="real", _allow_non_fake_inputs=True)(*given)
    except NotDirectError:
        raise
    except Exception as error:  # whatever a model's code does that such tensors do not do
        raise NotDirectError(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}") from error
    if random.getstate() != before:
        raise NotDirectError("it draws random numbers in Python")
    if Fingerprint(function).state != known.state:
        raise NotDirectError("it changes what the model holds")
    sizes = tuple((number, tuple(map(ir.expr_of, found))) for number, found in zip(numbers, given_sizes, strict=True))
    result, arguments = written[0]
    return _finished(traced, result, arguments, given, numbers, [t for t in tensors if t is not None], sizes)


def _finished(
    module: fx.GraphModule,
    result: Any,
    arguments: Sequence[Any],
    given: Sequence[Any],
    numbers: Sequence[int],
    tensors: Sequence[Tensor],
    sizes: tuple[tuple[int, tuple[Any, ...]], ...],
) -> Direct:
    """The graph without inputs that it does not read, and what its inputs and results are."""
    graph = module.graph
    real = {id(tensor) for tensor in tensors}
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            if node.target._schema.is_mutable:
                raise NotDirectError(f"{node.target} writes to its operands")
        elif node.op == "get_attr" and id(getattr(module, str(node.target), None)) in real:
            raise NotDirectError("it reads a tensor that is no parameter or buffer")
        elif node.op == "call_module":
            raise NotDirectError("it has graphs inside")
    _read_sizes_off_inputs(graph)
    storages = {tensor.untyped_storage()._cdata for tensor in given if isinstance(tensor, Tensor)}
    returned: Any = graph.output_node().args[0]
    leaves = [leaf for leaf in trees.flatten(result)[0] if isinstance(leaf, Tensor)]
    own = {id(leaf) for leaf in arguments}
    made = [(leaf, node) for leaf, node in zip(leaves, returned, strict=True) if id(leaf) not in own]
    if any(leaf.untyped_storage()._cdata in storages for leaf, _ in made):
        raise NotDirectError("it returns a view of an input")
    results = tuple(node for _, node in made)
    if len(set(results)) != len(results):
        raise NotDirectError("it returns a value twice")
    try:
        outputs, spec = tuple(outputs_of(result, arguments, [leaf for leaf, _ in made])), spec_of(result)
    except CacheError as error:
        raise NotDirectError(str(error)) from None
    graph.output_node().args = (results,)
    ir.remove_dead_code(graph)
    inputs: list[tuple[str, Any]] = []
    for at, node in enumerate(graph.find_nodes(op="placeholder")):
        if not node.users:
            graph.erase_node(node)
        elif at < len(numbers):
            inputs.append(("argument", numbers[at]))
        else:
            inputs.append(("tensor", at - len(numbers)))
    module.recompile()
    static = tuple(position for position, (kind, _) in enumerate(inputs) if kind == "tensor")
    return Direct(module, tuple(inputs), outputs, spec, static, sizes)


def _read_sizes_off_inputs(graph: fx.Graph) -> None:
    """A size that an input has is read there: a value need not live for its size."""
    known: dict[Any, fx.Node] = {}
    placeholders = graph.find_nodes(op="placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    wanted = graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    with graph.inserting_before(first):
        for node in placeholders:
            tensor = ir.tensor_of(node)
            for dim, size in enumerate(() if tensor is None else tensor.shape):
                expr = ir.expr_of(size)
                if expr.is_Symbol and expr not in known:
                    known[expr] = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                    known[expr].meta = {"val": size}
    for node in wanted:
        place = known.get(ir.expr_of(node.meta["val"]))
        if place is not None:
            node.replace_all_uses_with(place)
            graph.erase_node(node)


_READS = frozenset(
    {"item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__complex__", "__array__", "equal"}
)
"""Functions that make something of Python's of what is in a tensor."""


class _Places(TorchFunctionMode):
    """Notes for each operator which module and which line of the model's code calls it; refuses attention that Dynamo's
    graph says more of."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._paths = _paths_of(modules)
        self._stack: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _Places:
        from torch.nn.modules import module as hooks

        self._hooks = [
            hooks.register_module_forward_pre_hook(self._begin),
            hooks.register_module_forward_hook(self._end, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, function: Any, kinds: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(function, "__name__", "") in _READS and isinstance(args[0] if args else None, Tensor):
            raise ReadsTensorError
        if function is scaled_dot_product_attention:
            _check_attention(args, given)
        meta = traceback.current_meta
        if (line := _line_of(sys._getframe(1))) is not None:
            meta["stack_trace"] = line
        if self._stack:
            meta["nn_module_stack"] = {path: (path, nn.Module) for path in self._stack}
        return function(*args, **given)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._stack.append(self._paths.get(id(module), self._stack[-1] if self._stack else ""))

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._stack:
            self._stack.pop()


def _check_attention(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if mask is not None:
        raise NotDirectError("its attention has a mask")
    query, key, value = (*args[:3], *[kwargs[name] for name in ("query", "key", "value")[len(args) :]])
    if query.shape[-1] != value.shape[-1] or key.shape[-1] != value.shape[-1]:
        raise NotDirectError("its attention has values of another depth than keys")


def _line_of(frame: types.FrameType | None) -> str | None:
    """The innermost line that is no code of PyTorch's or ours."""
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_OWN) and not code.co_filename.startswith("<"):
            return f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
        frame = frame.f_back
    return None


def _folder_of(module: types.ModuleType) -> str:
    return str(module.__file__).rpartition("/")[0]


_OWN = (
    _folder_of(torch) + "/",
    _folder_of(sys.modules["mosaic_compiler"]) + "/owned/",
    _folder_of(inspect) + "/contextlib",
)


def _paths_of(modules: Sequence[nn.Module]) -> dict[int, str]:
    """What modules are called in the one that has them all."""
    children = {id(child) for module in modules for child in module.children()}
    found: dict[int, str] = {}
    for module in modules:
        if id(module) not in children:
            for path, part in module.named_modules():
                found.setdefault(id(part), path)
    return found


def _names_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """What a function calls each leaf of its arguments."""
    called: Any = function.forward if isinstance(function, nn.Module) else function
    try:
        formal = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        formal = []
    names = [p.name for p in formal if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    found: list[str] = []
    for position, value in enumerate(args):
        name = names[position] if position < len(names) else f"args{position}"
        found += _numbered(name, len(trees.flatten(value)[0]))
    for name, value in kwargs.items():
        found += _numbered(name, len(trees.flatten(value)[0]))
    return found


def _told(sizes: Sequence[Any], symbols: Any) -> tuple[Any, ...]:
    """What a trace says of the sizes of a tensor that its graph does not get: a number, another size, or nothing."""
    return tuple(int(size) if size.is_Integer else size if size in symbols else None for size in sizes)


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}_{number}" for number in range(count)]


def _on(tensor: Tensor, device: torch.device | None) -> Tensor:
    if tensor.is_meta and device is not None:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return tensor


def _is_strange(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return False
    plain = type(leaf) in (Tensor, nn.Parameter, nn.Buffer) and leaf.layout is torch.strided
    return not plain or leaf.is_conj() or leaf.is_neg() or (leaf.requires_grad and torch.is_grad_enabled())
