"""``reorder``: independent ops run in the order that needs the least memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import sympy
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir.loops import ChunkLoop, loop_of, rewrite_bodies
from mosaic_compiler.ir.notes import Note
from mosaic_compiler.ir.sorting import sort_nodes
from mosaic_compiler.passes.base import Pass

NOMINAL = 4096
"""What every symbolic size counts as in an estimate."""


@dataclass(frozen=True)
class OrderDecision:
    """The orders that were compared for one graph.

    Attributes:
        graph: ``step``, or the loop whose body it is.
        chosen: name of the order that runs; ``program`` if none is better than the model's own.
        estimates: most bytes live at once in each order, by its name, with :data:`NOMINAL` for every size.
    """

    graph: str
    chosen: str
    estimates: Mapping[str, int]


ORDERS: Note[tuple[OrderDecision, ...]] = Note("orders", ())


@dataclass(frozen=True)
class ReorderPass(Pass):
    """Reorder ops that do not depend on each other if that lowers the most bytes live at once.

    Four orders are compared, in the graph and in loop bodies: the program's own; least peak memory first (of what can
    run, the op that adds least; Inductor calls it LPMF); depth first (what feeds the last op is finished operand by
    operand, the one that needs most memory first); and breadth first (by the number of ops in front).  Another order
    than the program's is taken only if it is lower.  What runs before sizes are known stays in front, and effects
    (random draws) keep their order.

    Requires: a functional graph (``in-place`` comes later).  Guarantees: same outputs, bit for bit.

    Before::

        a = exp(x)              # two large values live at once
        b = cos(x)
        c = sum(a, [0])
        d = sum(b, [0])

    After::

        a = exp(x)
        c = sum(a, [0])
        b = cos(x)
        d = sum(b, [0])
    """

    name: ClassVar[str] = "reorder"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        decisions: list[OrderDecision] = []

        def reordered(body: fx.GraphModule) -> fx.GraphModule:
            body = ir.copy_graph(body)
            decisions.append(_reorder(body.graph, f"body {len(decisions) + 1}"))
            body.recompile()
            return body

        rewrite_bodies(module, reordered)
        decisions.insert(0, _reorder(module.graph, "step"))
        ORDERS.write(module, tuple(decisions))
        module.graph.lint()
        module.recompile()
        return module


def _reorder(graph: fx.Graph, name: str) -> OrderDecision:
    memory = _Memory(graph)
    program = memory.units
    orders = {
        "program": program,
        "least peak first": memory.least_peak_first(),
        "depth first": memory.depth_first(),
        "breadth first": memory.breadth_first(),
    }
    estimates = {order: memory.peak(units) for order, units in orders.items()}
    chosen = min(estimates, key=lambda order: estimates[order])  # the first of equals: the program's own
    if chosen != "program":
        sort_nodes(graph, {unit: index for index, unit in enumerate(orders[chosen])})
    return OrderDecision(name, chosen, MappingProxyType(estimates))


class _Memory:
    """Which ops make which storages, and what an order of them needs.

    A unit is an op that makes or reads memory; views and sizes go where they are needed first.
    """

    def __init__(self, graph: fx.Graph) -> None:
        storage = ir.StorageMap(graph)
        early = set(ir.prologue_nodes(graph))
        made: dict[ir.Root, int] = {}
        for node in graph.nodes:
            for index, tensor in enumerate(ir.tensors_of(node)):
                root = (node, index)
                if tensor is not None and ir.is_computed(root) and storage.roots(node)[index] == root:
                    made[root] = _nominal(ir.storage_extent(tensor))
        owners = {root[0] for root in made}
        body = [n for n in graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        units = [n for n in body if n in owners or ir.has_effect(n)]
        self.units = [n for n in units if n in early] + [n for n in units if n not in early]
        self._index = {unit: i for i, unit in enumerate(self.units)}
        self._makes = {unit: [root for root in made if root[0] is unit] for unit in self.units}
        self._bytes = made
        self._inside = {unit: _inside(loop) if (loop := loop_of(unit)) else 0 for unit in self.units}
        kept = ir.escaping_roots(graph, storage)
        self._reads: dict[fx.Node, set[ir.Root]] = {}
        self._needs: dict[fx.Node, set[fx.Node]] = {}
        below: dict[fx.Node, set[fx.Node]] = {}  # units that a node needs, through views
        previous: fx.Node | None = None
        touched: dict[ir.Root, list[fx.Node]] = {}  # units that read or write each storage that is written
        written = ir.written_roots(graph, storage)
        for node in graph.nodes:
            needs = set().union(*(below[operand] for operand in node.all_input_nodes)) if node.op != "output" else set()
            if node in self._index:
                roots = {root for operand in node.all_input_nodes for root in storage.roots(operand) if root in made}
                self._reads[node] = {root for root in roots if root is not None and root not in kept}
                ordered = node in early or ir.has_effect(node)
                if ordered and previous is not None:
                    needs.add(previous)
                previous = node if ordered else previous
                for root in written.intersection(r for n in node.all_input_nodes for r in storage.roots(n)):
                    needs.update(touched.setdefault(root, []))
                    touched[root].append(node)
                self._needs[node] = needs
                below[node] = {node}
            else:
                below[node] = needs
        read = kept.union(*self._reads.values())
        self._unread = {unit: sum(made[root] for root in self._makes[unit] if root not in read) for unit in self.units}
        first = [unit for unit in self.units if unit in early]
        for unit in self.units:
            if first and unit not in early:
                self._needs[unit].add(first[-1])

    def peak(self, order: Sequence[fx.Node]) -> int:
        """Most bytes live at once."""
        live = most = 0
        left = self._readers()
        for unit in order:
            live += self._made(unit)
            most = max(most, live + self._inside[unit])
            live -= self._unread[unit] + sum(self._bytes[root] for root in self._freed(unit, left))
        return most

    def least_peak_first(self) -> list[fx.Node]:
        waiting = {unit: len(needs) for unit, needs in self._needs.items()}
        users: dict[fx.Node, list[fx.Node]] = {unit: [] for unit in self.units}
        for unit, needs in self._needs.items():
            for need in needs:
                users[need].append(unit)
        left = self._readers()
        ready = [unit for unit in self.units if not waiting[unit]]
        order: list[fx.Node] = []
        while ready:
            unit = min(ready, key=lambda u: (self._delta(u, left), self._index[u]))
            ready.remove(unit)
            order.append(unit)
            self._freed(unit, left)
            for user in users[unit]:
                waiting[user] -= 1
                if not waiting[user]:
                    ready.append(user)
        return order

    def depth_first(self) -> list[fx.Node]:
        """From the last op back; of several needs first the one behind which most bytes are made."""
        weight: dict[fx.Node, int] = {}
        for unit in self.units:
            weight[unit] = max([self._made(unit), *(weight[need] for need in self._needs[unit])])
        order: dict[fx.Node, None] = {}
        wanted = {need for needs in self._needs.values() for need in needs}
        for last in (unit for unit in self.units if unit not in wanted):
            todo = [last]
            while todo:
                unit = todo[-1]
                missing = [need for need in self._needs[unit] if need not in order]
                if unit in order or not missing:
                    order.setdefault(todo.pop())
                else:
                    todo += heapq.nsmallest(len(missing), missing, key=lambda n: (weight[n], -self._index[n]))
        return list(order)

    def breadth_first(self) -> list[fx.Node]:
        """By the longest chain of ops in front of each."""
        level: dict[fx.Node, int] = {}
        for unit in self.units:
            level[unit] = 1 + max((level[need] for need in self._needs[unit]), default=0)
        return sorted(self.units, key=lambda unit: (level[unit], self._index[unit]))

    def _made(self, unit: fx.Node) -> int:
        return sum(self._bytes[root] for root in self._makes[unit])

    def _readers(self) -> dict[ir.Root, int]:
        """How many units have still to read each storage that may be freed."""
        left: dict[ir.Root, int] = {}
        for roots in self._reads.values():
            for root in roots:
                left[root] = left.get(root, 0) + 1
        return left

    def _delta(self, unit: fx.Node, left: Mapping[ir.Root, int]) -> int:
        freed = sum(self._bytes[root] for root in self._reads[unit] if left[root] == 1)
        return self._made(unit) - self._unread[unit] - freed

    def _freed(self, unit: fx.Node, left: dict[ir.Root, int]) -> Iterable[ir.Root]:
        freed = []
        for root in self._reads[unit]:
            left[root] -= 1
            if not left[root]:
                freed.append(root)
        return freed


def _inside(loop: ChunkLoop) -> int:
    """Most bytes that the body of a loop holds, with :data:`NOMINAL` rows in a chunk."""
    memory = _Memory(loop.body.graph)
    return memory.peak(memory.units)


def _nominal(expr: sympy.Expr) -> int:
    return int(expr.xreplace({symbol: sympy.Integer(NOMINAL) for symbol in expr.free_symbols}))
