"""Bound chunk loops: the body once for a full chunk, once for the remainder, and cursors that move over the rows.

All buffers of a body stay where they are.  What moves from chunk to chunk are slices of full-length tensors: each
is one tensor object, bound into the body's calls, whose storage offset is set anew before an iteration.  A loop whose
rows fit into one chunk is just its body's calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mosaic_compiler import ir
from mosaic_compiler.book import Call
from mosaic_compiler.compat.tensors import with_lazy_bits
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.lowered import Kind, Root
from mosaic_compiler.runtime.binder import Binder, Shared
from mosaic_compiler.runtime.instructions import Instruction, bound_call, drop
from mosaic_compiler.runtime.link import Linked


def bind_loop(
    name: str, operands: Sequence[Any], results: Sequence[Any], sizes: Sizes, shared: Shared
) -> list[Instruction]:
    """The calls of one loop.

    Args:
        name: of the op that calls it.
        operands: bound values of the call's operands: tensors, slots, numbers.
        results: its full-length results (tensors over the arena, or slots).
        sizes: all symbols, the chunk size included.
    """
    loop = shared.step.loop(name)
    rows = sizes(loop.rows)
    if not rows:
        return []
    chunk = min(sizes(loop.chunk), rows)
    rest = rows % chunk
    whole = _BodyBinder(name, operands, results, sizes, shared, chunk, start=0, moves=rows > chunk)
    whole.bind()
    if rows == chunk:
        return whole.instructions
    calls: list[Instruction] = [functools.partial(_run, whole.instructions, whole.move, range(0, rows - rest, chunk))]
    if rest:
        last = _BodyBinder(name, operands, results, sizes, shared, rest, start=rows - rest, moves=False)
        last.bind()
        calls += last.instructions
    return calls


def _run(instructions: list[Instruction], move: Callable[[int], None], starts: range) -> None:
    for start in starts:
        move(start)
        for instruction in instructions:
            instruction()


@dataclass
class _Cursor:
    """A tensor that looks at the current chunk of a longer one."""

    tensor: torch.Tensor
    storage: torch.UntypedStorage
    offset: int
    step: int  # elements per row
    shape: torch.Size
    stride: tuple[int, ...]


class _BodyBinder(Binder):
    """Binds a loop's body for ``count`` rows from ``start`` on; with ``moves``, for any start."""

    def __init__(
        self,
        name: str,
        operands: Sequence[Any],
        results: Sequence[Any],
        sizes: Sizes,
        shared: Shared,
        count: int,
        *,
        start: int,
        moves: bool,
    ) -> None:
        self.loop, self.prefix = shared.step.loop(name), f"{name}."
        super().__init__(shared.step.bodies[name], Sizes(sizes.symbols | {self.loop.chunk: count}), shared)
        self.role = "chunk" if start == 0 else "remainder"
        self.results, self.count, self.start, self.moves = results, count, start, moves
        self._is_everything = count == sizes(self.loop.rows)
        self._where = [start]  # late slices read the current start here
        self._cursors: list[_Cursor] = []
        self._step_of: dict[Root, int] = {}
        rows, *entries = [given.name for given in self.graph.inputs]
        self.values[rows] = count
        for entry, operand, dim in zip(entries, operands, self.loop.operands, strict=True):
            self.values[entry] = operand if dim is None else self._slice(operand, dim, (entry, 0))
        self._entries = entries
        self._places = [
            result if spec.scatter is not None else self._slice(result, spec.dim, self.graph.result_of.get(index))
            for index, (result, spec) in enumerate(zip(results, self.loop.outputs, strict=True))
        ]

    def bind(self) -> None:
        """Bind all of the body, and the copies of results that were not written in place."""
        for linked in self.ops:
            self.bind_node(linked)
        direct = set(self.graph.direct.values())
        for index, (part, place) in enumerate(zip(self.graph.results, self._places, strict=True)):
            if index not in direct:
                scatter, value = self.loop.outputs[index].scatter, self.values[part.name]
                copy = Call(torch.Tensor.copy_, (place, value))
                if scatter is not None:
                    rows = self.values[self._entries[scatter.index]]
                    copy = Call(torch.Tensor.index_copy_, (place, 0, rows, value))
                self.instructions.append(bound_call(copy, self.shared.slots))
        late = [index for indices in self._slots_in.values() for index in indices]
        if late:
            self.instructions.append(functools.partial(drop, self.shared.slots, late))

    def move(self, start: int) -> None:
        """Point all slices at the chunk that begins with row ``start``."""
        self._where[0] = start
        for c in self._cursors:
            c.tensor.set_(c.storage, c.offset + start * c.step, c.shape, c.stride)

    # ----------------------------------------------------------------------------------------- slices
    def _slice(self, whole: Any, dim: int, root: Root | None) -> Any:
        """Rows [start, start + count) of an operand or result."""
        if isinstance(whole, torch.Tensor):
            part = whole.narrow(dim, self.start, self.count)
            if self.moves:
                part = self._cursor(part, whole.stride(dim))
                if root is not None:
                    self._step_of[root] = whole.stride(dim)
            return part
        if self._is_everything:
            return whole
        slot = self.shared.new_slot()
        self.instructions.append(
            functools.partial(_narrow, self.shared.slots, whole.index, slot.index, dim, self._where, self.count)
        )
        return slot

    def _cursor(self, part: torch.Tensor, step: int) -> torch.Tensor:
        """A tensor object of its own over the same memory, that :meth:`move` moves (a body that moves starts at 0)."""
        tensor = with_lazy_bits(torch.empty(0, dtype=part.dtype, device=part.device), ir.lazy_bits(part))
        storage, offset = part.untyped_storage(), int(part.storage_offset())
        tensor.set_(storage, offset, part.shape, part.stride())
        self._cursors.append(_Cursor(tensor, storage, offset, step, part.shape, part.stride()))
        return tensor

    # ----------------------------------------------------------------------------------------- nodes
    def _bind(self, linked: Linked) -> None:
        super()._bind(linked)
        if not self.moves or linked.kind is not Kind.VIEW:
            return
        roots = linked.op.roots
        step = self._step_of.get(roots[0]) if len(roots) == 1 and roots[0] is not None else None
        value = self.values[linked.name]
        if step is not None and isinstance(value, torch.Tensor):  # a view of a slice moves with it
            self.values[linked.name] = self._cursor(value, step)

    def _output_of(self, linked: Linked, index: int) -> Any:
        result = self.graph.direct.get((linked.name, index))
        return super()._output_of(linked, index) if result is None else self._places[result]


def _narrow(slots: list[Any], source: int, target: int, dim: int, where: list[int], count: int) -> None:
    slots[target] = slots[source].narrow(dim, where[0], count)
