"""The invariants of the IR, in one place, checked after every pass, always.

========== ==================================================================================
topology   every operand is defined before its use; the graph lints
metadata   dtype, sizes, strides and device of every node agree with a fake-tensor re-run
signature  the outputs are those of the graph before: count, layout, and which inputs they alias
effects    random draws and writes to inputs are the same, in the same order
in-place   a write into a buffer of the step is legal (see ``passes/in_place.py``)
quadratic  no value grows faster with the inputs' sizes than some value did before (no new N x N)
========== ==================================================================================
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.errors import InvariantError

INVARIANTS = ("topology", "metadata", "signature", "effects", "in-place", "quadratic")


@dataclass(frozen=True)
class Facts:
    """What a pass must preserve about a graph."""

    outputs: tuple[Any, ...]
    effects: tuple[Any, ...]
    degree: int


class Verifier:
    """Checks one compilation's graphs; remembers fake-tensor results of equal operations.

    Example:
        >>> verifier = Verifier(module)
        >>> verifier.check(SomePass()(module), "some-pass")
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._reference = facts_of(module)
        self._known: dict[Any, Any] = {}

    def check(self, module: fx.GraphModule, pass_name: str) -> None:
        """Raise :class:`InvariantError` naming the pass and the invariant it broke."""

        def fail(invariant: str, detail: str) -> None:
            raise InvariantError(pass_name, invariant, detail)

        for problem in _topology(module.graph):
            fail("topology", problem)
        for problem in self._metadata(module):
            fail("metadata", problem)
        facts = facts_of(module)
        if facts.outputs != self._reference.outputs:
            fail("signature", f"outputs were {self._reference.outputs}, now {facts.outputs}")
        if facts.effects != self._reference.effects:
            fail("effects", f"effects were {self._reference.effects}, now {facts.effects}")
        for problem in _illegal_writes(module.graph):
            fail("in-place", problem)
        if facts.degree > self._reference.degree:
            fail(
                "quadratic",
                f"{_largest(module.graph)} grows with degree {facts.degree}, before {self._reference.degree}",
            )

    # ----------------------------------------------------------------------------------- metadata
    def _metadata(self, module: fx.GraphModule) -> Iterator[str]:
        mode = ir.fake_mode_of(module)
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            if "val" not in node.meta:
                if not (isinstance(node.target, OpOverload) and not node.target._schema.returns):
                    yield f"{node.name} has no metadata"
                continue
            if mode is None or not isinstance(node.target, OpOverload):
                if node.target is operator.getitem:
                    source, index = node.args
                    expected = ir.value_of(source)[index]
                    if _layout(expected) != _layout(ir.value_of(node)):
                        yield f"{node.name} is {_layout(ir.value_of(node))}, a fake run gives {_layout(expected)}"
                continue
            got = self._fake_run(mode, node)
            if got is not None and got != _layout(ir.value_of(node)):
                yield f"{node.name} is {_layout(ir.value_of(node))}, a fake run gives {got}"

    def _fake_run(self, mode: Any, node: fx.Node) -> Any:
        from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

        if any(free_unbacked_symbols(n) for n in ir.numbers_in(ir.value_of(node)) if ir.is_symbolic_number(n)):
            return None  # a re-run would invent new symbols for the same data-dependent sizes
        if ir.BINDS in node.meta:
            return None
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), ir.value_of)
        key = (node.target, _signature_of(args), _signature_of(kwargs))
        if key not in self._known:
            with mode:
                self._known[key] = _layout(node.target(*args, **kwargs))  # type: ignore[operator]
        return self._known[key]


def _signature_of(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _signature_of(value[name])) for name in sorted(value))
    if isinstance(value, (tuple, list)):
        return tuple(_signature_of(item) for item in value)
    if isinstance(value, torch.Tensor) or ir.is_symbolic_number(value):
        return _layout(value)
    return (type(value).__name__, repr(value))


def _layout(value: Any) -> Any:
    """Comparable description of what a node produces; strides of sizes 0 and 1 do not count."""
    if isinstance(value, (tuple, list)):
        return tuple(_layout(item) for item in value)
    if isinstance(value, torch.Tensor):
        sizes = tuple(ir.expr_of(size) for size in value.shape)
        strides = tuple(
            None if size in (0, 1) else ir.expr_of(stride) for size, stride in zip(sizes, value.stride(), strict=True)
        )
        return (str(value.dtype), str(value.device), sizes, strides, ir.expr_of(value.storage_offset()))
    if ir.is_symbolic_number(value) or isinstance(value, (int, float)):
        return ir.expr_of(value)
    return repr(value)


# --------------------------------------------------------------------------------------- topology
def _topology(graph: fx.Graph) -> Iterator[str]:
    defined: set[fx.Node] = set()
    outputs = 0
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if operand not in defined:
                yield f"{node.name} uses {operand.name}, which is not defined before it"
                return
        defined.add(node)
        outputs += node.op == "output"
    if outputs != 1:
        yield f"the graph has {outputs} output nodes"
        return
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        yield str(error)


# --------------------------------------------------------------------------- signature and effects
def facts_of(module: fx.GraphModule) -> Facts:
    """Read off the graph what every pass must preserve."""
    graph = module.graph
    storage = ir.StorageMap(graph)
    output = graph.output_node()
    data = _data_symbols(graph)
    flat, _ = torch.utils._pytree.tree_flatten(output.args[0])
    outputs = tuple(_output_fact(item, storage, data) for item in flat)
    return Facts(
        outputs=outputs, effects=tuple(_effects(graph, storage)), degree=max(map(_degree, graph.nodes), default=0)
    )


def _data_symbols(graph: fx.Graph) -> dict[sympy.Symbol, sympy.Symbol]:
    """Symbols whose value only the data knows.  A pass may bind another one to the same number, so all of
    them count as one."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    found: set[sympy.Symbol] = {node.meta[ir.BINDS] for node in graph.nodes if ir.BINDS in node.meta}
    for node in graph.nodes:
        for number in ir.numbers_in(ir.value_of(node)):
            if ir.is_symbolic_number(number):
                found |= free_unbacked_symbols(number)
    return dict.fromkeys(found, sympy.Symbol("data"))


def _output_fact(item: Any, storage: ir.StorageMap, data: dict[sympy.Symbol, sympy.Symbol]) -> Any:
    if not isinstance(item, fx.Node):
        return repr(item)
    root = storage.root(item)
    alias = root[0].target if root is not None and root[0].op in ("placeholder", "get_attr") else None
    layout = _layout(ir.value_of(item))
    if not isinstance(layout, tuple) or len(layout) != 5:
        return layout, alias
    sizes, strides = (tuple(n.xreplace(data) if n is not None else None for n in part) for part in layout[2:4])
    return layout[0], layout[1], sizes, strides, alias


def _effects(graph: fx.Graph, storage: ir.StorageMap) -> Iterator[Any]:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if ir.is_random(node):
            yield (str(node.target), _layout(ir.value_of(node)))
        for argument in ir.mutated_arguments(node):
            for root in storage.roots(argument):
                if root is not None and root[0].op != "call_function":
                    yield ("write", root[0].target)


def _degree(node: fx.Node) -> int:
    """Largest total degree, in the graph's symbols, of an output's number of elements."""
    worst = 0
    for tensor in ir.tensors_of(node):
        if tensor is None:
            continue
        elements = sympy.expand(sympy.prod([ir.expr_of(size) for size in tensor.shape]))
        worst = max(worst, _degree_of(elements))
    return worst


def _degree_of(expr: sympy.Expr) -> int:
    if not expr.free_symbols:
        return 0
    if expr.is_polynomial(*expr.free_symbols):
        return int(sympy.Poly(expr, *expr.free_symbols).total_degree())
    return max((_degree_of(arg) for arg in expr.args), default=1)


def _largest(graph: fx.Graph) -> str:
    return str(max(graph.nodes, key=_degree).name)


# --------------------------------------------------------------------------------------- in-place
def _illegal_writes(graph: fx.Graph) -> Iterator[str]:
    """Writes into storage of the step that somebody could notice.  Judged from the graph alone."""
    storage = ir.StorageMap(graph)
    escaping_values = graph.output_node().all_input_nodes
    order = {node: index for index, node in enumerate(graph.nodes)}
    readers: dict[ir.Root, list[fx.Node]] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            for root in storage.roots(operand):
                if root is not None:
                    readers.setdefault(root, []).append(node)
    after: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        for argument in ir.mutated_arguments(node) if node.op == "call_function" else ():
            root = storage.root(argument)
            if root is None or root[0].op != "call_function":
                continue
            successors = after.setdefault(node, _derived_from(node))
            for reader in readers.get(root, []):
                late = order[reader] > order[node] or reader.op == "output"
                through = any(
                    operand not in successors and storage.root(operand) == root for operand in reader.all_input_nodes
                )
                if late and through:
                    yield f"{node.name} overwrites {root[0].name}, which {reader.name} reads later"
            if any(value not in successors and storage.root(value) == root for value in escaping_values):
                yield f"{node.name} overwrites {root[0].name}, which is returned"
            yield from _overlapping_operands(node, argument, storage)


def _derived_from(node: fx.Node) -> set[fx.Node]:
    """The node and everything that is a view of, or a later write to, its result."""
    found = {node}
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if user not in found and (ir.alias_base(user) in found):
                found.add(user)
                todo.append(user)
    return found


def _overlapping_operands(node: fx.Node, written: fx.Node, storage: ir.StorageMap) -> Iterator[str]:
    if not (isinstance(node.target, OpOverload) and any(a.is_out for a in node.target._schema.arguments)):
        return  # ops that mutate by themselves (copy_, index_put_) define their own overlap rules
    pointwise = ir.is_pointwise(node)
    target, out = ir.tensor_of(written), ir.tensor_of(node)
    if target is None or out is None or not ir.same_layout(target, out):
        yield f"{node.name} writes {written.name}, whose layout is not that of the result"
    for operand in node.all_input_nodes:
        if storage.root(operand) != storage.root(written):
            continue
        if operand is not written:
            yield f"{node.name} reads {operand.name} while it overwrites {written.name} in the same storage"
        elif not pointwise:
            reads = sum(1 for argument in node.args if argument is operand)
            if reads:
                yield f"{node.name} is not pointwise and reads {written.name} while it overwrites it"
