"""What an element of a tensor is, in terms of its indices: the arithmetic of masks and positions, read off the graph.

    (arange(n) // 32)[:, None] >= (arange(n) // 32)[None, :]    element [q, k]:  q // 32 - k // 32 >= 0

A number is a list of cases, each with the condition under which it holds; a boolean is a condition (``formulas.py``).
What is not arithmetic of positions is an element of a tensor that only the data knows, or :class:`OpaqueError`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any as Anything

import sympy
import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book.rows import shape_of
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

aten = torch.ops.aten

LOWEST_OF_HALF = -65504
"""What PyTorch adds to hidden scores where it does not add -inf (cuDNN's attention): nothing is left of them either."""

_MOST_CASES = 8
_OPERATORS = {name: getattr(operator, name) for name in ("ge", "gt", "le", "lt", "eq", "ne")}
_COMPARISONS = {getattr(aten, kind).Tensor for kind in _OPERATORS}


@dataclass(frozen=True)
class Rules:
    """What is known of operators, each a function of (elements, node, index).

    Attributes:
        places: of those that only move elements: the tensor and index that one comes from.
        truths: of those that return booleans.
        numbers: of the others.
    """

    places: Mapping[Anything, Callable[[Elements, fx.Node, Index], tuple[fx.Node, Index] | None]]
    truths: Mapping[Anything, Callable[[Elements, fx.Node, Index], Formula]]
    numbers: Mapping[Anything, Callable[[Elements, fx.Node, Index], Cases]]


class Elements:
    """Elements of the tensors of one graph.

    Args:
        bounds: what the positions can be.
    """

    def __init__(self, bounds: Bounds, rules: Rules) -> None:
        self.bounds, self._rules = bounds, rules
        self._truths: dict[tuple[fx.Node, Index], Formula] = {}
        self._numbers: dict[tuple[fx.Node, Index], Cases] = {}

    # ------------------------------------------------------------------------------------ two kinds
    def truth(self, node: fx.Node, index: Index) -> Formula:
        """An element of a boolean tensor.

        Raises:
            OpaqueError: if it depends on numbers that only the data knows.
        """
        if (node, index) not in self._truths:
            self._truths[node, index] = self._truth(node, index)
        return self._truths[node, index]

    def _truth(self, node: fx.Node, index: Index) -> Formula:
        if node.op == "call_function":
            number = constant(node)
            if number is not None:
                return TRUE if number else FALSE
            source = self._source(node, index)
            if source is not None:
                return self.truth(*source)
            rule = self._rules.truths.get(node.target)
            if rule is not None:
                return rule(self, node, index)
            if book.entry(node).compares is not None or node.target in _COMPARISONS:
                return self._compared(node, index)
        return Element(node, index)

    def number(self, node: Anything, index: Index) -> Cases:
        """An element of a tensor of numbers, or a number itself.

        Raises:
            OpaqueError: if only the data knows it.
        """
        if not isinstance(node, fx.Node):  # a number
            if not isinstance(node, (bool, int, float)):
                raise OpaqueError(node)
            return ((TRUE, _exact(node)),)
        if ir.tensor_of(node) is None:
            return ((TRUE, ir.expr_of(ir.value_of(node))),)
        if (node, index) not in self._numbers:
            self._numbers[node, index] = self._number(node, index)
        return self._numbers[node, index]

    def _number(self, node: fx.Node, index: Index) -> Cases:
        if ir.only_tensor(node).dtype == torch.bool:
            holds = self.truth(node, index)
            return self.cases([(holds, sympy.Integer(1)), (negated(holds), sympy.Integer(0))])
        if node.op == "call_function":
            fill = constant(node)
            if fill is not None:
                return ((TRUE, _exact(fill)),)
            source = self._source(node, index)
            if source is not None:
                return self.number(*source)
            rule = self._rules.numbers.get(node.target)
            if rule is not None:
                return _held(node, rule(self, node, index))
        raise OpaqueError(node)

    # -------------------------------------------------------------------------------------- helpers
    def operand(self, node: fx.Node, operand: Anything, index: Index) -> Cases:
        """The element of a broadcast operand."""
        return self.number(operand, broadcast(operand, index))

    def condition(self, operand: Anything, index: Index) -> Formula:
        """The element of a broadcast boolean operand."""
        if not isinstance(operand, fx.Node) or ir.only_tensor(operand).dtype != torch.bool:
            raise OpaqueError(operand)
        return self.truth(operand, broadcast(operand, index))

    def cases(self, cases: Sequence[tuple[Formula, sympy.Expr]]) -> Cases:
        """Without impossible ones, and equal ones together."""
        kept: dict[sympy.Expr, Formula] = {}
        for condition, value in cases:
            condition = known(self.bounds, condition)
            if condition != FALSE:
                value = sympy.expand(value)
                kept[value] = either(self.bounds, kept[value], condition) if value in kept else condition
        if not kept or len(kept) > _MOST_CASES:
            raise OpaqueError(cases)
        if len(kept) == 1:
            return ((TRUE, next(iter(kept))),)
        return tuple((condition, value) for value, condition in kept.items())

    def combined(self, function: Callable[..., sympy.Expr], *operands: Cases) -> Cases:
        """A function of numbers, case by case."""
        found: list[tuple[Formula, tuple[sympy.Expr, ...]]] = [(TRUE, ())]
        for cases in operands:
            found = [
                (both(self.bounds, condition, other), (*values, value))
                for condition, values in found
                for other, value in cases
            ]
        return self.cases([(condition, function(*values)) for condition, values in found])

    def chosen(self, condition: Formula, yes: Cases, no: Cases) -> Cases:
        """One number or another."""
        parts = [(both(self.bounds, condition, each), value) for each, value in yes]
        parts += [(both(self.bounds, negated(condition), each), value) for each, value in no]
        return self.cases(parts)

    def compare(self, kind: str, left: Cases, right: Cases) -> Formula:
        """A comparison of whole numbers."""
        found: list[Formula] = []
        for condition, a in left:
            for other, b in right:
                found.append(both(self.bounds, condition, other, self._holds(kind, a, b)))
        return either(self.bounds, *found)

    def _holds(self, kind: str, a: sympy.Expr, b: sympy.Expr) -> Formula:
        difference = sympy.expand(a - b)
        if difference.is_number and difference.is_extended_real:
            return TRUE if _OPERATORS[kind](difference, 0) else FALSE
        if not difference.is_integer:
            raise OpaqueError(difference)
        forms: dict[str, Callable[[], Formula]] = {
            "ge": lambda: self._at_least(difference),
            "gt": lambda: self._at_least(difference - 1),
            "le": lambda: self._at_least(-difference),
            "lt": lambda: self._at_least(-difference - 1),
            "eq": lambda: both(self.bounds, self._at_least(difference), self._at_least(-difference)),
            "ne": lambda: either(self.bounds, self._at_least(difference - 1), self._at_least(-difference - 1)),
        }
        return known(self.bounds, forms[kind]())

    def _at_least(self, number: sympy.Expr) -> Formula:
        """It is 0 or more; what is no more than some x if it is no more than x and -x is told so."""
        for term in sympy.Add.make_args(number):
            factor, size = term.as_coeff_Mul()
            if isinstance(size, sympy.Abs):
                rest, inner = number - term, factor * size.args[0]
                signs = [self._at_least(sympy.expand(rest + inner)), self._at_least(sympy.expand(rest - inner))]
                return (both if factor < 0 else either)(self.bounds, *signs)
        return AtLeast(number)

    def _compared(self, node: fx.Node, index: Index) -> Formula:
        kind = str(node.target).split(".")[1]
        left, right = node.args
        sides = [operand for operand in (left, right) if isinstance(operand, fx.Node)]
        if kind in ("eq", "ne") and all(ir.only_tensor(side).dtype == torch.bool for side in sides if _is_tensor(side)):
            raise OpaqueError(node)
        try:
            return self.compare(kind, self.operand(node, left, index), self.operand(node, right, index))
        except OpaqueError:
            return Element(node, index)

    # ------------------------------------------------------------------------------ where elements go
    def _source(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """The tensor and index that an op without arithmetic has an element from."""
        rule = self._rules.places.get(node.target)
        return None if rule is None else rule(self, node, index)


def _held(node: fx.Node, cases: Cases) -> Cases:
    """Numbers as their dtype holds them: positions need the 24 bits of float32, or whole numbers of 32."""
    dtype = ir.only_tensor(node).dtype
    holds_positions = dtype in (torch.int64, torch.int32, torch.float32, torch.float64)
    if holds_positions or all(value in (0, 1, -1, sympy.oo) or value <= LOWEST_OF_HALF for _, value in cases):
        return cases
    raise OpaqueError(node)


def _is_tensor(node: fx.Node) -> bool:
    return ir.tensor_of(node) is not None


def _exact(number: bool | int | float) -> sympy.Expr:
    if isinstance(number, float):
        if math.isnan(number):
            raise OpaqueError(number)
        if math.isinf(number):
            return sympy.oo if number > 0 else -sympy.oo
        if number == int(number):
            return sympy.Integer(int(number))
        raise OpaqueError(number)
    return sympy.Integer(int(number))


def constant(node: fx.Node) -> bool | int | float | None:
    """What a tensor is filled with."""
    fill = book.entry(node).fill
    value = node.args[int(fill[3:])] if isinstance(fill, str) else fill
    return value if isinstance(value, (bool, int, float)) else None


def broadcast(operand: Anything, index: Index) -> Index:
    """The index into a broadcast operand: aligned at the last dim; 0 where it has one."""
    if not isinstance(operand, fx.Node) or ir.tensor_of(operand) is None:
        return ()
    shape = shape_of(operand)
    rest = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if ir.expr_of(size) == 1 else at for size, at in zip(shape, rest, strict=True))
