"""Moves: operations whose result consists of whole rows of one operand.

Slices, picks by index, the shift by one of Dream (a concatenation of slices of one tensor), and computed rows put where
they belong (``mosaic::put_rows``).  What they do to rows can be applied to row numbers instead of rows, and so costs
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import rows
from mosaic_compiler.ir import ops

aten = torch.ops.aten


def moved_dims(node: fx.Node) -> int | None:
    """How many leading dims of its operand a move re-arranges, or ``None`` if the node is no move."""
    if not book.entry(node).moves_rows or not isinstance(node.args[0], fx.Node):
        return None
    rank = len(rows.shape_of(node.args[0]))
    if not rank:
        return None  # a number has no rows
    if node.target is ops.put_rows:
        return len(rows.shape_of(node.args[1]))
    if node.target is aten.index.Tensor:
        indices = node.args[1]
        tensors = [ir.tensor_of(i) if isinstance(i, fx.Node) else None for i in indices]  # type: ignore[union-attr]
        if any(t is None or t.dtype == torch.bool for t in tensors):
            return None
        return len(tensors)
    dim = ir.argument(node, "dim")
    dims = rows.normal_dim(dim if isinstance(dim, int) else 0, rank) + 1
    if node.target is aten.gather.default and row_index(node) is None:
        return None
    return dims if dims <= 2 else None


def kept_dims(node: fx.Node, dims: int) -> int:
    """How many leading dims of a move's result its operand's leading ``dims`` become."""
    if node.target is aten.select.int:
        return dims - 1
    if node.target is ops.put_rows:
        return 1
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        return max(len(rows.shape_of(index)) for index in indices)
    return dims


def row_index(node: fx.Node) -> fx.Node | None:
    """The index of a gather that is the same for every feature: an expand of [rows..., 1]."""
    index, dim = node.args[2], node.args[1]
    source = rows.shape_of(node.args[0])
    rank = len(source)
    at = rows.normal_dim(dim, rank)  # type: ignore[arg-type]
    features, found = source[at + 1 :], rows.shape_of(node)[at + 1 :]
    if list(map(ir.expr_of, features)) != list(map(ir.expr_of, found)):
        return None  # some features of the rows, not the rows
    if not isinstance(index, fx.Node):
        return None
    narrow = index.args[0] if index.target is aten.expand.default else index
    if not isinstance(narrow, fx.Node) or len(rows.shape_of(narrow)) != rank:
        return None
    if any(ir.expr_of(size) != 1 for size in rows.shape_of(narrow)[at + 1 :]):
        return None
    return narrow


def movement_base(node: fx.Node) -> fx.Node | None:
    """The tensor that a slice, an index or a concatenation of slices of one tensor takes its rows from."""
    if moved_dims(node) is not None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        dim = rows.normal_dim(ir.argument(node, "dim") or 0, len(rows.shape_of(node)))
        bases = {movement_base(part) for part in parts}
        same = all(part.target is aten.slice.Tensor and moved_dims(part) == dim + 1 for part in parts)
        if same and len(bases) == 1:
            return bases.pop()
    return None


def movement_steps(node: fx.Node) -> list[fx.Node]:
    """The node and, for a concatenation of slices, the slices."""
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        return [node, *parts]
    return [node]
