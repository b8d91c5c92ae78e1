"""Questions that every room asks of an FX node: sizes, storage, aliasing, effects, provenance.

The IR is the ATen graph that AOTAutograd hands over: functional, except for trailing ``copy_`` into
mutated inputs and for the in-place writes that our own pass introduces.  Nothing here knows a model;
aliasing and mutation are read from operator schemas.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx._lazy_graph_module import _LazyGraphModule

from mosaic_compiler.clusters import cluster_of
from mosaic_compiler.kernels import ops
from mosaic_compiler.loops import loop_of

Root: TypeAlias = "tuple[fx.Node, int]"
"""A storage: the node that creates it and which of its outputs it is (0 for a single output)."""


# ---------------------------------------------------------------------------------------- values
def value_of(node: fx.Node) -> Any:
    """What the node produces under fake tensors: a FakeTensor, SymInt, number, or tuple of them."""
    return node.meta.get("val")


def argument_value(given: Any) -> Any:
    """What an argument of a call stands for: a node's value, or a number itself."""
    return value_of(given) if isinstance(given, fx.Node) else given


def tensors_of(node: fx.Node) -> tuple[torch.Tensor | None, ...]:
    """The node's outputs, one entry each; ``None`` where an output is not a tensor."""
    value = value_of(node)
    if isinstance(value, (tuple, list)):
        return tuple(v if isinstance(v, torch.Tensor) else None for v in value)
    return (value if isinstance(value, torch.Tensor) else None,)


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The node's single tensor output, or ``None``."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def only_tensor(node: fx.Node) -> torch.Tensor:
    """The tensor of a node that is known to have just one."""
    tensor = tensor_of(node)
    assert tensor is not None, f"{node} is no single tensor"
    return tensor


def is_symbolic_number(value: object) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def expr_of(size: Any) -> sympy.Expr:
    """The sympy expression of an int or SymInt, after the shape environment's replacements."""
    if is_symbolic_number(size):
        return size.node.expr
    return sympy.Integer(size) if type(size) is int else sympy.sympify(size)


def own_strides(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Strides of a result in storage of its own, where no two elements share a place.

    Some fake kernels copy the strides of an expanded operand (0), which no real kernel does.
    """
    pairs = list(zip(tensor.shape, tensor.stride(), strict=True))
    if all(expr_of(stride) != 0 or expr_of(size) == 1 for size, stride in pairs):
        return tuple(tensor.stride())
    return tuple(math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.dim()))


def storage_extent(tensor: torch.Tensor) -> sympy.Expr:
    """Bytes from the first to the last element of a result in storage of its own; 0 where a size is 0.

    A dense tensor of ``[rows, D]`` float32 has ``4 * rows * D``.
    """
    last: sympy.Expr = sympy.Integer(0)
    for size, stride in zip(tensor.shape, own_strides(tensor), strict=True):
        extent = expr_of(size)
        if extent == 0:
            return sympy.Integer(0)
        last += (extent - 1) * expr_of(stride)
    return sympy.expand((last + 1) * tensor.dtype.itemsize)


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, device, sizes and strides, compared as expressions (so no guard is added)."""
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    pairs = zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True)
    return all(expr_of(x) == expr_of(y) for x, y in pairs)


def layout_of(value: Any) -> Any:
    """Comparable description of what a node produces; strides of sizes 0 and 1 do not count."""
    if isinstance(value, (tuple, list)):
        return tuple(layout_of(item) for item in value)
    if isinstance(value, torch.Tensor):
        sizes = tuple(expr_of(size) for size in value.shape)
        strides = tuple(
            None if size in (0, 1) else expr_of(stride) for size, stride in zip(sizes, value.stride(), strict=True)
        )
        return (str(value.dtype), str(value.device), sizes, strides, expr_of(value.storage_offset()))
    if is_symbolic_number(value) or isinstance(value, (int, float)):
        return expr_of(value)
    return repr(value)


def equal_layouts(a: Any, b: Any) -> bool:
    """Whether two :func:`layout_of` describe the same for every value of the symbols.

    Expressions that sympy does not bring to one form, such as ``s**2 // s`` and ``s``, are compared at some values.
    """
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(equal_layouts, a, b))
    if a == b or not (isinstance(a, sympy.Basic) and isinstance(b, sympy.Basic)):
        return bool(a == b)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    return all(
        a.xreplace(values) == b.xreplace(values)
        for start in (2, 7, 64, 333, 1009, 4099)
        if (values := {symbol: sympy.Integer(start + 97 * i) for i, symbol in enumerate(symbols)})
    )


def is_contiguous(tensor: torch.Tensor) -> bool:
    """Row-major without gaps, for every value of the symbols."""
    expected: sympy.Expr = sympy.Integer(1)
    for size, stride in reversed(list(zip(tensor.shape, tensor.stride(), strict=True))):
        extent = expr_of(size)
        if extent != 1 and sympy.expand(expr_of(stride) - expected) != 0:
            return False
        expected = expected * extent
    return True


def magnitude(expr: sympy.Expr) -> int:
    """Its value where every symbol is a large number: to compare sizes and strides by."""
    return int(expr.xreplace({symbol: sympy.Integer(1009) for symbol in expr.free_symbols}))


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Dims from the largest stride to the smallest; dims of size 1 stay where they are."""
    strides = [magnitude(expr_of(stride)) for stride in tensor.stride()]
    wide = [dim for dim, size in enumerate(tensor.shape) if expr_of(size) != 1]
    ranked = iter(sorted(wide, key=lambda dim: -strides[dim]))
    return [next(ranked) if dim in wide else dim for dim in range(tensor.dim())]


def free_symbols(node: fx.Node) -> set[sympy.Symbol]:
    """Symbols in the sizes, strides and offsets of everything the node produces."""
    found: set[sympy.Symbol] = set()
    for number in numbers_in(value_of(node)):
        if is_symbolic_number(number):
            found |= expr_of(number).free_symbols
    return found


def numbers_in(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield from value.shape
        yield from value.stride()
        yield value.storage_offset()
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from numbers_in(item)
    else:
        yield value


# -------------------------------------------------------------------------------------- operators
def is_random(node: fx.Node) -> bool:
    """Draws from a random generator: may be neither merged, dropped nor reordered.

    Attention is tagged as random because it can drop out; with a dropout of 0 it draws nothing.
    """
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    return not any(a.name == "dropout_p" for a in node.target._schema.arguments) or argument(node, "dropout_p") != 0


def argument(node: fx.Node, name: str) -> Any:
    """A call's argument by its name in the operator's schema; its default if it is not given."""
    assert isinstance(node.target, OpOverload)
    for index, formal in enumerate(node.target._schema.arguments):
        if formal.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, formal.default_value if formal.has_default_value() else None)
    return None


def is_pointwise(node: fx.Node) -> bool:
    """Output element i depends on element i of each (broadcast) operand only."""
    return isinstance(node.target, OpOverload) and _is_pointwise_packet(node.target)


@functools.cache
def _is_pointwise_packet(op: OpOverload) -> bool:
    """Only some overloads of an op carry the tag: ``mul.Tensor`` does, ``mul.out`` does not.  Those with the same
    arguments count too; ``max.dim`` is not ``max.other``."""
    names = [argument.name for argument in op._schema.arguments if not argument.is_out]
    return any(
        torch.Tag.pointwise in overload.tags
        and [argument.name for argument in overload._schema.arguments if not argument.is_out] == names
        for overload in overloads_of(op)
    )


def overloads_of(op: OpOverload) -> list[OpOverload]:
    """All overloads of the op's packet."""
    packet: Any = op._overloadpacket
    return [getattr(packet, name) for name in packet.overloads()]


def taken_over(node: fx.Node) -> tuple[int | None, ...] | None:
    """For each result of a loop or cluster the operand whose memory it takes over; ``None`` for other nodes."""
    loop, cluster = loop_of(node), cluster_of(node)
    if loop is not None:
        return tuple(spec.into for spec in loop.outputs)
    return cluster.into if cluster is not None else None


def scatter_of(node: fx.Node, output: int = 0) -> tuple[fx.Node, Any, int] | None:
    """For a result whose rows are scattered into zeros: the row numbers, the number of memory pages that the rows lie
    in (int or node), and the bytes of a page."""
    loop = loop_of(node)
    if loop is not None:
        spec = loop.outputs[output].scatter
        return None if spec is None else (node.args[spec.index], node.args[spec.pages], spec.page)  # type: ignore[return-value]
    if node.target is ops.scatter_rows:
        _, index, _, pages, page = node.args
        return index, pages, page  # type: ignore[return-value]
    return None


def mutated_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes whose storage this node writes, by its operator schema; of a loop or cluster what it takes over."""
    positions = taken_over(node)
    if positions is not None:
        return tuple(node.args[position] for position in positions if position is not None)  # type: ignore[misc]
    if not isinstance(node.target, OpOverload):
        return ()
    written: list[fx.Node] = []
    for index, name in _written_positions(node.target):
        value = node.kwargs.get(name, node.args[index] if index < len(node.args) else None)
        values = value if isinstance(value, (tuple, list)) else (value,)
        written.extend(v for v in values if isinstance(v, fx.Node))
    return tuple(written)


@functools.cache
def _written_positions(op: OpOverload) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an op writes."""
    arguments = enumerate(op._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def has_effect(node: fx.Node) -> bool:
    """Must run even if nobody reads its result."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    return is_random(node) or bool(mutated_arguments(node)) or node.is_impure(impure_random=False)


def is_composite(op: OpOverload) -> bool:
    """An op that is a composition of others; whether its result is a view is decided at run time."""
    name: str = op._name
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


# Views whose schema does not say so, because autograd must not treat them as views.
_UNANNOTATED_VIEWS = frozenset({torch.ops.aten._unsafe_view.default})


def alias_base(node: fx.Node) -> fx.Node | None:
    """The operand whose storage the node's outputs share (view or in-place), or ``None``.

    ``getitem`` is not handled here: it forwards one output of its operand (see :class:`StorageMap`).
    """
    if not isinstance(node.target, OpOverload):
        return None
    for index, name in _aliased_positions(node.target):
        value = node.kwargs.get(name, node.args[index] if index < len(node.args) else None)
        if isinstance(value, fx.Node):
            return value
    return None


@functools.cache
def _aliased_positions(op: OpOverload) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments whose storage an op's results share."""
    schema = op._schema
    if op in _UNANNOTATED_VIEWS:
        return ((0, schema.arguments[0].name),)
    names: set[str] = set()
    for result in schema.returns:
        if result.alias_info is not None:
            names |= result.alias_info.before_set
    if not names and any(result.alias_info is not None for result in schema.returns):
        names = {"*"}  # a list of views (unbind, split): the operand's alias set ends up in the wildcard
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if (alias := argument.alias_info) is not None and names & (alias.before_set | alias.after_set)
    )


def is_view(node: fx.Node) -> bool:
    """A view that allocates nothing and writes nothing."""
    if not isinstance(node.target, OpOverload) or mutated_arguments(node):
        return False
    return alias_base(node) is not None and not is_composite(node.target)


class StorageMap:
    """Which storage each node's outputs live in.

    ``roots(node)`` has one :data:`Root` (or ``None`` for a non-tensor) per output.  A view, an
    in-place write and a ``getitem`` have the root of what they alias; everything else is its own.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._roots: dict[fx.Node, tuple[Root | None, ...]] = {}
        for node in graph.nodes:
            self.add(node)

    def add(self, node: fx.Node) -> None:
        self._roots[node] = self._compute(node)

    def roots(self, node: fx.Node) -> tuple[Root | None, ...]:
        return self._roots[node]

    def root(self, node: fx.Node) -> Root | None:
        """The root of a single-output node."""
        return self._roots[node][0] if len(self._roots[node]) == 1 else None

    def alias(self, node: fx.Node, root: Root) -> None:
        """Record that ``node`` (single output) now lives in ``root``."""
        self._roots[node] = (root,)

    def _compute(self, node: fx.Node) -> tuple[Root | None, ...]:
        if node.op == "output":
            return ()
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source, index = self._roots[node.args[0]], node.args[1]
            if isinstance(index, int) and tensor_of(node) is not None and index < len(source):
                return (source[index],)
        positions = taken_over(node)
        if positions is not None:
            return tuple(self._result_of_module(node, index, into) for index, into in enumerate(positions))
        base = alias_base(node) if node.op == "call_function" else None
        if base is not None and len(self._roots[base]) == 1:
            return tuple(self._roots[base][0] for _ in tensors_of(node))
        return tuple((node, index) if tensor is not None else None for index, tensor in enumerate(tensors_of(node)))

    def _result_of_module(self, node: fx.Node, index: int, into: int | None) -> Root | None:
        if into is None:
            return (node, index)
        operand = node.args[into]
        assert isinstance(operand, fx.Node)
        return self._roots[operand][0]


def rows_of_loop(node: fx.Node) -> sympy.Expr:
    """How many rows a call of a loop goes over."""
    loop = loop_of(node)
    assert loop is not None
    position = loop.sliced()[0]
    operand, dim = node.args[position], loop.operands[position]
    assert isinstance(operand, fx.Node)
    assert dim is not None
    return expr_of(only_tensor(operand).shape[dim])


def is_computed(root: Root) -> bool:
    """The storage belongs to the step: it is no input, weight or constant."""
    return root[0].op in ("call_function", "call_module")


def escaping_roots(graph: fx.Graph, storage: StorageMap) -> set[Root]:
    """Storages that outlive the step because an output lives in them."""
    output = next(node for node in graph.nodes if node.op == "output")
    return {root for node in output.all_input_nodes for root in storage.roots(node) if root is not None}


def written_roots(graph: fx.Graph, storage: StorageMap) -> set[Root]:
    """Storages that some node of the graph writes in place."""
    return {
        root
        for node in graph.nodes
        for argument in mutated_arguments(node)
        for root in storage.roots(argument)
        if root is not None
    }


# --------------------------------------------------------------------------------------- prologue
BINDS = "binds_rows"
"""Metadata key: the symbol for this node's number, or for its result's first size, known once the node has run."""


def most_of(node: fx.Node) -> sympy.Expr:
    """The most that a number bound by the prologue can be: the elements of the mask that selects rows; for pages of
    memory, all of them."""
    if node.target is ops.touched_pages:
        _, total, row_bytes, page = node.args
        rows = expr_of(argument_value(total))
        return sympy.ceiling(rows * row_bytes / page)
    mask = only_tensor(node.args[0])  # type: ignore[arg-type]
    return sympy.prod([expr_of(size) for size in mask.shape], start=sympy.Integer(1))


def prologue_nodes(graph: fx.Graph) -> list[fx.Node]:
    """What the nodes that bind a number of rows are computed from, and they themselves, in order."""
    wanted: set[fx.Node] = set()
    todo = [node for node in graph.nodes if BINDS in node.meta]
    while todo:
        node = todo.pop()
        if node.op == "call_function" and node not in wanted:
            wanted.add(node)
            todo += node.all_input_nodes
    return [node for node in graph.nodes if node in wanted]


# ------------------------------------------------------------------------------------- provenance
@dataclass(frozen=True)
class Provenance:
    """Where a node comes from: the module path (``model.layers.3.mlp``) and ``file:line``."""

    module: str = ""
    source: str = ""


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_PREFIX = re.compile(r"^L\['[^']*'\]\.?")


def provenance(node: fx.Node) -> Provenance:
    """Read the module path and the innermost source line that Dynamo recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, (tuple, list))]
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    source = ""
    if frames:
        path, line = frames[-1]
        source = f"{'/'.join(path.split('/')[-2:])}:{line}"
    return Provenance(module=_PREFIX.sub("", paths[-1]) if paths else "", source=source)


def graph_module(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule whose Python code is generated when somebody runs it or looks at it: most graphs are only read."""
    return _LazyGraphModule(root, graph)


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph (names and metadata kept) over the same attributes."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, mapping)
    old_output = module.graph.output_node()
    output = graph.output(result)
    output.meta = dict(old_output.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    copy = graph_module(module, graph)
    copy.meta = dict(module.meta)
    return copy


def remove_dead_code(graph: fx.Graph) -> None:
    """Erase nodes that nobody reads and that have no effect (random draws have one)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and not has_effect(node):
            graph.erase_node(node)


def fake_mode_of(module: fx.GraphModule) -> Any:
    """The FakeTensorMode under which the graph's metadata was made, or ``None``."""
    values = [v for node in module.graph.nodes for v in tensors_of(node) if v is not None]
    return torch._guards.detect_fake_mode(values)
