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
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book import Call
from mosaic_compiler.lowering.forms import Kind
from mosaic_compiler.lowering.scopes import LoopSpan
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.runtime.binder import Binder, Shared
from mosaic_compiler.runtime.instructions import Instruction, bound_call, drop


def bind_loop(
    span: LoopSpan, operands: Sequence[Any], results: Sequence[Any], sizes: Sizes, shared: Shared
) -> list[Instruction]:
    """The calls of one loop.

    Args:
        operands: bound values of the call's operands: tensors, slots, numbers.
        results: its full-length results (tensors over the arena, or slots).
        sizes: all symbols, the chunk size included.
    """
    rows = sizes(span.rows)
    if not rows:
        return []
    chunk = min(sizes(span.loop.chunk), rows)
    rest = rows % chunk
    whole = _BodyBinder(span, operands, results, sizes, shared, chunk, start=0, moves=rows > chunk)
    whole.bind()
    if rows == chunk:
        return whole.instructions
    calls: list[Instruction] = [functools.partial(_run, whole.instructions, whole.move, range(0, rows - rest, chunk))]
    if rest:
        last = _BodyBinder(span, operands, results, sizes, shared, rest, start=rows - rest, moves=False)
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
        span: LoopSpan,
        operands: Sequence[Any],
        results: Sequence[Any],
        sizes: Sizes,
        shared: Shared,
        count: int,
        *,
        start: int,
        moves: bool,
    ) -> None:
        super().__init__(span.loop.body, span.scope, Sizes(sizes.symbols | {span.loop.chunk: count}), shared)
        self.role = "chunk" if start == 0 else "remainder"
        self.loop, self.results, self.count, self.start, self.moves = span.loop, results, count, start, moves
        self._is_everything = count == sizes(span.rows)
        self._where = [start]  # late slices read the current start here
        self._cursors: list[_Cursor] = []
        self._step_of: dict[ir.Root, int] = {}
        graph = self.module.graph
        rows, *entries = [node for node in graph.nodes if node.op == "placeholder"]
        self.values[rows] = count
        for node, operand, dim in zip(entries, operands, self.loop.operands, strict=True):
            self.values[node] = operand if dim is None else self._slice(operand, dim, (node, 0))
        self._parts: tuple[fx.Node, ...] = graph.output_node().args[0]  # type: ignore[assignment]
        self._entries = entries
        self._places = [
            result if spec.scatter is not None else self._slice(result, spec.dim, self._root_of(index))
            for index, (result, spec) in enumerate(zip(results, self.loop.outputs, strict=True))
        ]

    def bind(self) -> None:
        """Bind all of the body, and the copies of results that were not written in place."""
        for node in self.scope.nodes:
            self.bind_node(node)
        direct = set(self.scope.direct.values())
        for index, (part, place) in enumerate(zip(self._parts, self._places, strict=True)):
            if index not in direct:
                scatter, value = self.loop.outputs[index].scatter, self.values[part]
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
    def _root_of(self, result: int) -> ir.Root | None:
        """The root in the body that is written straight into a result."""
        return next((root for root, index in self.scope.direct.items() if index == result), None)

    def _slice(self, whole: Any, dim: int, root: ir.Root | None) -> Any:
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
        tensor = torch.empty(0, dtype=part.dtype, device=part.device)
        storage, offset = part.untyped_storage(), int(part.storage_offset())
        tensor.set_(storage, offset, part.shape, part.stride())
        self._cursors.append(_Cursor(tensor, storage, offset, step, part.shape, part.stride()))
        return tensor

    # ----------------------------------------------------------------------------------------- nodes
    def _bind(self, node: fx.Node) -> None:
        super()._bind(node)
        if not self.moves or self.scope.forms[node].kind is not Kind.VIEW:
            return
        step = self._step_of.get(root) if (root := self.scope.storage.root(node)) is not None else None
        value = self.values[node]
        if step is not None and isinstance(value, torch.Tensor):  # a view of a slice moves with it
            self.values[node] = self._cursor(value, step)

    def _output_of(self, node: fx.Node, index: int) -> Any:
        result = self.scope.direct.get((node, index))
        return super()._output_of(node, index) if result is None else self._places[result]


def _narrow(slots: list[Any], source: int, target: int, dim: int, where: list[int], count: int) -> None:
    slots[target] = slots[source].narrow(dim, where[0], count)
