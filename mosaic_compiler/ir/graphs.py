"""Graphs as a whole: the prologue, where nodes come from, copies."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler.compat.symbols import free_unbacked_symbols
from mosaic_compiler.compat.tracing import fake_mode_among, lazy_graph_module
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.loops import loop_of
from mosaic_compiler.ir.operators import has_effect
from mosaic_compiler.ir.values import (
    argument_value,
    expr_of,
    is_symbolic_number,
    numbers_in,
    only_tensor,
    tensors_of,
    value_of,
)

BINDS = "binds_rows"
"""Metadata key: the symbol for this node's number, or for its result's first size, known once the node has run."""


MAY_REPEAT = "may_repeat"
"""Metadata key, on a node with :data:`BINDS`: rows that it numbers may be numbered more than once, because all that is
computed for them goes back to where they stand.  A step may then compute more rows than it needs."""


COMPUTED_ROWS = "computed_rows"
"""Metadata key, on the input with the numbers of the rows that a step computes."""

STATE_MEMORY = "state_memory"
"""Metadata key, on an input that lives from step to step."""


def numbers_of_rows(graph: fx.Graph) -> set[sympy.Symbol]:
    """Symbols for numbers of computed rows, which are others in other steps: those that the prologue binds; in a step
    for some rows all sizes of inputs that are no sizes of state."""
    found = {node.meta[BINDS] for node in graph.nodes if BINDS in node.meta}
    inputs = graph.find_nodes(op="placeholder")
    if any(COMPUTED_ROWS in node.meta for node in inputs):
        lasting = {symbol for node in inputs if STATE_MEMORY in node.meta for symbol in _sizes_in(node)}
        found |= {symbol for node in inputs for symbol in _sizes_in(node)} - lasting
    return found


def _sizes_in(node: fx.Node) -> set[sympy.Symbol]:
    """Symbols in a tensor's sizes."""
    return {
        s for tensor in tensors_of(node) if tensor is not None for n in tensor.shape for s in expr_of(n).free_symbols
    }


def most_of(node: fx.Node) -> sympy.Expr:
    """The most that a number bound by the prologue can be: the elements of the mask that selects rows; for pages of
    memory, all of them."""
    if node.target is ops.touched_pages:
        _, total, row_bytes, page = node.args
        rows = expr_of(argument_value(total))
        return sympy.ceiling(rows * row_bytes / page)
    mask = only_tensor(node.args[0])  # type: ignore[arg-type]
    return sympy.prod([expr_of(size) for size in mask.shape], start=sympy.Integer(1))


def computed_from(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What some nodes are computed from, inputs included, and they themselves."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def prologue_nodes(graph: fx.Graph) -> list[fx.Node]:
    """What the nodes that bind a number of rows are computed from, and they themselves, in order."""
    wanted = computed_from(node for node in graph.nodes if BINDS in node.meta)
    return [node for node in graph.nodes if node in wanted and node.op == "call_function"]


def has_unbacked(node: fx.Node) -> bool:
    """Some size of what the node produces is known only after data has been looked at (``nonzero``, ``item``).

    Sizes of inputs are known, also where Dynamo has no example of them (``mark_unbacked``).
    """
    numbers = [number for number in numbers_in(value_of(node)) if is_symbolic_number(number)]
    unknown = {symbol for number in numbers for symbol in free_unbacked_symbols(number)}
    return bool(unknown) and not unknown <= _sizes_of_inputs(node.graph)


_input_sizes: weakref.WeakKeyDictionary[fx.Graph, frozenset[sympy.Symbol]] = weakref.WeakKeyDictionary()


def _sizes_of_inputs(graph: fx.Graph) -> frozenset[sympy.Symbol]:
    """Symbols that are a size or value of an input of the graph."""
    if graph not in _input_sizes:
        numbers = [n for node in graph.find_nodes(op="placeholder") for n in numbers_in(value_of(node))]
        sizes = map(expr_of, filter(is_symbolic_number, numbers))
        _input_sizes[graph] = frozenset(size for size in sizes if isinstance(size, sympy.Symbol))
    return _input_sizes[graph]


def rows_of_loop(node: fx.Node) -> sympy.Expr:
    """How many rows a call of a loop goes over."""
    loop = loop_of(node)
    assert loop is not None
    position = loop.sliced()[0]
    operand, dim = node.args[position], loop.operands[position]
    assert isinstance(operand, fx.Node)
    assert dim is not None
    return expr_of(only_tensor(operand).shape[dim])


@dataclass(frozen=True)
class Provenance:
    """Where a node comes from: the module path (``model.layers.3.mlp``) and ``file:line``."""

    module: str = ""
    source: str = ""


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_PREFIX = re.compile(
    r"^(?:(?:L\['[^']*'\]|G\['__import_[^']*'\])(?:\[\d+\]|\.__closure__\[\d+\]\.cell_contents)*\.?|G\['([^']*)'\])"
)
"""What Dynamo calls an argument (of several, of a closure), the module of Python that a global is in, and a global."""


def provenance(node: fx.Node) -> Provenance:
    """Read the module path and the innermost source line that Dynamo recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, (tuple, list))]
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    source = ""
    if frames:
        path, line = frames[-1]
        source = f"{'/'.join(path.split('/')[-2:])}:{line}"
    module = _PREFIX.sub(lambda found: found[1] or "", paths[-1]) if paths else ""
    return Provenance(module, source)


def graph_module(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule whose Python code is generated when somebody runs it or looks at it: most graphs are only read."""
    return lazy_graph_module(root, graph)


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


def is_returned(node: fx.Node) -> bool:
    """The graph returns it."""
    return any(user.op == "output" for user in node.users)


def remove_dead_code(graph: fx.Graph) -> None:
    """Erase nodes that nobody reads and that have no effect (random draws have one)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and not has_effect(node):
            graph.erase_node(node)


def fake_mode_of(module: fx.GraphModule) -> Any:
    """The FakeTensorMode under which the graph's metadata was made, or ``None``."""
    values = [v for node in module.graph.nodes for v in tensors_of(node) if v is not None]
    return fake_mode_among(values)


def main_device_of(module: fx.GraphModule) -> torch.device:
    """The device that holds most tensors of the graph (a lone CPU scalar does not count)."""
    counts: dict[torch.device, int] = {}
    for node in module.graph.nodes:
        for tensor in tensors_of(node):
            if tensor is not None and tensor.dim() > 0:
                counts[tensor.device] = counts.get(tensor.device, 0) + 1
    return max(counts, key=lambda d: counts[d]) if counts else torch.device("cpu")
