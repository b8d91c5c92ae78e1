"""The arithmetic of masks and positions: what ops make of elements (``elements.py``)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any as Anything

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book.rows import normal_dim, shape_of
from mosaic_compiler.compat.symbols import FloorDiv, Max, Min
from mosaic_compiler.passes.visible_keys.elements import Elements, Rules
from mosaic_compiler.passes.visible_keys.formulas import (
    FALSE,
    TRUE,
    AtLeast,
    Bounds,
    Cases,
    Element,
    Formula,
    Index,
    OpaqueError,
    both,
    either,
    known,
    negated,
)
from mosaic_compiler.passes.visible_keys.places import PLACES

aten = torch.ops.aten


def _both_of(elements: Elements, node: fx.Node, index: Index) -> Formula:
    return both(elements.bounds, *(elements.condition(operand, index) for operand in node.args))


def _either_of(elements: Elements, node: fx.Node, index: Index) -> Formula:
    return either(elements.bounds, *(elements.condition(operand, index) for operand in node.args))


def _contrary(elements: Elements, node: fx.Node, index: Index) -> Formula:
    return negated(elements.condition(node.args[0], index))


def _chosen_truth(elements: Elements, node: fx.Node, index: Index) -> Formula:
    condition, yes, no = (elements.condition(operand, index) for operand in node.args)
    return either(elements.bounds, both(elements.bounds, condition, yes), both(elements.bounds, negated(condition), no))


def _filled_truth(elements: Elements, node: fx.Node, index: Index) -> Formula:
    source, mask, value = node.args
    hidden, other = elements.condition(mask, index), elements.condition(source, index)
    if not isinstance(value, (bool, int, float)):
        raise OpaqueError(node)
    if value:
        return either(elements.bounds, hidden, other)
    return both(elements.bounds, negated(hidden), other)


def _cast_to_truth(elements: Elements, node: fx.Node, index: Index) -> Formula:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if ir.only_tensor(source).dtype == torch.bool:
        return elements.truth(source, index)
    try:
        return elements.compare("ne", elements.number(source, index), ((TRUE, sympy.Integer(0)),))
    except OpaqueError:
        return Element(node, index)


def _triangle_truth(elements: Elements, node: fx.Node, index: Index) -> Formula:
    return both(elements.bounds, elements.truth(node.args[0], index), _is_in_triangle(node, index))  # type: ignore[arg-type]


def _is_in_triangle(node: fx.Node, index: Index) -> Formula:
    diagonal = ir.expr_of(ir.argument_value(ir.argument(node, "diagonal") or 0))
    above = index[-1] - index[-2] - diagonal
    return AtLeast(-above) if node.target is aten.tril.default else AtLeast(above)


def _joined_truth(elements: Elements, node: fx.Node, index: Index) -> Formula:
    parts: list[Formula] = []
    for condition, part, at in _parts_of(elements, node, index):
        parts.append(both(elements.bounds, condition, elements.truth(part, at)))
    return either(elements.bounds, *parts)


def _replaced_truth(elements: Elements, node: fx.Node, index: Index) -> Formula:
    inside, source, at = _replaced_part(elements, node, index)
    base = elements.truth(node.args[0], index)  # type: ignore[arg-type]
    new = elements.truth(source, at)
    return either(elements.bounds, both(elements.bounds, inside, new), both(elements.bounds, negated(inside), base))


def _padding(elements: Elements, node: fx.Node, index: Index) -> tuple[Formula, Index]:
    """Whether an element is one of what was padded, and which."""
    widths: Anything = node.args[1]
    shape = [ir.expr_of(size) for size in shape_of(node.args[0])]
    inside, at = [], list(index)
    for number in range(len(widths) // 2):
        dim = len(shape) - 1 - number
        at[dim] = sympy.expand(index[dim] - ir.expr_of(ir.argument_value(widths[2 * number])))
        inside += [AtLeast(at[dim]), AtLeast(sympy.expand(shape[dim] - 1 - at[dim]))]
    return both(elements.bounds, *inside), tuple(at)


def _padded_truth(elements: Elements, node: fx.Node, index: Index) -> Formula:
    inside, at = _padding(elements, node, index)
    source = both(elements.bounds, inside, elements.truth(node.args[0], at))  # type: ignore[arg-type]
    return either(elements.bounds, source, negated(inside)) if ir.argument(node, "value") else source


TRUTHS: dict[Anything, Callable[[Elements, fx.Node, Index], Formula]] = {
    aten.bitwise_and.Tensor: _both_of,
    aten.logical_and.default: _both_of,
    aten.mul.Tensor: _both_of,
    aten.bitwise_or.Tensor: _either_of,
    aten.logical_or.default: _either_of,
    aten.bitwise_not.default: _contrary,
    aten.logical_not.default: _contrary,
    aten.where.self: _chosen_truth,
    aten.masked_fill.Scalar: _filled_truth,
    aten._to_copy.default: _cast_to_truth,
    aten.tril.default: _triangle_truth,
    aten.triu.default: _triangle_truth,
    aten.cat.default: _joined_truth,
    aten.constant_pad_nd.default: _padded_truth,
    aten.slice_scatter.default: _replaced_truth,
}


# -------------------------------------------------------------------------------------------- numbers
def _numbered(elements: Elements, node: fx.Node, index: Index) -> Cases:
    start, step = sympy.Integer(0), sympy.Integer(1)
    if node.target is not aten.arange.default:
        start = ir.expr_of(ir.argument_value(node.args[0]))
        given = ir.argument(node, "step") if node.target is aten.arange.start_step else 1
        step = ir.expr_of(ir.argument_value(given))
    if not (start.is_integer and step.is_integer):
        raise OpaqueError(node)
    return ((TRUE, start + step * index[0]),)


def _of_numbers(function: Callable[..., sympy.Expr]) -> Callable[[Elements, fx.Node, Index], Cases]:
    def rule(elements: Elements, node: fx.Node, index: Index) -> Cases:
        if ir.argument(node, "alpha") not in (None, 1):
            raise OpaqueError(node)
        operands = [elements.operand(node, operand, index) for operand in node.args]
        return elements.combined(lambda *values: _checked(function(*values)), *operands)

    return rule


def _checked(value: sympy.Expr) -> sympy.Expr:
    if value is sympy.nan or value.has(sympy.nan):
        raise OpaqueError(value)
    return value


def _divided(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if not (a.is_integer and b.is_Integer and b > 0):
        raise OpaqueError(a)
    return FloorDiv(a, b)


def _left_over(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if not (a.is_integer and b.is_Integer and b > 0):
        raise OpaqueError(a)
    return a - b * FloorDiv(a, b)


def _rounded_quotient(elements: Elements, node: fx.Node, index: Index) -> Cases:
    mode = ir.argument(node, "rounding_mode")
    left, right = (elements.operand(node, operand, index) for operand in node.args[:2])
    is_positive = all(elements.bounds.is_positive_or_zero(value) for _, value in left)
    if mode == "floor" or (mode == "trunc" and is_positive):
        return elements.combined(_divided, left, right)
    raise OpaqueError(node)


def _chosen_number(elements: Elements, node: fx.Node, index: Index) -> Cases:
    condition, yes, no = node.args
    return elements.chosen(
        elements.condition(condition, index),
        elements.operand(node, yes, index),
        elements.operand(node, no, index),
    )


def _filled_number(elements: Elements, node: fx.Node, index: Index) -> Cases:
    source, mask, value = node.args
    return elements.chosen(
        elements.condition(mask, index), elements.operand(node, value, ()), elements.operand(node, source, index)
    )


def _cast(elements: Elements, node: fx.Node, index: Index) -> Cases:
    return elements.number(node.args[0], index)


def _triangle_number(elements: Elements, node: fx.Node, index: Index) -> Cases:
    zero: Cases = ((TRUE, sympy.Integer(0)),)
    return elements.chosen(_is_in_triangle(node, index), elements.number(node.args[0], index), zero)


def _logarithm(elements: Elements, node: fx.Node, index: Index) -> Cases:
    def log(value: sympy.Expr) -> sympy.Expr:
        if value == 0:
            return -sympy.oo
        if value == 1:
            return sympy.Integer(0)
        raise OpaqueError(value)

    return elements.combined(log, elements.number(node.args[0], index))


def _summed_up(elements: Elements, node: fx.Node, index: Index) -> Cases:
    """Of zeros: how many documents begin, where there is one."""
    if elements.number(node.args[0], index) != ((TRUE, sympy.Integer(0)),):
        raise OpaqueError(node)
    return ((TRUE, sympy.Integer(0)),)


def _joined_number(elements: Elements, node: fx.Node, index: Index) -> Cases:
    found: list[tuple[Formula, sympy.Expr]] = []
    for condition, part, at in _parts_of(elements, node, index):
        found += [(both(elements.bounds, condition, each), value) for each, value in elements.number(part, at)]
    return elements.cases(_continued(found))


def _continued(cases: list[tuple[Formula, sympy.Expr]]) -> list[tuple[Formula, sympy.Expr]]:
    """A case for one position (the first) is none of its own if its number is what the rule of the others says."""
    for number, (condition, value) in enumerate(cases):
        if len(cases) != 2 or not isinstance(condition, AtLeast):
            continue
        other = cases[1 - number][1]
        positions = [s for s in condition.number.free_symbols if condition.number.coeff(s) == -1]
        is_first = len(positions) == 1 and condition.number == -positions[0]  # it is 0
        if is_first and sympy.expand(other.subs(positions[0], 0) - value) == 0:
            return [(TRUE, other)]
    return cases


def _parts_of(elements: Elements, node: fx.Node, index: Index) -> list[tuple[Formula, fx.Node, Index]]:
    """Of a join: when an element is of which part, and where there."""
    parts: Anything = node.args[0]
    dim = normal_dim(ir.argument(node, "dim") or 0, len(index))
    begin, found = sympy.Integer(0), []
    for part in parts:
        if len(shape_of(part)) != len(index):
            raise OpaqueError(node)
        size = ir.expr_of(shape_of(part)[dim])
        at = sympy.Integer(0) if size == 1 else sympy.expand(index[dim] - begin)
        inside = (
            [known(elements.bounds, AtLeast(sympy.expand(begin + size - 1 - index[dim])))]
            if part is not parts[-1]
            else []
        )
        inside += [known(elements.bounds, AtLeast(sympy.expand(index[dim] - begin)))] if begin != 0 else []
        found.append((both(elements.bounds, *inside), part, (*index[:dim], at, *index[dim + 1 :])))
        begin += size
    return [each for each in found if each[0] != FALSE]


def _replaced_part(elements: Elements, node: fx.Node, index: Index) -> tuple[Formula, fx.Node, Index]:
    """Of a write to a slice: whether an element is in it, and where in what was written."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    dim = normal_dim(ir.argument(node, "dim") or 0, len(index))
    start, end, step = (ir.argument(node, name) for name in ("start", "end", "step"))
    begin = ir.expr_of(ir.argument_value(start or 0))
    length = ir.expr_of(shape_of(source)[dim])
    if step not in (None, 1) or not elements.bounds.is_positive_or_zero(begin) or end is None:
        raise OpaqueError(node)
    at = sympy.expand(index[dim] - begin)
    inside = both(elements.bounds, AtLeast(at), AtLeast(sympy.expand(length - 1 - at)))
    return inside, source, (*index[:dim], at, *index[dim + 1 :])


def _replaced_number(elements: Elements, node: fx.Node, index: Index) -> Cases:
    inside, source, at = _replaced_part(elements, node, index)
    return elements.chosen(inside, elements.number(source, at), elements.number(node.args[0], index))


def _padded_number(elements: Elements, node: fx.Node, index: Index) -> Cases:
    inside, at = _padding(elements, node, index)
    source = elements.number(node.args[0], at)
    return elements.chosen(inside, source, elements.number(ir.argument(node, "value") or 0, ()))


NUMBERS: dict[Anything, Callable[[Elements, fx.Node, Index], Cases]] = {
    aten.arange.default: _numbered,
    aten.arange.start: _numbered,
    aten.arange.start_step: _numbered,
    aten.add.Tensor: _of_numbers(operator.add),
    aten.sub.Tensor: _of_numbers(operator.sub),
    aten.mul.Tensor: _of_numbers(operator.mul),
    aten.neg.default: _of_numbers(operator.neg),
    aten.maximum.default: _of_numbers(Max),
    aten.minimum.default: _of_numbers(Min),
    aten.clamp_min.default: _of_numbers(Max),
    aten.clamp_max.default: _of_numbers(Min),
    aten.floor_divide.default: _of_numbers(_divided),
    aten.remainder.Scalar: _of_numbers(_left_over),
    aten.div.Tensor_mode: _rounded_quotient,
    aten.div.Scalar_mode: _rounded_quotient,
    aten.abs.default: _of_numbers(sympy.Abs),
    aten.where.self: _chosen_number,
    aten.masked_fill.Scalar: _filled_number,
    aten._to_copy.default: _cast,
    aten.tril.default: _triangle_number,
    aten.triu.default: _triangle_number,
    aten.log.default: _logarithm,
    aten.cumsum.default: _summed_up,
    aten.cat.default: _joined_number,
    aten.constant_pad_nd.default: _padded_number,
    aten.slice_scatter.default: _replaced_number,
}


def elements_of(bounds: Bounds) -> Elements:
    """Elements of a graph's tensors, at positions within bounds."""
    return Elements(bounds, Rules(PLACES, TRUTHS, NUMBERS))
