"""``Rewriter``: the graph that ``canonicalize`` rewrites, with the facts that its rules share."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.ir.emitter import Emitter

aten = torch.ops.aten


class Rewriter(Emitter):
    """The graph being rewritten, with the facts that the rules share."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        storage = ir.StorageMap(module.graph)
        self._storage = storage
        self._pinned = ir.escaping_roots(module.graph, storage) | ir.written_roots(module.graph, storage)
        for node in module.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, OpOverload) and ir.reads_storage(node.target):
                self._pinned.update(root for operand in node.all_input_nodes for root in storage.roots(operand) if root)

    def may_share(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether ``node`` (a copy) may become ``source`` itself: neither escapes nor is written."""
        return not self.is_pinned(node) and not self.is_pinned(source)

    def is_pinned(self, node: fx.Node) -> bool:
        """Its memory escapes, is written, or somebody counts from where it begins."""
        return bool(set(self._storage.roots(node)) & self._pinned)

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        if self.is_pinned(node):
            self._pinned.update(root for root in self._storage.roots(by) if root is not None)
        node.replace_all_uses_with(by, propagate_meta=False)
        self.graph.erase_node(node)

    def multiple(self, origin: fx.Node, size: Any, factor: int) -> Any:
        """``size * factor`` as an argument."""
        if not isinstance(size, fx.Node) or factor == 0:
            return size * factor if not isinstance(size, fx.Node) else 0
        if factor == 1:
            return size
        with self.graph.inserting_before(origin):
            node: fx.Node = self.arithmetic(operator.mul, size, factor)
        self._storage.add(node)
        return node

    def put(self, origin: fx.Node, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before ``origin`` with its provenance and fresh metadata."""
        self.origin = origin
        with self.graph.inserting_before(origin):
            node = self.emit(target, *args, **kwargs)
        self._storage.add(node)
        return node
