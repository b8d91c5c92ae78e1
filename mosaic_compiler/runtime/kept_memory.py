"""Memory that outlives a step: tensors with addresses of their own, which no plan and no other step touches."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from mosaic_compiler.planning.buffers import stacked
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.lowered import TensorFacts
from mosaic_compiler.runtime.link import object_of
from mosaic_compiler.runtime.pools import new_arena


class KeptMemory:
    """Tensors of some layouts, for one set of sizes; given back with this object.

    Args:
        facts: their dtypes, sizes and strides, in symbols.

    Attributes:
        tensors: one for each; none before :meth:`map`.
        nbytes: of all.
        symbols: those that sizes depend on.
    """

    def __init__(self, facts: Sequence[TensorFacts], device: torch.device) -> None:
        self._facts = facts
        numbers = [number for each in facts for number in (*each.shape, *each.strides)]
        self.symbols = sorted({symbol for number in numbers for symbol in number.free_symbols}, key=str)
        self.tensors: list[Tensor] = []
        self.nbytes = self._total = 0
        self.arena = new_arena(device)
        self._finalizer = weakref.finalize(self, self.arena.release)
        self._finalizer.atexit = False

    def layouts(self, sizes: Sizes) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Dtype, sizes and strides of each."""
        return [(each.dtype, tuple(map(sizes, each.shape)), tuple(map(sizes, each.strides))) for each in self._facts]

    def holds(self, layouts: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> bool:
        """There are tensors of such layouts."""
        return list(layouts) == [(str(t.dtype), tuple(t.shape), t.stride()) for t in self.tensors]

    @torch.inference_mode(False)
    def map(self, sizes: Sizes) -> None:
        """Memory and tensors for these sizes: those that there are, if they have them, else others."""
        if self.holds(self.layouts(sizes)):
            self.arena.ensure(self._total)
            self.nbytes = self._total
            return
        layouts = [(object_of(dtype), shape, strides) for dtype, shape, strides in self.layouts(sizes)]
        nbytes = [
            dtype.itemsize * (1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)))
            for dtype, shape, strides in layouts
        ]
        offsets, total = stacked(nbytes)
        self.arena.ensure(total)
        self.tensors = [
            self.arena.tensor(at, dtype, shape, strides, at + size)
            for at, size, (dtype, shape, strides) in zip(offsets, nbytes, layouts, strict=True)
        ]
        self.nbytes = self._total = total

    def lend(self) -> bool:
        """Give the memory back until :meth:`map`, with what is in it.  Whether the tensors stay, at their addresses."""
        self.arena.release()
        self.nbytes = 0
        if self.arena.moves:
            self.tensors = []
        return not self.arena.moves

    def fill(self, byte: int) -> None:
        """Every byte of it."""
        self.arena.fill(0, self.nbytes, byte)

    def forget(self) -> None:
        """There are no tensors; the memory stays until others are there, or it is given back."""
        self.tensors, self.nbytes = [], 0

    def release(self) -> None:
        """Give the memory back."""
        self.forget()
        self.arena.release()
