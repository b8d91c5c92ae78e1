"""The last rows of keys and values as they are computed, beside codes of all rows.

What is newest counts most, and takes little: a text's end is kept exactly, and what is before it in fewer bits (KIVI,
arXiv 2402.02750, calls their number the residual length).  One row more is kept than is read: rows that a step computes
elsewhere are written there, so that no write needs a condition.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book import rows
from mosaic_compiler.compat.symbols import new_number
from mosaic_compiler.ir.emitter import SizeEmitter
from mosaic_compiler.passes.state.attended import reading_codes
from mosaic_compiler.passes.state.coding import Coding
from mosaic_compiler.passes.state.cut import Cut
from mosaic_compiler.passes.state.places import add_state

aten = torch.ops.aten

_HINT = 41
"""An example of a number of rows; a prime, so that no other size is equal to it by accident."""


def residual_in(cut: Cut, precision: str | None, codings: Mapping[fx.Node, Coding]) -> list[fx.Node]:
    """Kept values that attentions read codes of."""
    found = {part for each in reading_codes(cut, precision, codings).values() for part in each.parts}
    return [value for value in cut.values if value in found]


def residual_nbytes(values: Sequence[fx.Node], count: int) -> sympy.Expr:
    """Bytes of so many last rows of them, and of the one that is not read."""
    found = sympy.Integer(0)
    for value in values:
        entries, heads, length, depth = map(ir.expr_of, rows.shape_of(value))
        found += entries * heads * sympy.Min(count + 1, length) * depth * ir.only_tensor(value).dtype.itemsize
    return found


class Residual:
    """Inputs for that memory, [E, G, T, d] each, and the positions N - T, ..., N - 1 of its rows.

    Args:
        values: [E, G, N, d], those that codes are read of.
        before: inputs of that kind that are there.

    Attributes:
        indices: which inputs they are, in order.
    """

    def __init__(self, emitter: SizeEmitter, values: Sequence[fx.Node], before: int) -> None:
        assert values
        self._emitter, self.values = emitter, list(values)
        _, number = new_number(emitter.mode.shape_env, "residual_rows", _HINT)
        self.indices: list[int] = []
        self._last: dict[fx.Node, fx.Node] = {}
        self._places: fx.Node | None = None
        self._both: tuple[fx.Node, fx.Node] | None = None
        for value in self.values:
            emitter.origin, tensor = value, ir.only_tensor(value)
            like = emitter.bare(aten.empty.memory_format, [])
            with emitter.mode:
                like.meta["val"] = tensor.new_empty([*tensor.shape[:2], number, tensor.shape[3]])
            self.indices.append(add_state(emitter, like, before + len(self.indices)))
            emitter.graph.erase_node(like)
        placeholders = emitter.graph.find_nodes(op="placeholder")
        self.memory = {value: placeholders[at] for value, at in zip(self.values, self.indices, strict=True)}
        with emitter.graph.inserting_before(emitter.front):
            self._count = emitter.emit(aten.sym_size.int, placeholders[self.indices[0]], 2)
            emitter.know(number, self._count)
            length = emitter.size(ir.expr_of(rows.shape_of(self.values[0])[2]))
            self._begin = emitter.arithmetic(operator.sub, length, self._count)

    def rows_of(self, value: fx.Node) -> fx.Node:
        """The last rows of a value that is there."""
        emit = self._emitter.emit
        return emit(aten.index_select.default, value, 2, self._positions(0))

    def _positions(self, skipped: int) -> fx.Node:
        """int64 [T - skipped], of all rows but the first ones."""
        emitter = self._emitter
        with emitter.graph.inserting_before(emitter.front):
            count = emitter.arithmetic(operator.sub, self._count, skipped) if skipped else self._count
            device = ir.only_tensor(self.values[0]).device
            first = emitter.arithmetic(operator.add, self._begin, skipped) if skipped else self._begin
            counted = emitter.emit(aten.arange.default, count, device=device, pin_memory=False)
            return emitter.emit(aten.add.Tensor, counted, first)

    def write(self, value: fx.Node, computed: fx.Node, given: fx.Node, put: Callable[..., fx.Node]) -> None:
        """Computed rows [E, G, C, d], those of numbers ``given`` [E, C], into the memory of a value, if it has some."""
        if value not in self.memory:
            return
        emitter = self._emitter
        if self._places is None:
            with emitter.graph.inserting_before(emitter.front):
                found = emitter.emit(aten.sub.Tensor, given, self._begin)
                found = emitter.emit(aten.clamp_min.default, found, 0)  # elsewhere: row 0, which is not read
                self._places = emitter.emit(aten.unsqueeze.default, found, 1)
        entries, heads = (emitter.size(ir.expr_of(size)) for size in rows.shape_of(value)[:2])
        self._last[value] = put(self.memory[value], self._places, computed, entries, heads)

    def read(
        self, values: Sequence[fx.Node], computed: Sequence[fx.Node], given: fx.Node
    ) -> tuple[list[fx.Node], fx.Node]:
        """Rows of the memory and computed ones together, [E, G, T - 1 + C, d] of each value, and their numbers, int64
        [E, T - 1 + C], ascending (a row that is both comes twice)."""
        emitter = self._emitter
        emit = emitter.emit
        if self._both is None:
            with emitter.graph.inserting_before(emitter.front):
                entries = emitter.size(ir.expr_of(rows.shape_of(given)[0]))
                every = emit(aten.expand.default, self._positions(1), [entries, -1])
                both = emit(aten.sort.default, emit(aten.cat.default, [every, given], 1), 1)
                self._both = emitter.emit_getitem(both, 0), emitter.emit_getitem(both, 1)
        numbers, order = self._both
        found = []
        for value, new in zip(values, computed, strict=True):
            sizes = [emitter.size(ir.expr_of(size)) for size in rows.shape_of(value)]
            kept = emit(aten.slice.Tensor, self._last[value], 2, 1, self._count)
            together = emit(aten.cat.default, [kept, new], 2)
            wide = emit(aten.unsqueeze.default, emit(aten.unsqueeze.default, order, 1), 3)
            wide = emit(aten.expand.default, wide, [sizes[0], sizes[1], -1, sizes[3]])
            found.append(emit(aten.gather.default, together, 2, wide))
        return found, numbers
