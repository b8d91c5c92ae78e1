"""Which values become loop results, and which loop computes each of them.

A value inside of a loop has rows (``labels.py``).  It has to exist at full length (is *materialised*) if

- somebody needs all of its rows: keys and values, an op without a rule, the caller; or
- a later loop needs its rows, and cannot compute them again cheaply from what is materialised anyway.

Everything else lives for one chunk.  Cheap means pointwise, norms, rotary embeddings, masks, views and
lookups; a matmul or an attention is never computed twice.  Views of materialised values and cheap values of a few
bytes per row that are needed in full are computed outside of all loops.

Values of one stage and space share a loop, with one exception, which is what keeps a transformer's memory at x +
K + V: where a materialised value (the new residual x') is all that the rest of the stage needs (the next layer's K
and V), the rest gets a loop of its own.  In one loop, this layer's and the next layer's K and V would be alive
at once::

    stage 1     B: norm -> q -> attention(q, K, V) -> o_proj -> + x -> norm -> MLP -> + -> x'
                A: norm(x') -> K', V'
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import Space, rows
from mosaic_compiler.passes.chunk_loops.labels import Edge, Labels

_NARROW = 64
"""Bytes per row up to which a cheap value may exist at full length outside of a loop (numbers per row)."""


def _row_bytes(node: fx.Node, labels: Labels) -> int:
    return rows.row_bytes(node, labels.layout(node), unknown=1 << 20)


def _is_part(view: fx.Node, base: fx.Node, labels: Labels) -> bool:
    return _row_bytes(view, labels) < _row_bytes(base, labels)


@dataclass
class Region:
    """One loop to be: its results, in graph order, and the stage and row space that they share."""

    stage: int
    space: Space
    outputs: list[fx.Node]


@dataclass
class Regions:
    """The loops of one graph.

    Attributes:
        loops: in an order in which they can run.
        of: the loop of each materialised value.
        inside: all nodes that a loop may compute.
        cheap: those that can be computed again from materialised values.
        outside: cheap values that are needed in full.
    """

    loops: list[Region] = field(default_factory=list)
    of: dict[fx.Node, Region] = field(default_factory=dict)
    inside: set[fx.Node] = field(default_factory=set)
    cheap: set[fx.Node] = field(default_factory=set)
    outside: set[fx.Node] = field(default_factory=set)


def find_regions(graph: fx.Graph, labels: Labels) -> Regions:
    """Decide what is materialised, and split the stages into loops."""
    finder = _Finder(graph, labels)
    finder.materialise()
    finder.split()
    return finder.regions


class _Finder:
    def __init__(self, graph: fx.Graph, labels: Labels) -> None:
        self.labels = labels
        self.regions = Regions()
        groups: dict[tuple[int, Space], list[fx.Node]] = {}
        for node in graph.nodes:
            if node in labels.of:
                groups.setdefault((labels.stage[node], labels.space[node]), []).append(node)
        # what has sizes that are not known when a step starts cannot be planned, in chunks or not
        self.groups = {
            key: nodes
            for key, nodes in groups.items()
            if any(book.entry(n).is_heavy for n in nodes) and not any(map(ir.has_unbacked, nodes))
        }
        self.order = [node for node in graph.nodes if node in labels.of]
        self.inside = self.regions.inside
        for nodes in self.groups.values():
            self.inside.update(nodes)
        self.row_operands = {
            node: [operand for operand, kind, _ in labels.edges(node) if kind is Edge.ROW] for node in self.order
        }
        self.materialised: set[fx.Node] = set()

    # ----------------------------------------------------------------------------- materialisation
    def materialise(self) -> None:
        changed = True
        while changed:
            changed = False
            self.regions.cheap.clear()
            self.regions.outside.clear()
            for node in self.order:
                if node not in self.inside or node in self.materialised:
                    continue
                if self._is_cheap(node):
                    self.regions.cheap.add(node)
                    if self._needed_in_full(node):
                        if ir.is_view(node) or _row_bytes(node, self.labels) <= _NARROW:
                            self.regions.outside.add(node)
                        else:
                            self.materialised.add(node)
                            changed = True
                elif self._needed_in_full(node) or self._needed_later(node):
                    self.materialised.add(self._base(node))
                    changed = True

    def _is_cheap(self, node: fx.Node) -> bool:
        known = book.entry(node)
        if known.is_dear or known.is_heavy:
            return False
        return all(
            operand not in self.inside or operand in self.materialised or operand in self.regions.cheap
            for operand in self.row_operands[node]
        )

    def _needed_in_full(self, node: fx.Node) -> bool:
        for user in node.users:
            if user not in self.inside:
                if not isinstance(ir.value_of(user), torch.SymInt):  # whoever only asks for a size needs no value
                    return True
            elif any(o is node and kind is not Edge.ROW for o, kind, _ in self.labels.edges(user)):
                return True
        return False

    def _needed_later(self, node: fx.Node) -> bool:
        return any(user in self.inside and self._group(user) != self._group(node) for user in node.users)

    def _group(self, node: fx.Node) -> tuple[int, Space]:
        return self.labels.stage[node], self.labels.space[node]

    def _base(self, node: fx.Node) -> fx.Node:
        """What a view looks into, as far as it is computed in a loop: the view itself costs nothing outside.  A view of
        a part (keys out of a joint projection of queries, keys and values) stays what is materialised, as a copy."""
        while ir.is_view(node):
            base = ir.alias_base(node)
            if base is None or base not in self.row_operands[node] or _is_part(node, base, self.labels):
                return node
            node = base
        return node

    # ------------------------------------------------------------------------------------ splitting
    def split(self) -> None:
        for (stage, space), nodes in sorted(self.groups.items(), key=lambda item: item[0][0]):
            results = [node for node in nodes if node in self.materialised]
            first = self._read_by_others(nodes)
            second = [node for node in results if node not in first]
            if first and second and self._independent(second, first):
                parts = [[node for node in results if node in first], second]
            else:
                parts = [results]
            for outputs in parts:
                if outputs:
                    region = Region(stage, space, outputs)
                    self.regions.loops.append(region)
                    self.regions.of.update(dict.fromkeys(outputs, region))

    def _read_by_others(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """Materialised values from which another one of the same stage is computed."""
        members, found = set(nodes), set()
        above: dict[fx.Node, set[fx.Node]] = {}
        for node in nodes:
            mine: set[fx.Node] = set()
            for operand in self.row_operands[node]:
                if operand in members:
                    mine |= above[operand]
            if node in self.materialised:
                found |= mine
                mine = mine | {node}
            above[node] = mine
        return found

    def _independent(self, second: list[fx.Node], first: set[fx.Node]) -> bool:
        """Whether ``second`` can be computed from ``first`` and what is materialised anyway, with nothing dear
        computed twice."""
        shared: set[fx.Node] = set()
        todo = list(first)
        while todo:
            node = todo.pop()
            if node not in shared:
                shared.add(node)
                todo += [o for o in self.row_operands[node] if self._group_or_none(o) == self._group(node)]
        todo = list(second)
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in seen or node in first or node in self.regions.cheap:
                continue
            if node in shared:
                return False
            seen.add(node)
            todo += [o for o in self.row_operands[node] if self._group_or_none(o) == self._group(node)]
        return True

    def _group_or_none(self, node: fx.Node) -> tuple[int, Space] | None:
        return self._group(node) if node in self.inside else None


@dataclass(frozen=True)
class Operand:
    """What a node of a loop reads from outside: sliced along the rows of ``layout``, or whole (``None``)."""

    value: fx.Node
    layout: book.Layout | None


@dataclass
class Contents:
    """What the body of one loop consists of.

    Attributes:
        nodes: what it computes, in graph order.
        sources: for each of them its tensor operands, in the order of its arguments: another node of the loop,
            or something from outside.
    """

    nodes: list[fx.Node]
    sources: dict[fx.Node, list[fx.Node | Operand]]

    def operands(self) -> dict[Operand, int]:
        """Everything that the loop reads from outside, numbered in the order of first use."""
        found: dict[Operand, int] = {}
        for node in self.nodes:
            for source in self.sources[node]:
                if isinstance(source, Operand):
                    found.setdefault(source, len(found))
        return found


def contents_of(region: Region, regions: Regions, labels: Labels, position: dict[fx.Node, int]) -> Contents:
    """Collect a loop's body from its results backwards."""
    sources: dict[fx.Node, list[fx.Node | Operand]] = {}
    todo = list(region.outputs)
    while todo:
        node = todo.pop()
        if node in sources:
            continue
        sources[node] = []
        for operand, kind, layout in labels.edges(node):
            if kind is Edge.ROW and _computed_inside(operand, region, regions):
                sources[node].append(operand)
                todo.append(operand)
            else:
                sources[node].append(Operand(operand, _sliced(layout, region.space)))
    return Contents(sorted(sources, key=position.__getitem__), sources)


def _computed_inside(operand: fx.Node, region: Region, regions: Regions) -> bool:
    if operand in regions.of:
        return regions.of[operand] is region
    return operand in regions.inside and operand not in regions.outside


def _sliced(layout: book.Layout | None, space: Space) -> book.Layout | None:
    """The layout, if it has the dim that is chunked."""
    if layout is None or not (book.FLAT in layout or len(space) - 1 in layout):
        return None
    return layout
