"""Demands: which rows of each value are read, and by whom.  ``demand.py`` finds them.

A :class:`Demand` of a node is a set of *conditions* (each a conjunction of boolean masks; a row is needed if
any of them holds) and a list of *moves* (rows that a slice, an index or a shift of the value picks).
``ALL`` is no demand object but :data:`None`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import Layout, Space, rows
from mosaic_compiler.compat.symbols import hint_of
from mosaic_compiler.passes.row_demand.moves import moved_dims, movement_base


@dataclass(frozen=True)
class Literal:
    """``mask`` (or its negation) holds; its dims ``kept`` are the space's last ones, its others have size 1."""

    mask: fx.Node
    positive: bool
    kept: tuple[int, ...]


Condition: TypeAlias = "frozenset[Literal]"


@dataclass(frozen=True)
class Segment:
    """Rows of a space, in order: where its conditions hold (``move`` is None), or those of the operand of
    ``move`` that ``source``'s rows of its result need (``source`` None: all rows of the result)."""

    space: Space
    move: fx.Node | None = None
    source: Segment | None = None
    dims: int = 0
    """How many leading dims of the move's base are its row space."""


@dataclass
class Demand:
    """Rows of a node's value, in one layout."""

    layout: Layout
    space: Space
    conditions: set[Condition] = field(default_factory=set)
    moves: list[Segment] = field(default_factory=list)

    def on(self, layout: Layout) -> Demand:
        """The same rows of another value."""
        return Demand(layout, self.space, set(self.conditions), list(self.moves))

    def segments(self) -> list[Segment]:
        masked = [Segment(self.space)] if self.conditions else []
        return masked + self.moves


@dataclass
class Demands:
    """The result of the analysis.

    Attributes:
        of: per node its demand, ``None`` for all rows; nodes nobody reads are missing.
        compact: nodes that can be computed on their demanded rows, in schedule order.
        exits: nodes that are computed in full but read some operands at some rows only.
        conditions: per space, the union of all conditions that any exit put on it.
        blame: for each node the consumer that forced its demand.
        moved: slices and shifts whose demand was passed on: the value they take their rows from, and how
            many of its leading dims are rows.
    """

    graph: fx.Graph
    of: dict[fx.Node, Demand | None] = field(default_factory=dict)
    compact: list[fx.Node] = field(default_factory=list)
    exits: list[fx.Node] = field(default_factory=list)
    conditions: dict[Space, set[Condition]] = field(default_factory=dict)
    blame: dict[fx.Node, fx.Node] = field(default_factory=dict)
    moved: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)
    _moves: dict[Any, fx.Node] = field(default_factory=dict)

    def same_move(self, node: fx.Node, dims: int) -> fx.Node:
        """One move for all that take the same rows out of so many leading dims: rows are told by their numbers,
        whatever value they are of.  (Moves of several steps are told by their nodes.)"""
        base = movement_base(node)
        if moved_dims(node) is None or base is None:
            return node
        sizes = tuple(map(ir.expr_of, rows.shape_of(base)[:dims]))
        return self._moves.setdefault((node.target, str(node.args[1:]), str(node.kwargs), sizes), node)

    @property
    def heavy(self) -> list[fx.Node]:
        """Matmuls, attentions and mixtures that run on some rows only."""
        return [n for n in self.compact if book.is_matmul(n) or book.is_attention(n) or book.is_mixture(n)]

    def cause(self, node: fx.Node) -> fx.Node:
        """Who is to blame for all rows of a value: the first reader behind it that could not do with fewer, whoever
        reads itself; or the output."""
        while node in self.blame and self.of.get(node, node) is None:
            reader = self.blame[node]
            if not passes_rows_on(reader, node):
                return reader
            node = reader
        return node

    def reasons(self) -> Iterator[tuple[fx.Node, Any, Any, fx.Node]]:
        """(operation, rows computed, rows in all, who forced it) for rewritten operations; if there are
        none, for the matmul with the largest result."""
        for node in self.heavy:
            demand = self.of[node]
            assert demand is not None
            total = sympy.prod(demand.space)
            parts = [_segment_size(segment) for segment in demand.segments()]
            yield node, " + ".join(parts), total, self.blame[node]
        if self.heavy:
            return
        matmuls = [n for n in self.graph.nodes if book.is_matmul(n) and self.of.get(n, 0) is None]
        if matmuls:
            node = max(matmuls, key=_hinted_size)
            total = ir.expr_of(rows.shape_of(node)[0])
            yield node, total, total, self.cause(node)


def passes_rows_on(reader: fx.Node, operand: fx.Node) -> bool:
    """Some rows of the reader need only the same rows of the operand."""
    tensor = ir.tensor_of(reader)
    if reader.target is operator.getitem or movement_base(reader) is not None:
        return True
    if tensor is None or choices_of(reader) is not None:
        return False
    for dims in range(1, min(tensor.dim(), 2) + 1):
        layout, space = rows.leading_layout(tensor, dims)
        needed = rows.operand_layouts(reader, 0, layout, space) if space else None
        for item in needed or ():
            if item.node is operand and item.layout is not None and is_complete(item.layout, space):
                return True
    return False


def _segment_size(segment: Segment) -> str:
    return "M" if segment.move is None or segment.source is not None else f"rows of {segment.move.name}"


def _hinted_size(node: fx.Node) -> int:
    size = 1
    for extent in rows.shape_of(node):
        size *= extent if isinstance(extent, int) else hint_of(extent) or 1  # only the data knows some
    return size


def choices_of(node: fx.Node) -> tuple[fx.Node, tuple[tuple[int, bool], ...]] | None:
    """Of an op that takes elements from one operand or another: the mask, and the positions of the operands with what
    the mask is where their elements are taken."""
    choice = book.entry(node).choice
    return None if choice is None else (node.args[choice[0]], choice[1])  # type: ignore[return-value]


def is_complete(layout: Layout, space: Space) -> bool:
    """The layout says for each of its rows which one it is (not only its batch entry, or its position)."""
    labels = {label for label in layout if label is not None}
    return labels == {book.FLAT} or len(labels) == len(space)
