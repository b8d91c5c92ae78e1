"""Which storages there are, who shares them, and who sees what is written into them."""

from __future__ import annotations

import operator
from typing import TypeAlias

from torch import fx

from mosaic_compiler.ir.operators import alias_base, mutated_arguments, taken_over
from mosaic_compiler.ir.values import tensor_of, tensors_of

Root: TypeAlias = "tuple[fx.Node, int]"
"""A storage: the node that creates it and which of its outputs it is (0 for a single output)."""


class StorageMap:
    """Which storage each node's outputs live in.

    ``roots(node)`` has one :data:`Root` (or ``None`` for a non-tensor) per output.  A view, an
    in-place write and a ``getitem`` have the root of what they alias; everything else is its own.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._roots: dict[fx.Node, tuple[Root | None, ...]] = {}
        for node in graph.nodes:
            self.add(node)

    def add(self, node: fx.Node) -> None:
        self._roots[node] = self._compute(node)

    def update(self, node: fx.Node) -> None:
        """Look again at a node that has changed, and at what aliases it."""
        before = self._roots[node]
        self.add(node)
        if self._roots[node] != before:
            for user in node.users:
                self.update(user)

    def roots(self, node: fx.Node) -> tuple[Root | None, ...]:
        return self._roots[node]

    def root(self, node: fx.Node) -> Root | None:
        """The root of a single-output node."""
        return self._roots[node][0] if len(self._roots[node]) == 1 else None

    def alias(self, node: fx.Node, root: Root) -> None:
        """Record that ``node`` (single output) now lives in ``root``."""
        self._roots[node] = (root,)

    def _compute(self, node: fx.Node) -> tuple[Root | None, ...]:
        if node.op == "output":
            return ()
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source, index = self._roots[node.args[0]], node.args[1]
            if isinstance(index, int) and tensor_of(node) is not None and index < len(source):
                return (source[index],)
        positions = taken_over(node)
        if positions is not None:
            return tuple(self._result_of_module(node, index, into) for index, into in enumerate(positions))
        base = alias_base(node) if node.op == "call_function" else None
        if base is not None and len(self._roots[base]) == 1:
            return tuple(self._roots[base][0] for _ in tensors_of(node))
        return tuple((node, index) if tensor is not None else None for index, tensor in enumerate(tensors_of(node)))

    def _result_of_module(self, node: fx.Node, index: int, into: int | None) -> Root | None:
        if into is None:
            return (node, index)
        operand = node.args[into]
        assert isinstance(operand, fx.Node)
        return self._roots[operand][0]


def is_computed(root: Root) -> bool:
    """The storage belongs to the step: it is no input, weight or constant."""
    return root[0].op in ("call_function", "call_module")


def escaping_roots(graph: fx.Graph, storage: StorageMap) -> set[Root]:
    """Storages that outlive the step because an output lives in them."""
    output = next(node for node in graph.nodes if node.op == "output")
    return {root for node in output.all_input_nodes for root in storage.roots(node) if root is not None}


def written_roots(graph: fx.Graph, storage: StorageMap) -> set[Root]:
    """Storages that some node of the graph writes in place."""
    return {
        root
        for node in graph.nodes
        for argument in mutated_arguments(node)
        for root in storage.roots(argument)
        if root is not None
    }
