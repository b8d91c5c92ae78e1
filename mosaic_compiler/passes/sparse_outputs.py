"""``sparse-outputs``: a returned value that is zero but for some rows takes memory for those rows only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes.base import Machine, Pass
from mosaic_compiler.passes.constants import constant_of

aten = torch.ops.aten


_NARROWEST = 4096
"""Bytes of the narrowest row."""


@dataclass(frozen=True)
class SparseOutputsPass(Pass):
    """Give the caller rows in zeros of virtual memory, where only pages that hold such rows are resident.

    Rows of less than 4 KiB (a number per token) are not worth it.  How many pages there are is known when the row
    numbers are: first thing in the step.  Where the pages are no fewer than the result has, it is an ordinary tensor.

    Attributes:
        page: bytes that get memory or do not; ``None``: the device has no virtual memory, and nothing is done.

    Requires: row-demand has run.  Guarantees: the same outputs.

    Before::

        idx = nonzero(m)
        ...
        logits = index_copy(full([N, V], 0), 0, idx, rows)           # N x V in memory
        return logits

    After::

        idx = nonzero(m);  pages = touched_pages(idx, N, V * itemsize, page)
        ...
        logits = scatter_rows(rows, idx, N, pages, page)             # pages x page in memory
        return logits
    """

    page: int | None = None
    name: ClassVar[str] = "sparse-outputs"

    @classmethod
    def of(cls, options: MosaicOptions, machine: Machine) -> SparseOutputsPass:
        """For the machine's pages."""
        return cls(machine.page_bytes)

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        if self.page is None or not any(node.target is aten.index_copy.default for node in module.graph.nodes):
            return module
        module = ir.copy_graph(module)
        storage = ir.StorageMap(module.graph)
        escaping = ir.escaping_roots(module.graph, storage)
        early = set(ir.prologue_nodes(module.graph))
        rewriter = _Rewriter(module, self.page)
        for node in list(module.graph.nodes):
            if (node, 0) in escaping and self._is_match(node, early):
                rewriter.rewrite(node)
        ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module

    def _is_match(self, node: fx.Node, early: set[fx.Node]) -> bool:
        """``index_copy(zeros, 0, idx, rows)`` with wide rows and an index that is known when the step starts."""
        if node.target is not aten.index_copy.default:
            return False
        zeros, dim, index, _ = node.args
        if not isinstance(zeros, fx.Node) or zeros.target is not aten.full.default or constant_of(zeros) != 0:
            return False
        width = _row_bytes(node)
        wide = bool(width.is_Integer) and int(width) >= _NARROWEST
        return wide and bool(dim == 0) and _is_early(index, early)


def _is_early(index: object, early: set[fx.Node]) -> bool:
    """Computed in the prologue, or a view of what is."""
    while isinstance(index, fx.Node) and ir.is_view(index):
        index = index.args[0]
    return index in early


def _row_bytes(node: fx.Node) -> sympy.Expr:
    tensor = ir.only_tensor(node)
    return sympy.prod([ir.expr_of(size) for size in tensor.shape[1:]], start=sympy.Integer(tensor.dtype.itemsize))


class _Rewriter(Emitter):
    def __init__(self, module: fx.GraphModule, page: int) -> None:
        super().__init__(module)
        self.page = page
        self._pages: dict[Any, fx.Node] = {}

    def rewrite(self, node: fx.Node) -> None:
        zeros, _, index, rows = node.args
        assert isinstance(zeros, fx.Node)
        assert isinstance(index, fx.Node)
        total: Any = zeros.args[0][0]  # type: ignore[index]
        self.origin = node
        pages = self._pages_of(index, total, int(_row_bytes(node)))
        with self.graph.inserting_before(node):
            result = self.emit(ops.scatter_rows, rows, index, total, pages, self.page)
        node.replace_all_uses_with(result, propagate_meta=False)

    def _pages_of(self, index: fx.Node, total: Any, row_bytes: int) -> fx.Node:
        """The number of pages, once for all results with the same rows."""
        key = index, total, row_bytes
        if key not in self._pages:
            with self.graph.inserting_after(total if _is_behind(total, index) else index):
                self._pages[key] = self.bare(ops.touched_pages, index, total, row_bytes, self.page)
            self.bind_number(self._pages[key])
        return self._pages[key]


def _is_behind(number: object, node: fx.Node) -> bool:
    """A number that stands further behind in the graph."""
    return isinstance(number, fx.Node) and number.op == "call_function" and node < number
