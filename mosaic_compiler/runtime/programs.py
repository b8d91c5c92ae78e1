"""The programs of one step, and which of them serves a call."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

from mosaic_compiler.kernels.fused import FusedKernel, compile_all
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.planner import Planned
from mosaic_compiler.planning.room import capacity, most_for, serves
from mosaic_compiler.runtime.link import LinkedStep
from mosaic_compiler.runtime.program import Program
from mosaic_compiler.runtime.prologue import Prologue

Place: TypeAlias = "tuple[int, int | None]"
"""An arena, and the budget that plans in it are made for."""

Key: TypeAlias = "tuple[Place, tuple[int, ...], tuple[int, ...], tuple[int, ...]]"
"""What a program is bound for: where it runs, sizes of inputs, room for computed rows, addresses of weights."""


@dataclass(frozen=True)
class Variant:
    """One graph of a step, with what planning and running have to know of it."""

    linked: LinkedStep

    @functools.cached_property
    def prologue(self) -> Prologue:
        """What runs before sizes are known."""
        return Prologue(self.linked)

    @functools.cached_property
    def _kernels(self) -> tuple[tuple[FusedKernel, frozenset[sympy.Expr]], ...]:
        """The kernels, with the elements that their tensors span; equal uses (of layers) once."""
        uses = ((use.kernel, use.spans) for use in self.linked.clusters)
        return tuple(dict.fromkeys(uses))

    def compile_kernels(self, sizes: Sizes) -> None:
        """Compile all kernels that a step of these sizes needs, unless that was done."""
        known = sizes.symbols.keys()  # other sizes are found in the step
        compile_all(
            (kernel, max((sizes(span) for span in spans if span.free_symbols <= known), default=0))
            for kernel, spans in self._kernels
        )


@dataclass(frozen=True)
class Bound:
    """A program, what it was bound for, and the weights (with their addresses) that it is bound to."""

    variant: Variant
    planned: Planned
    program: Program
    weights: list[tuple[weakref.ref[Any], int]]

    @property
    def is_stale(self) -> bool:
        """A weight was freed or moved."""
        return any((tensor := ref()) is None or tensor.data_ptr() != pointer for ref, pointer in self.weights)


class Programs(OrderedDict[Key, Bound]):
    """A step's programs by what they are bound for, the one that was used last at the end.

    Where fewer rows are needed in each step, new shapes in every step would cost more than some rows too many:
    libraries choose and load other kernels for each, and all that depends on the number would have to be bound again.
    What runs in chunks is planned for the rows that it needs, because fewer may do with larger chunks.

    Args:
        symbols: of the numbers of computed rows, as the prologue binds them.
    """

    def __init__(self, symbols: Sequence[sympy.Symbol] = ()) -> None:
        super().__init__()
        self.symbols = tuple(symbols)

    def room(self, place: Place, numbers: tuple[int, ...], pointers: tuple[int, ...]) -> Callable[[int, int], int]:
        """Says how many rows to compute for the symbol at a position where ``count`` are needed: as many as a program
        that computes some more, at most twice as many (or few), with room for at most twice as many, nothing in chunks;
        else just those."""

        def room(position: int, count: int) -> int:
            symbol, most = self.symbols[position], most_for(count)
            served = [
                bound.program.sizes(symbol)
                for key, bound in self._unchunked(place, numbers, pointers)
                if key[2][position] <= 2 * capacity(count)
            ]
            return min((rows for rows in served if count <= rows <= most), default=count)

        return room

    def serving(self, key: Key) -> Key:
        """The key of a program that has the room for this one, at most twice as much, and computes nothing in chunks;
        else the key itself."""
        if key in self:
            return key
        place, numbers, rooms, pointers = key
        for other, _ in self._unchunked(place, numbers, pointers):
            if all(serves(have, need) for need, have in zip(rooms, other[2], strict=True)):
                return other
        return key

    def _unchunked(
        self, place: Place, numbers: tuple[int, ...], pointers: tuple[int, ...]
    ) -> Iterator[tuple[Key, Bound]]:
        """Programs for any numbers of computed rows that compute nothing in chunks, the last used first."""
        for key, bound in reversed(self.items()):
            if (place, numbers, pointers) == (key[0], key[1], key[3]) and not bound.planned.is_chunked:
                yield key, bound

    def make_space(self, most: int) -> None:
        """For one more, where ``most`` are kept; stale ones go first, so that old weights are not kept in memory."""
        for key in [key for key, bound in self.items() if bound.is_stale]:
            del self[key]
        while len(self) >= most:
            self.popitem(last=False)
