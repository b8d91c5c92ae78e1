"""Bringing the nodes of a graph into another order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from mosaic_compiler import ir


def sort_nodes(graph: fx.Graph, position: Mapping[fx.Node, int]) -> None:
    """Bring the nodes into an order in which they can run: by position, or earlier if somebody needs them there.

    Nodes without a position (views, sizes) go where they are needed first; effects keep their order.
    """
    effects = [node for node in graph.nodes if node.op == "call_function" and ir.has_effect(node)]
    placed: dict[fx.Node, None] = {}

    def place(node: fx.Node) -> None:
        todo = [node]
        while todo:
            current = todo[-1]
            needs = list(current.all_input_nodes)
            if current in effects:
                needs += effects[: effects.index(current)]
            missing = [need for need in needs if need not in placed]
            if missing:
                todo += missing
            else:
                placed.setdefault(todo.pop())

    ordered = sorted((n for n in graph.nodes if n in position and n.op != "output"), key=position.__getitem__)
    for node in (*graph.find_nodes(op="placeholder"), *ordered, *graph.nodes):
        place(node)
    last: fx.Node | None = None
    for node in placed:
        if last is not None:
            last.append(node)
        last = node
