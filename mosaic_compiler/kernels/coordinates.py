"""Sizes of a cluster in terms of those that can be read off its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy

from mosaic_compiler.planning.facts import Source


class Coordinates:
    """Sizes in terms of those that can be read, each of which gets a symbol of its own.

    A symbol of the graph is read where a size is a multiple of it.  Of ``p + n`` rows, of which nobody says what p
    and n are, the sum is a coordinate: ``128 * b * p + 128 * b * n`` is 128 times b times that.

    Args:
        readable: sizes that can be read, and where.
        sizes: those that are wanted.

    Attributes:
        readers: where the value of each symbol is read.
        missing: symbols of the graph in sizes that could not be expressed.
    """

    def __init__(self, readable: Mapping[sympy.Expr, Source], sizes: Iterable[sympy.Expr]) -> None:
        self.readers: dict[sympy.Symbol, Source] = {}
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self._compound: list[tuple[sympy.Expr, sympy.Symbol]] = []
        self._known: dict[sympy.Expr, sympy.Expr] = {}
        for expr, read in readable.items():
            factor, symbol = expr.as_coeff_Mul()
            if symbol.is_Symbol and symbol not in self._symbols and factor.is_Integer:
                self._symbols[symbol] = self._new(read.divided(int(factor)))
        for expr in sorted(readable, key=lambda expr: (len(expr.free_symbols), expr.count_ops())):
            reduced = self._in_compounds(expr)
            if self._unknown(reduced):
                self._compound.append((reduced, self._new(readable[expr])))
        self.missing = {symbol for size in sizes for symbol in self._unknown(self._in_compounds(size))}

    def of(self, size: sympy.Expr) -> sympy.Expr:
        """A size in the new symbols."""
        if size not in self._known:
            found = self._in_compounds(size).xreplace(self._symbols)
            self._known[size] = sympy.expand(found) if self._compound else found
        return self._known[size]

    def _new(self, read: Source) -> sympy.Symbol:
        symbol = sympy.Symbol(f"own{len(self.readers)}", integer=True, positive=True)
        self.readers[symbol] = read
        return symbol

    def _unknown(self, expr: sympy.Expr) -> set[sympy.Symbol]:
        return {symbol for symbol in expr.free_symbols if symbol not in self._symbols and symbol not in self.readers}

    def _in_compounds(self, expr: sympy.Expr) -> sympy.Expr:
        """With symbols for the compound sizes in it, as far as it is a polynomial in them."""
        for compound, symbol in self._compound:
            if not self._unknown(expr):
                break
            unknown = sorted(self._unknown(compound), key=str)
            try:
                quotient, rest = sympy.div(sympy.expand(expr), sympy.expand(compound), *unknown)
            except sympy.PolynomialError:  # a floor division, a minimum
                expr = expr.subs(compound, symbol)
                continue
            if quotient != 0 and all(number.is_Integer for number in quotient.atoms(sympy.Number)):
                expr = self._in_compounds(quotient) * symbol + rest
        return expr
