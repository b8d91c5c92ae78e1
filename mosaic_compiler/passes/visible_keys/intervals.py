"""Which keys a query sees: a run of them, from a first to before a last one, expressions of the query's position.

k <= q                     [0, q + 1)            causal
k // 32 <= q // 32         [0, 32 (q // 32) + 32)   block-causal
|q - k| <= 8               [q - 8, q + 9)        a window
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.compat.symbols import FloorDiv, Max, Min
from mosaic_compiler.passes.visible_keys.arithmetic import elements_of
from mosaic_compiler.passes.visible_keys.elements import LOWEST_OF_HALF
from mosaic_compiler.passes.visible_keys.formulas import (
    All,
    Any,
    AtLeast,
    Bounds,
    Element,
    Formula,
    OpaqueError,
    both,
    negated,
)
from mosaic_compiler.planning.reach import QUERY

ENTRY, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("entry", "key"))


@dataclass(frozen=True)
class Visibility:
    """What a query sees.

    Attributes:
        first, last: the run of keys [first, last), of ``QUERY`` and sizes; they may reach beyond the keys.  ``None``:
            from the first key on, to the last one.
        only: of those keys, the ones that count: elements of boolean tensors, by entry and key.
    """

    first: sympy.Expr | None = None
    last: sympy.Expr | None = None
    only: tuple[Element, ...] = ()

    @property
    def sees_all(self) -> bool:
        """Nothing is hidden."""
        return self.first is None and self.last is None and not self.only

    def __str__(self) -> str:
        return f"[{self.first or 0}, {self.last or 'all'})"


def bounds_for(queries: sympy.Expr, keys: sympy.Expr, entries: sympy.Expr) -> Bounds:
    """What positions of an attention can be."""
    return Bounds({QUERY: queries, KEY: keys, ENTRY: entries})


def visibility_of(mask: fx.Node, queries: sympy.Expr, keys: sympy.Expr, entries: sympy.Expr) -> Visibility:
    """What a mask [entries, heads, queries, keys] (each may be 1, or left out in front) lets a query see.

    Args:
        mask: True, or as a number 0, where a query sees a key; False, or -inf, where it does not.

    A mask that adds the lowest numbers instead of -inf hides as well, where each query sees something (if it does not,
    for padding, nobody reads it).

    Raises:
        OpaqueError: if that is no run of keys.
    """
    is_strict = True
    tensor = ir.only_tensor(mask)
    bounds = bounds_for(queries, keys, entries)
    elements = elements_of(bounds)
    heads = sympy.Symbol("head", integer=True, nonnegative=True)
    index = tuple(
        sympy.Integer(0) if ir.expr_of(size) == 1 else at
        for size, at in zip(tensor.shape, (ENTRY, heads, QUERY, KEY)[4 - tensor.dim() :], strict=True)
    )
    if tensor.dtype.is_floating_point:
        seen: list[Formula] = []
        for condition, value in elements.number(mask, index):
            if value == 0:
                seen.append(condition)
            elif value.is_number and value <= LOWEST_OF_HALF:
                is_strict &= bool(value == -sympy.oo)
            else:
                raise OpaqueError(mask)
        formula = negated(both(bounds, *(negated(condition) for condition in seen)))
    else:
        formula = elements.truth(mask, index)
    found = interval_of(formula, bounds, keys)
    if not is_strict and not found.only and not _sees_itself(found, bounds, queries, keys):
        raise OpaqueError(mask)
    return found


def _sees_itself(found: Visibility, bounds: Bounds, queries: sympy.Expr, keys: sympy.Expr) -> bool:
    is_after = found.first is None or bounds.is_positive_or_zero(QUERY - found.first)
    return is_after and (found.last is None or bounds.is_positive_or_zero(found.last - 1 - QUERY)) and queries == keys


def interval_of(formula: Formula, bounds: Bounds, keys: sympy.Expr) -> Visibility:
    """The run of keys for which a condition holds.

    Raises:
        OpaqueError: if that is none.
    """
    found = Visibility()
    for part in formula.parts if isinstance(formula, All) else (formula,):
        if isinstance(part, AtLeast):
            found = _crossed(found, _solved(part.number), bounds)
        elif isinstance(part, Element):
            if not set().union(*(at.free_symbols for at in part.index)) <= {ENTRY, KEY}:
                raise OpaqueError(part)
            found = _crossed(found, Visibility(only=(part,)), bounds)
        elif isinstance(part, Any):
            found = _crossed(found, _union([interval_of(each, bounds, keys) for each in part.parts], bounds), bounds)
        else:
            raise OpaqueError(part)
    if found.first is not None and bounds.is_positive_or_zero(-found.first):
        found = replace(found, first=None)
    if found.last is not None and bounds.is_positive_or_zero(found.last - keys):
        found = replace(found, last=None)
    return found


def _crossed(one: Visibility, other: Visibility, bounds: Bounds) -> Visibility:
    """The keys of both."""
    first = _extreme(Max, one.first, other.first, bounds)
    return Visibility(first, _extreme(Min, one.last, other.last, bounds), (*one.only, *other.only))


def _extreme(kind: type, a: sympy.Expr | None, b: sympy.Expr | None, bounds: Bounds) -> sympy.Expr | None:
    """The larger (or smaller) of two, where there are two, as simple as it is known to be."""
    if a is None or b is None:
        return b if a is None else a
    if bounds.is_positive_or_zero(a - b):
        return a if kind is Max else b
    if bounds.is_positive_or_zero(b - a):
        return b if kind is Max else a
    return kind(a, b)


def _solved(number: sympy.Expr) -> Visibility:
    """For which keys a number is at least 0.

    Raises:
        OpaqueError: for what is not a key, or a share of it, times a number, and the rest.
    """
    with_key = [term for term in sympy.Add.make_args(sympy.expand(number)) if KEY in term.free_symbols]
    if len(with_key) != 1:
        raise OpaqueError(number)
    factor, term = with_key[0].as_coeff_Mul()
    rest = sympy.expand(number - with_key[0])
    if not factor.is_Integer:
        raise OpaqueError(number)
    share, inner = sympy.Integer(1), term
    if isinstance(term, FloorDiv) and term.args[1].is_Integer and term.args[1] > 0:
        inner, share = term.args
    offset = sympy.expand(inner - KEY)
    if KEY in offset.free_symbols:
        raise OpaqueError(number)
    if factor > 0:  # term >= -rest / factor
        least = -_floored(rest, factor)
        return Visibility(first=sympy.expand(share * least - offset))
    most = _floored(rest, -factor)  # term <= rest / -factor
    return Visibility(last=sympy.expand(share * most + share - offset))


def _floored(number: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    return number if divisor == 1 else FloorDiv(number, divisor)


def _union(parts: Sequence[Visibility], bounds: Bounds) -> Visibility:
    """Runs that begin, or end, together."""
    if not parts or any(part.only for part in parts):  # nothing is seen at all, or what only the data knows
        raise OpaqueError(parts)
    if all(part.first is None for part in parts):
        ends = [part.last for part in parts]
        return Visibility(last=None if None in ends else _joined(Max, ends, bounds))
    if all(part.last is None for part in parts):
        begins = [part.first for part in parts]
        return Visibility(first=None if None in begins else _joined(Min, begins, bounds))
    raise OpaqueError(parts)


def _joined(kind: type, numbers: Sequence[sympy.Expr | None], bounds: Bounds) -> sympy.Expr | None:
    return functools.reduce(lambda a, b: _extreme(kind, a, b, bounds), numbers)
