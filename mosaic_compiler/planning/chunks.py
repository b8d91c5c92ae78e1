"""The chunk-size search: the largest chunks whose plan fits a byte budget, and none where it fits without.

Sizes of a loop's own buffers are linear in its chunk size c: ``bytes = A + B c`` (A, B from the other sizes).  So the
live bytes of the whole step are a few additions for any choice of chunk sizes, and the search needs no placement:

1. all loops unchunked; stop if that fits ("lazy");
2. every loop whose own positions exceed the budget gets the largest chunk with which they do not;
3. arena and memory outside of it have their worst moments at different positions: while their sum exceeds the budget,
   one of the loops that hold them gets smaller chunks: enough of them at once, or bit by bit, in turns (both are
   tried, and the one that loses less time is taken);
4. every loop goes up again as far as the budget lets it, the one that gains most time first.

The time that a loop loses to chunks is predicted from its matmuls and from how their rate depends on the number of
rows (:data:`HALF_RATE`).

Chunk sizes are such that the chunks of a loop are of about the same size: rows / 1, rows / 2, ..., rounded up to 128,
then 64, 32, ..., 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import sympy
from numpy.typing import NDArray

from mosaic_compiler.planning.buffers import ALIGNMENT, ON_DEVICE
from mosaic_compiler.planning.lives import Sizes, StepLives

UNIT = 128

HALF_RATE = {"cuda": 280, "cpu": 20}
"""Rows at which a matmul runs at half of its best rate: rate(c) ~ c / (c + half).  Measured: H100, bf16, [c, 4096] x
[4096, 12288]: 357 TFLOP/s at 256 rows, 572 at 1,024, 686 at 4,096, 726 at 8,192; CPU (2 cores, AVX-512), float32,
[c, 1024] x [1024, 4096]: 81 GFLOP/s at 8 rows, 166 at 32, 218 at 128, 261 at 4,096."""


FINE = 512
"""Numbers of chunks up to which each is tried; beyond, they grow by 1 %."""


def _steps(most: int) -> int:
    return max(math.ceil(math.log(most / FINE) / math.log(1.01)) + 1, 0) if most > FINE else 0


@functools.lru_cache(maxsize=64)
def candidates(rows: int) -> tuple[int, ...]:
    """Chunk sizes worth trying for a loop over ``rows`` rows, the largest first.

    candidates(1000) == (1000, 512, 384, 256, 128, 64, 32, 16, 8, 4, 2, 1)
    """
    most = rows // UNIT + 1
    counts = {*range(2, min(most, FINE) + 1), *(round(FINE * 1.01**step) for step in range(_steps(most)))}
    even = {-(-rows // count // UNIT) * UNIT for count in counts if count <= most}
    small = {UNIT >> shift for shift in range(1, UNIT.bit_length())}
    return (rows, *sorted((size for size in even | small if size < rows), reverse=True))


@dataclass(frozen=True)
class Choice:
    """Chunk sizes by symbol, and why each is what it is."""

    rows: Mapping[sympy.Symbol, int]
    reasons: Mapping[sympy.Symbol, str]


@dataclass(frozen=True)
class Shortfall:
    """A budget that no chunk sizes meet.

    Attributes:
        needed: bytes with the smallest chunks.
        position: schedule position of the worst moment.
    """

    needed: int
    position: int


class ChunkModel:
    """Live bytes of one graph's step as a function of its chunk sizes.  Made once per graph."""

    def __init__(self, lives: StepLives) -> None:
        self.lives = lives
        self.positions = len(lives.schedule)
        chunks = set(lives.chunks)
        self._index: dict[sympy.Expr, int] = {}
        kept = self.kept = [b for b in lives.buffers if b.term != "call" and b.space in ON_DEVICE]
        sizes = [self._index.setdefault(b.nbytes, len(self._index)) for b in kept]
        self._size_of = np.array(sizes, dtype=np.int64)
        self._starts = np.array([b.start for b in kept], dtype=np.int64)
        self._ends = np.array([b.end for b in kept], dtype=np.int64)
        self._in_arena = np.array([b.space == "arena" for b in kept], dtype=np.bool_)
        self._terms = [_linear(expr, chunks) for expr in self._index]
        self._owner: list[sympy.Symbol | None] = [None] * self.positions
        for region in lives.regions:
            self._owner[region.start : region.end] = [region.chunk] * (region.end - region.start)
        self._of_symbol = {
            symbol: np.array([i for i, owner in enumerate(self._owner) if owner == symbol], dtype=np.int64)
            for symbol in chunks
        }
        self._half = HALF_RATE.get(lives.device_type, HALF_RATE["cuda"])
        self._work = dict.fromkeys(chunks, 0)
        for region in lives.regions:
            self._work[region.chunk] += region.work
        self._local = np.array([bool(b.loop) for b in kept], dtype=np.bool_)

    def at(self, sizes: Sizes) -> Evaluation:
        """The model with all sizes but the chunks' put in."""
        return Evaluation(self, sizes)


def _linear(expr: sympy.Expr, chunks: set[sympy.Symbol]) -> tuple[sympy.Expr, sympy.Symbol | None, sympy.Expr | None]:
    """``expr`` as (A, c, B) with expr == A + B c; (expr, c, None) if it is not linear in its chunk size c."""
    inside = expr.free_symbols & chunks
    if not inside:
        return expr, None, None
    (symbol,) = inside
    slope = sympy.expand(expr).coeff(symbol, 1)
    rest = sympy.expand(expr - slope * symbol)
    if rest.has(symbol) or slope.has(symbol):
        return expr, symbol, None
    return rest, symbol, slope


_Bytes: TypeAlias = "NDArray[np.int64]"
_Cost: TypeAlias = "Callable[[Mapping[sympy.Symbol, int], sympy.Symbol], int]"


class Evaluation:
    """Live bytes for one (N, M, ...) as a function of the chunk sizes."""

    def __init__(self, model: ChunkModel, sizes: Sizes) -> None:
        self.model, self.sizes = model, sizes
        self.rows = {symbol: sizes(rows) for symbol, rows in model.lives.chunks.items()}
        terms = model._terms
        self._symbols = list(self.rows)
        index = {symbol: i for i, symbol in enumerate(self._symbols)}
        self._base = np.array([sizes(a) if c is None or b is not None else 0 for a, c, b in terms], dtype=np.int64)
        self._slope = np.array([sizes(b) if b is not None else 0 for _, _, b in terms], dtype=np.int64)
        self._which = np.array([index[c] if c is not None else 0 for _, c, _ in terms], dtype=np.int64)
        self._odd = [(i, a, c) for i, (a, c, b) in enumerate(terms) if c is not None and b is None]

    def nbytes(self, chunks: Mapping[sympy.Symbol, int]) -> _Bytes:
        """Bytes of every buffer, rounded up as in a plan.  int64 [buffers]."""
        unique = self._base.copy()
        if self._symbols:
            values = np.array([chunks[symbol] for symbol in self._symbols], dtype=np.int64)
            unique = unique + self._slope * values[self._which]
        for i, expr, symbol in self._odd:
            unique[i] = Sizes(self.sizes.symbols | {symbol: chunks[symbol]})(expr)
        aligned: _Bytes = ((unique + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT)[self.model._size_of]
        return aligned

    def live(self, chunks: Mapping[sympy.Symbol, int]) -> tuple[_Bytes, _Bytes]:
        """Live bytes by position: in the arena, and outside of it.  Two int64 [positions]."""
        nbytes = self.nbytes(chunks)
        inside = nbytes * self.model._in_arena
        return self._timeline(inside), self._timeline(nbytes - inside)

    def _timeline(self, nbytes: _Bytes) -> _Bytes:
        model = self.model
        change = np.zeros(model.positions + 1, dtype=np.int64)
        np.add.at(change, model._starts, nbytes)
        np.subtract.at(change, model._ends, nbytes)
        timeline: _Bytes = change.cumsum()[:-1]
        return timeline

    def peak(self, chunks: Mapping[sympy.Symbol, int]) -> int:
        """Most bytes in the arena plus most bytes outside: what a plan at the lower bound needs."""
        inside, outside = self.live(chunks)
        return int(inside.max()) + int(outside.max()) if self.model.positions else 0

    def outside(self, chunks: Mapping[sympy.Symbol, int]) -> int:
        """Most bytes live outside of the arena."""
        return int(self.live(chunks)[1].max()) if self.model.positions else 0

    def smallest(self) -> dict[sympy.Symbol, int]:
        return {symbol: min(rows, 1) for symbol, rows in self.rows.items()}

    def local_bytes(self, chunks: Mapping[sympy.Symbol, int]) -> dict[sympy.Symbol, int]:
        """Most bytes that the chunk-sized buffers of a loop hold at once, by the loop's symbol."""
        timeline = self._timeline(self.nbytes(chunks) * self.model._local)
        return {symbol: int(timeline[at].max()) if len(at) else 0 for symbol, at in self.model._of_symbol.items()}

    # ----------------------------------------------------------------------------------------- search
    def search(self, budget: int) -> Choice | Shortfall:
        """The largest chunks that fit (see the module docstring)."""
        chunks = dict(self.rows)
        if not self.model.positions or self.peak(chunks) <= budget:
            return Choice(chunks, dict.fromkeys(chunks, "fits without chunks"))
        if self.peak(self.smallest()) > budget:
            return self._shortfall()
        for symbol in chunks:
            chunks[symbol] = self._largest(symbol, chunks, budget, self._own_peak)
        ways = [self._within(chunks, budget, alone=alone) for alone in (True, False)]
        chunks = min(ways, key=lambda way: sum(self._lost(symbol, size) for symbol, size in way.items()))
        reasons = {
            symbol: f"{self._next_larger(symbol, size)} rows would exceed the budget"
            if size < self.rows[symbol]
            else "fits without chunks"
            for symbol, size in chunks.items()
        }
        return Choice(chunks, reasons)

    def _next_larger(self, symbol: sympy.Symbol, size: int) -> int:
        return min(option for option in candidates(self.rows[symbol]) if option > size)

    def _own_peak(self, chunks: Mapping[sympy.Symbol, int], symbol: sympy.Symbol) -> int:
        """Most bytes, in the arena and outside together, while loops with this chunk size run."""
        inside, outside = self.live(chunks)
        at = self.model._of_symbol[symbol]
        return int((inside + outside)[at].max()) if len(at) else 0

    def _largest(self, symbol: sympy.Symbol, chunks: Mapping[sympy.Symbol, int], budget: int, cost: _Cost) -> int:
        """The largest candidate whose cost is within the budget (bisection: costs grow with the chunk)."""
        options = candidates(self.rows[symbol])
        low, high = 0, len(options) - 1
        while low < high:
            middle = (low + high) // 2
            if cost({**chunks, symbol: options[middle]}, symbol) <= budget:
                high = middle
            else:
                low = middle + 1
        return options[low] if options else 0

    def _within(self, given: Mapping[sympy.Symbol, int], budget: int, *, alone: bool) -> dict[sympy.Symbol, int]:
        """Steps 3 and 4 of the search."""
        chunks = dict(given)
        while self.peak(chunks) > budget:
            symbol, chunks[symbol] = self._step_down(chunks, budget, alone=alone)
        for symbol in sorted(chunks, key=lambda s: -self._lost(s, chunks[s])):
            chunks[symbol] = self._largest(symbol, chunks, budget, lambda c, _: self.peak(c))
        return chunks

    def _step_down(self, chunks: Mapping[sympy.Symbol, int], budget: int, *, alone: bool) -> tuple[sympy.Symbol, int]:
        """Smaller chunks for one of the loops at the two worst moments: with ``alone`` those that meet the budget at
        the least loss of time, if one loop can meet it alone; else half of those that gain the most bytes."""
        inside, outside = self.live(chunks)
        owners = {self.model._owner[int(inside.argmax())], self.model._owner[int(outside.argmax())]}
        movable = [s for s in self.rows if s in owners and chunks[s] > 1] or [s for s in self.rows if chunks[s] > 1]
        enough = []
        for symbol in movable if alone else ():
            size = self._largest(symbol, chunks, budget, lambda c, _: self.peak(c))
            if self.peak({**chunks, symbol: size}) <= budget:
                enough.append(
                    (self._lost(symbol, size) - self._lost(symbol, chunks[symbol]), str(symbol), symbol, size)
                )
        if enough:
            return min(enough)[2:]
        halves = [(symbol, max(chunks[symbol] // 2, 1)) for symbol in movable]
        return min(halves, key=lambda half: self.peak({**chunks, half[0]: half[1]}))

    def _lost(self, symbol: sympy.Symbol, size: int) -> float:
        """Time that loops lose to chunks of this size, in multiplications at the best rate."""
        return self.model._work[symbol] * self.rows[symbol] * self.model._half / max(size, 1)

    def _shortfall(self) -> Shortfall:
        inside, outside = self.live(self.smallest())
        return Shortfall(self.peak(self.smallest()), int((inside + outside).argmax()))


def longest(model: ChunkModel, sizes: Sizes, tokens: Sequence[sympy.Symbol], main: sympy.Symbol, budget: int) -> int:
    """The largest value of ``main`` (the number of tokens) whose plan can fit the budget.

    The other ``tokens`` symbols (numbers of computed rows) grow in proportion.  0 if not even one token fits.
    """

    def fits(count: int) -> bool:
        return least(model, sizes, tokens, main, count) <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
        if high > 1 << 40:
            return low
    while high - low > max(low // 4096, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def least(model: ChunkModel, sizes: Sizes, tokens: Sequence[sympy.Symbol], main: sympy.Symbol, count: int) -> int:
    """Bytes that the smallest chunks need if ``main`` is ``count``; see :func:`longest`."""
    scaled = {symbol: -(-sizes(symbol) * count // max(sizes(main), 1)) for symbol in tokens}
    evaluation = model.at(Sizes(sizes.symbols | scaled | {main: count}))
    return evaluation.peak(evaluation.smallest())
