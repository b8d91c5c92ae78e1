"""Where an element of a tensor comes from, for ops that only move elements: views, slices, picks by numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any as Anything

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book.rows import normal_dim, order_of, shape_of, squeezed_dims
from mosaic_compiler.compat.symbols import FloorDiv, Mod
from mosaic_compiler.passes.visible_keys.elements import Elements, broadcast
from mosaic_compiler.passes.visible_keys.formulas import Index, OpaqueError

aten = torch.ops.aten


def _same(elements: Elements, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    return node.args[0], index  # type: ignore[return-value]


def _unsqueezed(elements: Elements, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    dim = normal_dim(node.args[1], len(index))  # type: ignore[arg-type]
    return node.args[0], index[:dim] + index[dim + 1 :]  # type: ignore[return-value]


def _squeezed(elements: Elements, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    gone, rest = squeezed_dims(node), iter(index)
    dims = range(len(shape_of(node.args[0])))
    return node.args[0], tuple(sympy.Integer(0) if dim in gone else next(rest) for dim in dims)  # type: ignore[return-value]


def _expanded(elements: Elements, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    return node.args[0], broadcast(node.args[0], index)  # type: ignore[return-value]


def _permuted(elements: Elements, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    found = [sympy.Integer(0)] * len(index)
    for position, dim in enumerate(order_of(node, len(index))):
        found[dim] = index[position]
    return node.args[0], tuple(found)  # type: ignore[return-value]


def _sliced(elements: Elements, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    dim, start, step = ((ir.argument(node, name) or 0) for name in ("dim", "start", "step"))
    dim = normal_dim(dim, len(index))
    begin = ir.expr_of(ir.argument_value(start))
    if not elements.bounds.is_positive_or_zero(begin):  # from the end
        raise OpaqueError(node)
    moved = index[dim] * (step or 1) + begin
    return node.args[0], (*index[:dim], sympy.expand(moved), *index[dim + 1 :])  # type: ignore[return-value]


def _selected(elements: Elements, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    dim = normal_dim(node.args[1], len(index) + 1)  # type: ignore[arg-type]
    at = ir.expr_of(ir.argument_value(node.args[2]))
    if at.is_Integer and at < 0:
        at = ir.expr_of(shape_of(node.args[0])[dim]) + at
    return node.args[0], (*index[:dim], at, *index[dim:])  # type: ignore[return-value]


def _viewed(elements: Elements, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    """The same elements under another shape: dims are merged and split."""
    source = node.args[0]
    ours = [(ir.expr_of(size), at) for size, at in zip(shape_of(node), index, strict=True) if ir.expr_of(size) != 1]
    shape = [ir.expr_of(size) for size in shape_of(source)]
    theirs = [dim for dim, size in enumerate(shape) if size != 1]
    found = [sympy.Integer(0)] * len(shape)
    i = j = 0
    while i < len(ours) and j < len(theirs):
        group, into = [ours[i]], [theirs[j]]
        a, b = ours[i][0], shape[theirs[j]]
        i, j = i + 1, j + 1
        while sympy.expand(a - b) != 0:
            _, denominator = sympy.fraction(sympy.cancel(a / b))
            if denominator == 1 and j < len(theirs):
                into.append(theirs[j])
                b, j = b * shape[theirs[j]], j + 1
            elif i < len(ours):
                group.append(ours[i])
                a, i = a * ours[i][0], i + 1
            else:
                raise OpaqueError(node)
        flat = sympy.Integer(0)
        for size, at in group:
            flat = flat * size + at
        for dim in reversed(into[1:]):
            found[dim] = _remainder(flat, shape[dim])
            flat = _quotient(flat, shape[dim])
        found[into[0]] = sympy.expand(flat)
    if i < len(ours) or j < len(theirs):
        raise OpaqueError(node)
    return source, tuple(found)  # type: ignore[return-value]


def _quotient(number: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    return FloorDiv(sympy.expand(number), divisor)


def _remainder(number: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    return Mod(sympy.expand(number), divisor)


def _picked(elements: Elements, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """``source[i, j, ...]`` with an index for each of the first dims."""
    source, given = node.args[:2]
    indices: Anything = given
    if any(each is None for each in indices):
        return None
    rank = max(len(shape_of(each)) for each in indices)
    rest = index[rank:]
    found = []
    for each, size in zip(indices, shape_of(source), strict=False):
        if ir.only_tensor(each).dtype == torch.bool:
            return None
        cases = elements.number(each, broadcast(each, index[:rank]))
        if len(cases) != 1 or not elements.bounds.is_positive_or_zero(cases[0][1]):
            raise OpaqueError(node)
        found.append(sympy.Integer(0) if ir.expr_of(size) == 1 else cases[0][1])
    return source, (*found, *rest)  # type: ignore[return-value]


PLACES: dict[Anything, Callable[[Elements, fx.Node, Index], tuple[fx.Node, Index] | None]] = {
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.unsqueeze.default: _unsqueezed,
    aten.squeeze.default: _squeezed,
    aten.squeeze.dim: _squeezed,
    aten.squeeze.dims: _squeezed,
    aten.expand.default: _expanded,
    aten.permute.default: _permuted,
    aten.transpose.int: _permuted,
    aten.t.default: _permuted,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.view.default: _viewed,
    aten.index.Tensor: _picked,
}
