"""The cut: which values of a step have to be kept, so that another step need only compute some rows.

Where every row is computed from the same row of what is before it, some rows of a result need some rows only.  What
breaks that are values that are needed whole by an op *with* a row rule: keys and values of attention.  If those live
from step to step (with the rows that a step computes replaced), everything else runs on those rows::

    h [N, D] -> k = rotary(mm(h, wk)), v = mm(h, wv)     cut: k, v           state [N, ...] each
    attention(q, k, v) -> ... -> logits -> sampler       rows: all but k, v

``passes/chunk_loops/labels.py`` says which values have rows, and which edges need all of them.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import FLAT, Space, rows
from mosaic_compiler.passes.chunk_loops.labels import Edge, Labels, find_labels, reads_values
from mosaic_compiler.passes.row_demand.demands import passes_rows_on
from mosaic_compiler.passes.row_demand.moves import movement_base

aten = rows.aten


@dataclass(frozen=True)
class Cut:
    """What a graph has to keep.

    Attributes:
        labels: which values have rows.
        space: of the rows: (N,), or (E, N) for E batch entries.
        inside: values that are computed for some rows only, in graph order.
        dear: those that a matmul or an attention was needed for: the others can be computed for all rows as well.
        values: what is kept, in graph order; none where each row depends on itself only.
        kept_as: for each value that is needed whole and kept: the kept value that it is a rearrangement of.
        problem: why nothing can be kept; then there is nothing in the rest.
    """

    labels: Labels
    space: Space = ()
    inside: frozenset[fx.Node] = frozenset()
    dear: frozenset[fx.Node] = frozenset()
    values: tuple[fx.Node, ...] = ()
    kept_as: tuple[tuple[fx.Node, fx.Node], ...] = ()
    problem: str = ""


def find_cut(graph: fx.Graph) -> Cut:
    """The cut of a canonical graph without writes."""
    labels = find_labels(graph)
    space = _main_space(labels)
    if space is None:
        return Cut(labels, problem="no product of this graph has rows")
    inside, dear, problem = _split(graph, labels, space)
    if problem:
        return Cut(labels, problem=problem)
    kept_as: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for operand, kind, _ in labels.edges(node) if node in inside else ():
            if kind is Edge.FULL and operand in dear:
                kept_as.setdefault(operand, _fewest_bytes(operand, labels, dear))
    values = set(kept_as.values())
    for value in values:
        if not _has_rows(labels, value, space):
            return Cut(labels, problem=f"rows of {_named(value)} cannot be told from its batch entries")
    order = tuple(node for node in graph.nodes if node in values)
    return Cut(labels, space, frozenset(inside), frozenset(dear), order, tuple(kept_as.items()))


def layers_of(cut: Cut) -> list[tuple[int, fx.Node]]:
    """What reads kept values whole, in graph order, with the number of its layer: attentions are one each, and so are
    two products (with keys, then with values)."""
    operands = [operand for operand, _ in cut.kept_as]
    readers = dict.fromkeys(user for operand in operands for user in operand.users if user in cut.inside)
    found: list[tuple[int, fx.Node]] = []
    layer, is_open = -1, False
    for node in readers:
        is_second = is_open and book.is_matmul(node)
        layer += not is_second
        is_open = book.is_matmul(node) and not is_second
        found.append((layer, node))
    return found


def inputs_of(values: Sequence[fx.Node]) -> list[int]:
    """Positions of the inputs that some values are computed from."""
    found = ir.computed_from(values)
    placeholders = values[0].graph.find_nodes(op="placeholder") if values else []
    return [position for position, node in enumerate(placeholders) if node in found]


def leading_parts(graph: fx.Graph) -> dict[int, tuple[int, sympy.Expr]]:
    """Of inputs that are only read up to a size, along one dim: position, and (dim, size).

    Tables that a model makes and makes again longer (cosines of positions) are such: what is read of them is the same.
    """
    found: dict[int, tuple[int, sympy.Expr]] = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        parts = {_leading_part(user) for user in node.users}
        if len(parts) == 1 and (part := parts.pop()) is not None:
            found[position] = part
    return found


def _leading_part(node: fx.Node) -> tuple[int, sympy.Expr] | None:
    """The dim and the end of a slice from 0 on."""
    if node.target is not aten.slice.Tensor:
        return None
    dim, start, step = ((ir.argument(node, name) or 0) for name in ("dim", "start", "step"))
    size = rows.shape_of(node)[dim]
    return (rows.normal_dim(dim, len(rows.shape_of(node))), ir.expr_of(size)) if start == 0 and step in (0, 1) else None


def _main_space(labels: Labels) -> Space | None:
    """The rows of most products."""
    counts = Counter(labels.space[node] for node in labels.of if book.entry(node).is_heavy)
    return counts.most_common(1)[0][0] if counts else None


def _split(graph: fx.Graph, labels: Labels, space: Space) -> tuple[set[fx.Node], set[fx.Node], str]:
    """What is computed for some rows, what of it is dear, and what is in the way, if anything is.

    What reads all rows of dear values without being one (a sort over the sequence, the caller) stands behind all that
    is computed for some rows; nothing dear may follow it.  So does what chooses rows by a mask behind the last product:
    ``row-demand`` looks for that where all rows are.  Behind rows that are picked (the last ones, in front of a head)
    what needs the same rows only may follow.
    """
    leads_on = _in_front_of_products(graph)
    inside: set[fx.Node] = set()
    dear: set[fx.Node] = set()
    picked: set[fx.Node] = set()
    behind: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        late = next((behind[operand] for operand in node.all_input_nodes if operand in behind), None)
        has_rows = node in labels.of and labels.space[node] == space and not ir.has_unbacked(node)
        has_rows = has_rows and (node in leads_on or book.entry(node).choice is None)
        if late is None and has_rows and not picked.intersection(node.all_input_nodes):
            inside.add(node)
            if book.entry(node).is_heavy or any(operand in dear for operand in node.all_input_nodes):
                dear.add(node)
            continue
        reads = [o for o, kind, _ in labels.edges(node) if o in picked or (o in dear and kind is not Edge.OUTER)]
        if (late is None and not reads) or not reads_values(node):
            continue
        is_pick = movement_base(node) in dear | picked  # it takes whole rows of one of them
        if late is None and (is_pick or all(o in picked and _keeps_rows(node, o) for o in reads)):
            picked.add(node)
            continue
        behind[node] = late or node
        if book.entry(node).is_heavy:
            return inside, dear, f"{_named(behind[node])} needs all rows of what it reads, and {_named(node)} follows"
    return inside, dear, ""


def _keeps_rows(node: fx.Node, operand: fx.Node) -> bool:
    """Its rows are computed from the same rows of an operand, or it is a view of it."""
    return ir.is_view(node) or passes_rows_on(node, operand)


def _in_front_of_products(graph: fx.Graph) -> set[fx.Node]:
    """What matmuls and attentions are computed from, and they themselves."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if book.entry(node).is_heavy or node in found:
            found.update((node, *node.all_input_nodes))
    return found


def _has_rows(labels: Labels, value: fx.Node, space: Space) -> bool:
    """Each of its rows can be told, batch entries included."""
    layout = labels.layout(value)
    return FLAT in layout or set(range(len(space))) <= set(layout)


def _fewest_bytes(operand: fx.Node, labels: Labels, dear: set[fx.Node]) -> fx.Node:
    """Where to keep a value that is needed whole: of what it is a rearrangement of, the one with the fewest bytes
    (heads not yet repeated); of those with equally many the first that only views lead away from (not transposed)."""
    chain = [operand]
    while (source := _rearranged(chain[-1], labels)) is not None and source in dear:
        chain.append(source)
    sizes = [rows.row_bytes(node, labels.layout(node), unknown=1 << 20) for node in chain]
    best = sizes.index(min(sizes))
    while best + 1 < len(chain) and sizes[best + 1] == sizes[best] and ir.is_view(chain[best]):
        best += 1
    return chain[best]


def _rearranged(node: fx.Node, labels: Labels) -> fx.Node | None:
    """What a view or a copy has its elements from, if that has the same rows."""
    if node.target is operator.getitem or not (ir.is_view(node) or node.target is aten.clone.default):
        return None
    sources = [operand for operand, kind, _ in labels.edges(node) if kind is Edge.ROW]
    return sources[0] if len(sources) == 1 and ir.tensor_of(sources[0]) is not None else None


def _named(node: fx.Node) -> str:
    """A node as people find it."""
    origin = ir.provenance(node)
    where = ", ".join(filter(None, (origin.module, origin.source)))
    what = "the caller" if node.op == "output" else f"{node.name} ({node.target})"
    return f"{what} ({where})" if where else what
