"""Rows that may be computed more than once must not count twice: what the verifier holds against them.

A step may be bound for more rows than it needs (:data:`ir.MAY_REPEAT`); those that are too many repeat the last one::

    idx = nonzero(mask)                       # [M, 1]: 2 5 9, or 2 5 9 9
    rows = softmax(mm(x[idx], w))             # row by row
    y = index_copy(zeros, 0, idx, rows)       # the same row twice in the same place
    s = rows.sum(0)                           # illegal: row 9 would count twice
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir import ops

_PUT_BACK = frozenset({torch.ops.aten.index_copy.default, ops.scatter_rows, ops.touched_pages})
"""Ops whose results have no rows of their operands', and are the same if some of those are repeated."""


def counted_repeats(graph: fx.Graph) -> Iterator[str]:
    """Nodes whose results depend on how often a row is repeated, because its rows end there."""
    repeated = {node.meta[ir.BINDS] for node in graph.nodes if ir.MAY_REPEAT in node.meta}
    if not repeated:
        return
    symbols = {node: _symbols_of(node) for node in graph.nodes}
    for node in graph.nodes:
        read = [symbols[operand] for operand in node.all_input_nodes]
        lost = repeated & set().union(*read) - symbols[node]
        if not lost or ir.is_view(node) or node.target in _PUT_BACK or node.op == "call_module":
            continue  # loops and clusters work row by row
        yield f"{node.name} has none of the {', '.join(map(str, lost))} rows of its operands, which may be repeated"


def _symbols_of(node: fx.Node) -> set[sympy.Symbol]:
    """In sizes of tensors and in numbers (strides and offsets of views do not matter)."""
    tensors = [tensor for tensor in ir.tensors_of(node) if tensor is not None]
    numbers = [n for tensor in tensors for n in tensor.shape] or ir.numbers_in(ir.value_of(node))
    return set().union(*(ir.expr_of(number).free_symbols for number in numbers if ir.is_symbolic_number(number)))
