"""What every pass must preserve of a graph: its outputs, its effects, and how fast its values grow."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.compat.tracing import tree_flatten
from mosaic_compiler.ir.loops import loop_of


@dataclass(frozen=True)
class Facts:
    """What a pass must preserve about a graph."""

    outputs: tuple[Any, ...]
    effects: tuple[Any, ...]
    degree: int


def facts_of(graph: fx.Graph, storage: ir.StorageMap, unbacked: Iterable[sympy.Symbol]) -> Facts:
    """Read off the graph what every pass must preserve.

    Args:
        unbacked: symbols in its values that only the data knows.  A pass may bind another one to the same number, so
            all of them count as one.
    """
    output = graph.output_node()
    bound = {node.meta[ir.BINDS] for node in graph.nodes if ir.BINDS in node.meta}
    data = dict.fromkeys(bound.union(unbacked), sympy.Symbol("data"))
    flat, _ = tree_flatten(output.args[0])
    outputs = tuple(_output_fact(item, storage, data) for item in flat)
    constant = _bounded_symbols(graph)
    degree = max((_degree(node, constant) for node in graph.nodes), default=0)
    return Facts(outputs=outputs, effects=tuple(_effects(graph, storage)), degree=degree)


def _bounded_symbols(graph: fx.Graph) -> dict[sympy.Symbol, sympy.Expr]:
    """Numbers of rows that a mask of constant size selects, with that size: they do not grow with the inputs."""
    bounds = {node.meta[ir.BINDS]: ir.most_of(node) for node in graph.nodes if ir.BINDS in node.meta}
    return {symbol: most for symbol, most in bounds.items() if not most.free_symbols}


def _output_fact(item: Any, storage: ir.StorageMap, data: dict[sympy.Symbol, sympy.Symbol]) -> Any:
    if not isinstance(item, fx.Node):
        return repr(item)
    root = storage.root(item)
    alias = root[0].target if root is not None and root[0].op in ("placeholder", "get_attr") else None
    layout = ir.layout_of(ir.value_of(item))
    if not isinstance(layout, tuple) or len(layout) != 5:
        return layout, alias
    sizes, strides = (tuple(n.xreplace(data) if n is not None else None for n in part) for part in layout[2:4])
    return layout[0], layout[1], sizes, strides, alias


def _effects(graph: fx.Graph, storage: ir.StorageMap) -> Iterator[Any]:
    """Random draws by op and layout, and writes to inputs.  Numbers that data decides have one name: ``row-demand``
    gives them symbols of its own."""
    bound = {node.meta[ir.BINDS] for node in graph.nodes if ir.BINDS in node.meta}
    unbacked = sympy.Symbol("data")
    for node in graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        if ir.is_random(node):
            tensors = [tensor for tensor in ir.tensors_of(node) if tensor is not None]
            numbers = [ir.expr_of(n) for tensor in tensors for n in (*tensor.shape, *tensor.stride())]
            named = {s: unbacked for n in numbers for s in n.free_symbols if s in bound or str(s).startswith("u")}
            yield (str(node.target), *(tensor.dtype for tensor in tensors), *(n.xreplace(named) for n in numbers))
        for argument in ir.mutated_arguments(node):
            for root in storage.roots(argument):
                if root is not None and not ir.is_computed(root):
                    yield ("write", root[0].target)


def _degree(node: fx.Node, constant: dict[sympy.Symbol, sympy.Expr]) -> int:
    """Largest total degree, in the graph's symbols, of an output's number of elements."""
    loop = loop_of(node)
    worst = 0
    if loop is not None:
        rows = {loop.chunk: ir.rows_of_loop(node).xreplace(constant), **constant}
        worst = max(_degree_in(inner, rows) for inner in loop.body.graph.nodes)
    return max(worst, _degree_in(node, constant))


def _degree_in(node: fx.Node, known: dict[sympy.Symbol, sympy.Expr]) -> int:
    return max(
        (
            _degree_of_product(
                tuple(ir.expr_of(size).xreplace(known) for size in tensor.shape if type(size) is not int)
            )
            for tensor in ir.tensors_of(node)
            if tensor is not None
        ),
        default=0,
    )


@functools.lru_cache(maxsize=1 << 16)
def _degree_of_product(sizes: tuple[sympy.Expr, ...]) -> int:
    return _degree_of(sympy.expand(sympy.prod(sizes)))


def _degree_of(expr: sympy.Expr) -> int:
    if not expr.free_symbols:
        return 0
    if expr.is_polynomial(*expr.free_symbols):
        return int(sympy.Poly(expr, *expr.free_symbols).total_degree())
    return max((_degree_of(arg) for arg in expr.args), default=1)


def fastest_growing(graph: fx.Graph) -> str:
    """The name of the node whose degree is the graph's."""
    constant = _bounded_symbols(graph)
    return str(max(graph.nodes, key=lambda node: _degree(node, constant)).name)
