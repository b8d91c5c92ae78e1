"""``row-demand``: nothing is computed for rows that nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir.notes import Note
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.row_demand.compaction import Compactor
from mosaic_compiler.passes.row_demand.demand import analyse
from mosaic_compiler.passes.row_demand.demands import Demands


@dataclass(frozen=True)
class RowDecision:
    """Why a matmul or attention runs on some rows, or on all.

    Attributes:
        node, module, source: which operation.
        rows, total: rows computed and rows there are, as expressions in the graph's symbols.
        consumer: what forced these rows: the selector, or the op (or output) that needs all, with its source line.
    """

    node: str
    module: str
    source: str
    rows: str
    total: str
    consumer: str


ROW_DECISIONS: Note[tuple[RowDecision, ...]] = Note("row_decisions", ())


@dataclass(frozen=True)
class RowDemandPass(Pass):
    """Find out from the graph which rows each value is read at, and compute only those.

    Going backwards from the outputs, every value gets a *demand*: all rows, or the rows where a mask
    that is known before the step's heavy work holds, or rows picked by indices.  ``where(m, v, y)`` demands
    of v only rows m (and of y only rows ~m); pointwise ops, matmuls by weights, norms, softmax over
    features, ... pass a demand on (``book/rows.py``); whatever has no rule demands everything, so the
    rewrite is sound.  Where a demand reaches a matmul, the values it covers are computed on gathered rows,
    and small results are scattered back.

    Requires: a canonical graph.  Guarantees: the same outputs, up to the rounding of products on fewer rows (BLAS
    may take another kernel for them); rows that nobody demands hold zeros.

    Before (R rows)::

        h = ...                        # [R, D]
        logits = mm(h, head)           # [R, V]
        token = argmax(logits, -1)     # [R]
        return where(m, token, ids)

    After (M = number of rows where m holds)::

        idx = nonzero(m)               # first thing in the step
        h = ...
        token = argmax(mm(index_select(h, 0, idx), head), -1)          # [M]
        return where(m, index_copy(zeros(R), 0, idx, token), ids)
    """

    name: ClassVar[str] = "row-demand"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        demands = analyse(module.graph)
        ROW_DECISIONS.write(module, _decisions(demands))
        if demands.heavy:
            Compactor(module, demands).rewrite()
            ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module


def _decisions(demands: Demands) -> tuple[RowDecision, ...]:
    found = []
    for node, rows, total, consumer in demands.reasons():
        origin = ir.provenance(node)
        reason = f"{consumer.name} ({consumer.target}) {ir.provenance(consumer).source}".strip()
        found.append(RowDecision(node.name, origin.module, origin.source, str(rows), str(total), reason))
    return tuple(found)
