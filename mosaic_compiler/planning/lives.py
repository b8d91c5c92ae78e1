"""Lives as data: what planning has to know of a step.  No graph, no tensors; it can be pickled, and needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import sympy
from sympy.logic.boolalg import Boolean

from mosaic_compiler.planning.buffers import Buffer


class Sizes:
    """Evaluates size expressions for one binding of the symbols, remembering every result.

    Raises :class:`KeyError` naming the symbol if an expression has one that is not bound.
    """

    def __init__(self, symbols: Mapping[sympy.Symbol, int]) -> None:
        self.symbols = dict(symbols)
        self._known: dict[sympy.Expr, int] = {}

    def __call__(self, size: object) -> int:
        if type(size) is int:
            return size
        expr = size if isinstance(size, sympy.Basic) else sympy.sympify(size)  # a SymInt is its expression
        known = self._known.get(expr)
        if known is None:
            missing = expr.free_symbols - self.symbols.keys()
            if missing:
                raise KeyError(f"size {expr} needs {', '.join(sorted(map(str, missing)))}")
            value = expr.xreplace({s: sympy.Integer(v) for s, v in self.symbols.items()})
            known = self._known[expr] = int(bool(value)) if isinstance(value, Boolean) else int(value)
        return known


@dataclass(frozen=True)
class SymbolicBuffer:
    """A buffer whose bytes and shape are still expressions; fields as of :class:`buffers.Buffer`."""

    name: str
    space: str
    nbytes: sympy.Expr
    start: int
    end: int
    dtype: str
    shape: tuple[sympy.Expr, ...]
    op: str
    module: str
    source: str
    loop: str = ""
    """The call of a loop that it is local to."""
    term: str = "step"

    def sized(self, nbytes: int, shape: tuple[int, ...], offset: int | None = None) -> Buffer:
        """This with numbers for its expressions."""
        return Buffer(
            self.name, self.space, nbytes, self.start, self.end, self.dtype, shape, self.op, self.module, self.source,
            offset, self.term,
        )  # fmt: skip


@dataclass(frozen=True)
class LoopLives:
    """One call of a loop.

    Attributes:
        chunk, rows: the symbol of its chunk size, and how many rows it goes over.
        start, end: schedule positions of its body.
        work: multiplications of one row with the weights of its matmuls.
        name, ops, operands, module, source: see :class:`plan.PlannedLoop`.
    """

    name: str
    chunk: sympy.Symbol
    rows: sympy.Expr
    start: int
    end: int
    work: int
    ops: tuple[str, ...]
    operands: tuple[str, ...]
    module: str
    source: str


@dataclass(frozen=True)
class StepLives:
    """Lives of every buffer of a step, before any number is known.

    Attributes:
        buffers: one per storage the step creates, plus one per op with scratch.
        given: inputs and weights, which live from before the step until behind it.
        schedule: node names by position; nodes of a loop's body as ``loop.node``.
        device_type: ``cpu`` or ``cuda``.
        regions: the calls of loops, in schedule order.
    """

    buffers: tuple[SymbolicBuffer, ...]
    given: tuple[SymbolicBuffer, ...]
    schedule: tuple[str, ...]
    device_type: str
    regions: tuple[LoopLives, ...]

    @cached_property
    def chunks(self) -> dict[sympy.Symbol, sympy.Expr]:
        """The chunk-size symbols, with the number of rows that their loops go over."""
        return {region.chunk: region.rows for region in self.regions}

    @cached_property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The symbols that buffer sizes depend on, by name; chunk sizes are not among them."""
        found: set[sympy.Symbol] = set()
        for buffer in self.buffers:
            found |= buffer.nbytes.free_symbols
            for size in buffer.shape:
                found |= size.free_symbols
        for rows in self.chunks.values():
            found |= rows.free_symbols
        return tuple(sorted(found - self.chunks.keys(), key=str))

    def at(self, sizes: Sizes, offsets: Mapping[str, int] = MappingProxyType({})) -> tuple[Buffer, ...]:
        """The step's own buffers with their bytes, in order of birth.  Chunk sizes that are not given are all rows."""
        given = sizes.symbols
        missing = {chunk: sizes(rows) for chunk, rows in self.chunks.items() if chunk not in given}
        if missing:
            sizes = Sizes(given | missing)
        values = [sizes(expr) for expr in self._table[0]]
        return tuple(
            b.sized(values[nbytes], tuple([values[i] for i in shape]), offsets.get(b.name))
            for b, nbytes, shape in self._table[1]
        )

    def data(self) -> StepLives:
        """This alone, without what a subclass has."""
        return StepLives(self.buffers, self.given, self.schedule, self.device_type, self.regions)

    def given_at(self, sizes: Sizes) -> tuple[Buffer, ...]:
        """Inputs and weights with concrete bytes."""
        return (*self._fixed_given, *(b.sized(sizes(b.nbytes), tuple(map(sizes, b.shape))) for b in self._sized_given))

    @cached_property
    def _sized_given(self) -> tuple[SymbolicBuffer, ...]:
        return tuple(b for b in self.given if b.nbytes.free_symbols or any(size.free_symbols for size in b.shape))

    @cached_property
    def _fixed_given(self) -> tuple[Buffer, ...]:
        """Those whose sizes are numbers (weights), made once."""
        sized, none = set(self._sized_given), Sizes({})
        return tuple(b.sized(none(b.nbytes), tuple(map(none, b.shape))) for b in self.given if b not in sized)

    @cached_property
    def _table(self) -> tuple[list[sympy.Expr], list[tuple[SymbolicBuffer, int, tuple[int, ...]]]]:
        """Every different size once, and the buffers in order of birth with the positions of their sizes."""
        index: dict[sympy.Expr, int] = {}

        def position(expr: sympy.Expr) -> int:
            return index.setdefault(expr, len(index))

        ordered = sorted(self.buffers, key=lambda b: (b.start, b.end, b.name))
        rows = [(b, position(b.nbytes), tuple(position(size) for size in b.shape)) for b in ordered]
        return list(index), rows
