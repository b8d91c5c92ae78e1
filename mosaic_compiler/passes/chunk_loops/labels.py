"""Row labels: which dim of each value holds the rows, and which edges need only the same rows.

A *row space* is found at every matmul (the rows of its left operand) and spreads through the rules of
``book/rows.py``, backwards from a result to its operands and forwards by trying each dim of a result.  Then an
edge from a value to its reader is

- ``ROW``: row i of the result needs row i of the operand only;
- ``FULL``: the result needs all rows of an operand that has rows (keys and values, an op without a rule);
- ``OUTER``: the operand has no rows (weights, inputs, what no rule labels).

The *stage* of a value is the number of FULL edges behind it, as late as its readers allow: the values of one
stage can be computed chunk by chunk, those of the next one need all chunks of it.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import FLAT, Layout, Space, rows
from mosaic_compiler.book.rows import ChunkSpace

aten = rows.aten


class Edge(enum.Enum):
    ROW = "row"
    FULL = "full"
    OUTER = "outer"


@dataclass
class Labels:
    """Labels of one graph.

    Attributes:
        of: the layout of each labelled node's outputs (``None`` for an output that is no tensor).
        space: its row space.
        stage: the stage of every node.
        unruled: ops without a rule that read labelled values: they need all rows.
    """

    of: dict[fx.Node, tuple[Layout | None, ...]] = field(default_factory=dict)
    space: dict[fx.Node, Space] = field(default_factory=dict)
    stage: dict[fx.Node, int] = field(default_factory=dict)
    unruled: list[fx.Node] = field(default_factory=list)
    _edges: dict[fx.Node, list[tuple[fx.Node, Edge, Layout | None]]] = field(default_factory=dict)

    def layout(self, node: fx.Node) -> Layout:
        """The layout of a labelled node's first labelled output."""
        return next(layout for layout in self.of[node] if layout is not None)

    def edges(self, node: fx.Node) -> list[tuple[fx.Node, Edge, Layout | None]]:
        """Each tensor operand of a node with the kind of edge and the layout that the node needs of it
        (``None``: all of it).  The labels must be complete."""
        if node not in self._edges:
            self._edges[node] = self._find_edges(node)
        return self._edges[node]

    def _find_edges(self, node: fx.Node) -> list[tuple[fx.Node, Edge, Layout | None]]:
        if not reads_values(node):
            return [(operand, Edge.OUTER, None) for operand in node.all_input_nodes]
        if node.target is operator.getitem and node in self.of:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return [(source, Edge.ROW, self.of[node][0])]
        answer = needs(self, node) if node in self.of else None
        if answer is None:
            return [
                (operand, Edge.FULL if operand in self.of else Edge.OUTER, None) for operand in node.all_input_nodes
            ]
        found = []
        for operand, layout in answer:
            if operand not in self.of:
                kind = Edge.OUTER
            elif layout is not None and layout == self._own(operand) and self.space[operand] == self.space[node]:
                kind = Edge.ROW
            else:
                kind = Edge.FULL
            found.append((operand, kind, layout if layout is not None and rows.is_labelled(layout) else None))
        return found

    def _own(self, operand: fx.Node) -> Layout | None:
        layouts = self.of[operand]
        return layouts[0] if len(layouts) == 1 else None


def reads_values(node: fx.Node) -> bool:
    """It needs the values of its operands: a size can be had without."""
    return node.op == "output" or ir.has_tensors(node)


def needs(labels: Labels, node: fx.Node) -> list[tuple[fx.Node, Layout | None]] | None:
    """What a labelled node needs of its tensor operands, in the order in which they stand in its arguments."""
    layouts, space = labels.of[node], labels.space[node]
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return [(source, layouts[0])]
    index = next(i for i, layout in enumerate(layouts) if layout is not None)
    layout = layouts[index]
    assert layout is not None
    operands = rows.operand_layouts(node, index, layout, space)
    return None if operands is None else [(operand.node, operand.layout) for operand in operands]


def find_labels(graph: fx.Graph) -> Labels:
    """Label every node that has rows, and number the stages."""
    labeller = _Labeller(graph)
    labeller.spread()
    labels = labeller.labels
    _number_stages(graph, labels)
    labels.unruled = [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node not in labels.of
        and any(operand in labels.of for operand in node.all_input_nodes)
        and ir.has_tensors(node)
    ]
    return labels


class _Labeller:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.labels = Labels()
        self._never = set(ir.prologue_nodes(graph))

    def spread(self) -> None:
        todo: list[fx.Node] = []
        for node in self.graph.nodes:
            if book.is_matmul(node) and len(rows.shape_of(node)) == 2 and self._may_label(node):
                space = _space_of(node)
                if space is not None and self._set(node, 0, (FLAT if len(space) > 1 else 0, None), space):
                    todo.append(node)
        while todo:
            node = todo.pop()
            todo += self._backward(node)
            for user in node.users:
                todo += self._forward(user, node)

    def _may_label(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node not in self._never and not ir.has_effect(node)

    def _set(self, node: fx.Node, index: int, layout: Layout, space: Space) -> bool:
        """Label one output of a node, and with it those of its other outputs that have the same rows."""
        if node in self.labels.of or not self._may_label(node):
            return False
        if node.target is operator.getitem:
            if not self._may_take(node, layout, space):
                return False
        elif rows.operand_layouts(node, index, layout, space) is None:
            return False
        layouts: list[Layout | None] = [None] * len(ir.tensors_of(node))
        layouts[index] = layout
        if len(layouts) > 1:
            wanted = rows.operand_layouts(node, index, layout, space)
            for other in range(len(layouts)):
                if other != index:
                    layouts[other] = next(
                        (
                            c
                            for c in _candidates(node, other, space)
                            if rows.operand_layouts(node, other, c, space) == wanted
                        ),
                        None,
                    )
        self.labels.of[node], self.labels.space[node] = tuple(layouts), space
        return True

    def _may_take(self, getitem: fx.Node, layout: Layout, space: Space) -> bool:
        """A result of an op with several has rows if the op has."""
        source, index = getitem.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        if source in self.labels.of:
            return self.labels.space[source] == space and self.labels.of[source][index] == layout
        return self._may_label(source) and rows.operand_layouts(source, index, layout, space) is not None

    def _backward(self, node: fx.Node) -> Iterator[fx.Node]:
        space = self.labels.space[node]
        for operand, layout in needs(self.labels, node) or ():
            if layout is None or not rows.is_labelled(layout) or not self._has_rows(layout, space):
                continue
            index = node.args[1] if node.target is operator.getitem else 0
            if len(ir.tensors_of(operand)) > 1 and node.target is not operator.getitem:
                continue
            if self._set(operand, int(index), layout, space):  # type: ignore[arg-type]
                yield operand

    def _has_rows(self, layout: Layout, space: Space) -> bool:
        """The layout has the dim that is chunked (what only has batch entries is the same for all chunks)."""
        return FLAT in layout or len(space) - 1 in layout

    def _forward(self, user: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
        if user in self.labels.of or not self._may_label(user):
            return
        space = self.labels.space[source]
        if user.target is operator.getitem:
            layout = self.labels.of[source][int(user.args[1])]  # type: ignore[arg-type]
            if layout is not None and self._set(user, 0, layout, space):
                yield user
            return
        own = self.labels.of[source]
        if len(own) > 1:
            return
        for index in range(len(ir.tensors_of(user))):
            for layout in _candidates(user, index, space):
                answer = rows.operand_layouts(user, index, layout, space)
                if answer is None or not any(o.node is source and o.layout == own[0] for o in answer):
                    continue
                if self._set(user, index, layout, space):
                    yield user
                    return


def _candidates(node: fx.Node, index: int, space: Space) -> Iterator[Layout]:
    """Layouts that a result could have in a space, by its sizes."""
    tensor = ir.tensors_of(node)[index]
    if tensor is None:
        return
    sizes = [ir.expr_of(size) for size in tensor.shape]
    rank, last = len(sizes), len(space) - 1
    total = sympy.prod(space)
    for dim, size in enumerate(sizes):
        if len(space) > 1 and size == total:
            yield tuple(FLAT if d == dim else None for d in range(rank))
        if size == space[last]:
            if len(space) == 1:
                yield tuple(0 if d == dim else None for d in range(rank))
                continue
            for batch in range(rank):
                if batch != dim and sizes[batch] == space[0]:
                    yield tuple(0 if d == batch else 1 if d == dim else None for d in range(rank))
            yield tuple(1 if d == dim else None for d in range(rank))


def _space_of(matmul: fx.Node) -> Space | None:
    """The rows of a matmul's left operand; [B, N] where it is a view of [B, N, features]."""
    position = 1 if matmul.target is aten.addmm.default else 0
    left = matmul.args[position]
    assert isinstance(left, fx.Node)
    if not _depends_on_data(left):
        return None
    extent = ir.expr_of(rows.shape_of(left)[0])
    if extent in (0, 1):
        return None
    while isinstance(left, fx.Node) and left.target is aten.view.default:
        left = left.args[0]
        sizes = [ir.expr_of(size) for size in rows.shape_of(left)]
        if len(sizes) > 2 and 1 not in sizes[:2] and sympy.expand(sizes[0] * sizes[1] - extent) == 0:
            return ChunkSpace((sizes[0], sizes[1]))
    return ChunkSpace((extent,))


def _depends_on_data(node: fx.Node) -> bool:
    """Computed by the step or an input whose size varies; weights, also transposed ones, are rows of nothing."""
    while ir.is_view(node):
        base = ir.alias_base(node)
        assert base is not None
        node = base
    return node.op == "call_function" or bool(ir.free_symbols(node))


def _number_stages(graph: fx.Graph, labels: Labels) -> None:
    edges = {node: labels.edges(node) for node in graph.nodes}
    early: dict[fx.Node, int] = {}
    for node in graph.nodes:
        early[node] = max((early[o] + (kind is Edge.FULL) for o, kind, _ in edges[node]), default=0)
    late = labels.stage
    for node in reversed(list(graph.nodes)):
        bounds = []
        for user in node.users:
            if user.op != "output" and ir.has_tensors(user):
                kinds = [kind for operand, kind, _ in edges[user] if operand is node]
                bounds.append(late[user] - (Edge.FULL in kinds))
        late[node] = min(bounds, default=early[node])
    for node in graph.nodes:
        if node.target is operator.getitem and node in labels.of:
            late[node] = late[node.args[0]]  # an op with several results computes them all
        elif node in labels.of and node.target in (aten.select.int, aten.slice.Tensor):
            source = node.args[0]  # a part (queries out of a joint projection) is taken where the whole is at hand
            if source in labels.of and any(kind is Edge.ROW for _, kind, _ in edges[node]):
                late[node] = min(late[node], late[source])
