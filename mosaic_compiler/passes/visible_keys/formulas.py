"""Conditions on positions: what says whether a query sees a key, in symbols.

A :class:`Formula` is built from comparisons of whole numbers and from elements of tensors that only the data knows::

    k // 32 <= q // 32 and padding[b, k]      All((AtLeast(q // 32 - k // 32), Element(padding, (b, k))))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import sympy
from torch import fx

from mosaic_compiler.compat.symbols import FloorDiv


@dataclass(frozen=True)
class AtLeast:
    """A whole number is 0 or more."""

    number: sympy.Expr


@dataclass(frozen=True)
class Element:
    """An element of a boolean tensor, or its negation."""

    node: fx.Node
    index: tuple[sympy.Expr, ...]
    is_negated: bool = False


@dataclass(frozen=True)
class All:
    """Every one of the parts holds."""

    parts: tuple[Formula, ...] = ()


@dataclass(frozen=True)
class Any:
    """At least one of the parts holds."""

    parts: tuple[Formula, ...] = ()


Formula: TypeAlias = "AtLeast | Element | All | Any"
TRUE, FALSE = All(), Any()

Index: TypeAlias = "tuple[sympy.Expr, ...]"
Cases: TypeAlias = "tuple[tuple[Formula, sympy.Expr], ...]"
"""A number: of the conditions, exactly one holds."""


class OpaqueError(Exception):
    """Not arithmetic of positions."""


class Bounds:
    """What positions can be: from 0 to below a size.

    Args:
        sizes: of each position's dim.
    """

    def __init__(self, sizes: dict[sympy.Symbol, sympy.Expr]) -> None:
        self.sizes = sizes

    def is_positive_or_zero(self, number: sympy.Expr) -> bool:
        """Proven for all positions and sizes."""
        number = sympy.expand(number)
        return self._least(number, 4) or self._least(_without_quotients(number), 4)

    def _least(self, number: sympy.Expr, depth: int) -> bool:
        """Replace each term by its least value, until a number is left."""
        if number.is_number:
            return bool(number >= 0)
        if not depth:
            return False
        terms = _terms(number)
        positions = {term for _, term in terms if term in self.sizes or isinstance(term, FloorDiv)}
        total = sympy.Integer(0)
        for factor, term in terms:
            least, most = self._range(term) if term in positions or not positions else (term, term)
            bound = least if factor > 0 else most
            if bound is None:  # nothing is known
                return False
            total += factor * bound
        total = sympy.expand(total)
        return total != number and self._least(total, depth - 1)

    def _range(self, term: sympy.Expr) -> tuple[sympy.Expr | None, sympy.Expr | None]:
        """The least and the largest that are known."""
        if term == 1:
            return term, term
        if term in self.sizes:
            return sympy.Integer(0), self.sizes[term] - 1
        if isinstance(term, FloorDiv) and term.args[1].is_Integer and term.args[1] > 0:
            inner, divisor = term.args
            return FloorDiv(self._end(inner, 0), divisor), FloorDiv(self._end(inner, 1), divisor)
        factors = sympy.Mul.make_args(term)
        if not all(factor.is_Symbol and factor.is_nonnegative for factor in factors):
            return None, None
        return sympy.Integer(all(factor.is_positive for factor in factors)), None  # sizes, perhaps times positions

    def _end(self, number: sympy.Expr, which: int) -> sympy.Expr:
        """The least (0) or largest (1) value of a sum, in sizes; itself where that is not known."""
        total = sympy.Integer(0)
        for factor, term in _terms(sympy.expand(number)):
            if term in self.sizes:
                term = sympy.Integer(0) if (factor > 0) == (which == 0) else self.sizes[term] - 1
            total += factor * term
        return total


def _without_quotients(number: sympy.Expr) -> sympy.Expr:
    """No more than a number: x - b + 1 <= b (x // b) <= x."""
    total = sympy.Integer(0)
    for factor, term in _terms(number):
        if isinstance(term, FloorDiv) and term.args[1].is_Integer and term.args[1] > 0 and factor % term.args[1] == 0:
            inner, divisor = term.args
            share = factor / divisor
            total += share * (inner if factor < 0 else inner - divisor + 1)
        else:
            total += factor * term
    return sympy.expand(total)


def _terms(number: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """Factors and terms of a sum."""
    return [term.as_coeff_Mul() for term in sympy.Add.make_args(number)]


def both(bounds: Bounds, *parts: Formula) -> Formula:
    """All of them, without what is known."""
    found: list[Formula] = []
    for part in parts:
        for each in part.parts if isinstance(part, All) else (part,):
            each = known(bounds, each)
            if each == FALSE:
                return FALSE
            if each not in found and each != TRUE:
                found.append(each)
    return found[0] if len(found) == 1 else All(tuple(found))


def either(bounds: Bounds, *parts: Formula) -> Formula:
    """Any of them."""
    return negated(both(bounds, *(negated(part) for part in parts)))


def negated(formula: Formula) -> Formula:
    """Its contrary."""
    if isinstance(formula, AtLeast):
        return AtLeast(-formula.number - 1)
    if isinstance(formula, Element):
        return Element(formula.node, formula.index, not formula.is_negated)
    turned = tuple(negated(part) for part in formula.parts)
    return Any(turned) if isinstance(formula, All) else All(turned)


def known(bounds: Bounds, formula: Formula) -> Formula:
    """TRUE or FALSE where that is proven for all positions and sizes; else itself."""
    if isinstance(formula, AtLeast):
        if bounds.is_positive_or_zero(formula.number):
            return TRUE
        if bounds.is_positive_or_zero(-formula.number - 1):
            return FALSE
    return formula
