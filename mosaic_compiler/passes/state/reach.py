"""The proof: which rows of kept values depend on which rows of the inputs, read off the graph."""

from __future__ import annotations

import sympy
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book import FLAT, Layout
from mosaic_compiler.ir import ops
from mosaic_compiler.passes.chunk_loops.labels import Edge, reads_values
from mosaic_compiler.passes.state.cut import Cut
from mosaic_compiler.passes.visible_keys.arithmetic import elements_of
from mosaic_compiler.passes.visible_keys.formulas import OpaqueError
from mosaic_compiler.passes.visible_keys.intervals import bounds_for
from mosaic_compiler.planning.reach import QUERY, Reach, Run


def find_reach(graph: fx.Graph, cut: Cut, static: tuple[int, ...]) -> Reach | None:
    """What the rows of a cut's inside depend on; ``None`` where some depend on all others, for all that is known.

    Args:
        static: positions of inputs that are weights.
    """
    placeholders = graph.find_nodes(op="placeholder")
    varying = {node for at, node in enumerate(placeholders) if at not in static and ir.tensor_of(node) is not None}
    feeds = ir.computed_from(cut.values) | set(cut.values)
    depth: dict[fx.Node, int] = {}
    levels: list[dict[Run, None]] = []
    rows: set[fx.Node] = set()
    whole: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in cut.inside:
            continue
        depth[node] = max((depth[operand] for operand in node.all_input_nodes if operand in depth), default=0)
        seen: Run | None = None
        for operand, kind, layout in cut.labels.edges(node):
            if kind is Edge.ROW and operand in cut.inside:
                continue
            if operand in cut.dear:
                seen = seen or _seen(node, operand)
                if seen is None:
                    return None
            elif node in feeds and operand in varying and _has_rows_of(operand, layout, cut):
                rows.add(operand)
            elif node in feeds:
                whole |= _read_from(operand, varying)
        if seen is not None:
            depth[node] += 1
            levels += [{} for _ in range(depth[node] - len(levels))]
            levels[depth[node] - 1][seen] = None
    if not levels or all(run == (None, None) for level in levels for run in level):
        return None
    position = {node: at for at, node in enumerate(placeholders)}
    numbers = (tuple(sorted(position[node] for node in nodes)) for nodes in (rows - whole, whole))
    return Reach(tuple(tuple(level) for level in levels), *numbers)


def _seen(node: fx.Node, operand: fx.Node) -> Run | None:
    """The keys that queries of an attention see; ``None`` for what is none that is told so."""
    if node.target is not ops.interval_attention or operand not in node.args[1:3]:
        return None
    query, key = (ir.only_tensor(given) for given in node.args[:2])  # type: ignore[arg-type]
    entries, _, queries, _ = map(ir.expr_of, query.shape)
    elements = elements_of(bounds_for(queries, ir.expr_of(key.shape[2]), entries))
    found: list[sympy.Expr | None] = []
    for bound in node.args[3:5]:
        if bound is None:
            found.append(None)
            continue
        assert isinstance(bound, fx.Node)
        sizes = ir.only_tensor(bound).shape
        index = tuple(sympy.Integer(0) if d != 2 or ir.expr_of(size) == 1 else QUERY for d, size in enumerate(sizes))
        try:
            cases = elements.number(bound, index)
        except OpaqueError:
            return None
        if len(cases) != 1 or ir.expr_of(sizes[0]) != 1:
            return None
        found.append(cases[0][1])
    return found[0], found[1]


def _has_rows_of(placeholder: fx.Node, layout: Layout | None, cut: Cut) -> bool:
    """An input with one place for each row: [N], or [entries, N]."""
    expected = (0,) if len(cut.space) == 1 else (0, 1)
    sizes = [ir.expr_of(size) for size in ir.only_tensor(placeholder).shape]
    if layout is None:
        return False
    if len(cut.space) == 1:  # [1, N] is the same
        return sizes in ([cut.space[0]], [1, cut.space[0]]) and 0 in layout and FLAT not in layout
    return layout == expected and sizes == list(cut.space)


def _read_from(operand: fx.Node, varying: set[fx.Node]) -> set[fx.Node]:
    """The inputs whose values a value is computed from."""
    found: set[fx.Node] = set()
    seen = {operand}
    todo = [operand]
    while todo:
        node = todo.pop()
        if node in varying:
            found.add(node)
        elif reads_values(node):
            fresh = set(node.all_input_nodes) - seen
            seen |= fresh
            todo += fresh
    return found
