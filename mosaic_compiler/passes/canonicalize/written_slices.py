"""Memory that is written slice by slice until nothing of it is left is what its slices are, side by side."""

from __future__ import annotations

import sys

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.passes.canonicalize.rewriter import Rewriter

aten = torch.ops.aten


def join_written_slices(rewriter: Rewriter, node: fx.Node) -> bool:
    """``slice_scatter(slice_scatter(any, a, -1, 0, 8), b, -1, 8)``, [.., 16]: ``cat([a, b], -1)``.

    What was there before is read by nobody, and rows of a ``cat`` are told, those of memory as it is are not.
    """
    if node.target is not aten.slice_scatter.default:
        return False
    result = ir.only_tensor(node)
    dim = _dim(node)
    size = ir.expr_of(result.shape[dim])
    if not size.is_Integer:
        return False
    parts: dict[tuple[int, int], fx.Node] = {}
    at, missing = node, int(size)
    while missing and at.target is aten.slice_scatter.default and _dim(at) == dim:
        run = _run(at, int(size))
        if run is None or any(run[0] < end and begin < run[1] for begin, end in parts):
            return False
        source = at.args[1]
        assert isinstance(source, fx.Node)
        parts[run] = source
        missing -= run[1] - run[0]
        below = at.args[0]
        assert isinstance(below, fx.Node)
        at = below
    if missing or len(parts) < 2 or not result.is_contiguous():
        return False
    sources = [_spelled(rewriter, node, parts[run]) for run in sorted(parts)]
    if any(ir.only_tensor(source).dtype != result.dtype for source in sources):
        return False
    joined = rewriter.put(node, aten.cat.default, sources, dim)
    rewriter.replace(node, joined)
    return True


def _dim(node: fx.Node) -> int:
    dim = ir.argument(node, "dim") or 0
    assert isinstance(dim, int)
    return dim % ir.only_tensor(node).dim()


def _run(node: fx.Node, size: int) -> tuple[int, int] | None:
    """From where to where it writes, if that is known and not empty."""
    begin, end, step = (ir.argument(node, name) for name in ("start", "end", "step"))
    begin, end = 0 if begin is None else begin, sys.maxsize if end is None else end
    if not (isinstance(begin, int) and isinstance(end, int)) or step not in (None, 1):
        return None
    begin, end, _ = slice(begin, end).indices(size)
    return (begin, end) if begin < end else None


def _spelled(rewriter: Rewriter, node: fx.Node, source: fx.Node) -> fx.Node:
    """``copy(memory, x)`` is x in the shape of the memory."""
    if source.target is not aten.copy.default:
        return source
    copied = source.args[1]
    assert isinstance(copied, fx.Node)
    before, after = ir.only_tensor(copied), ir.only_tensor(source)
    if before.dtype != after.dtype or before.device != after.device:
        return source
    if [ir.expr_of(size) for size in before.shape] == [ir.expr_of(size) for size in after.shape]:
        return copied
    return source
