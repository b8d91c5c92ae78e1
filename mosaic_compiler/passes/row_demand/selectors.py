"""Row numbers: the part of the ``row-demand`` rewrite that runs first thing in the step.

Masks and indices that select rows are moved to the front of the graph, and row numbers are computed from
them there, once.  ``nonzero`` gives a number of rows that only the data knows: a new symbol M, bound by the
node whose metadata has :data:`ir.BINDS`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book import Space, rows
from mosaic_compiler.ir.emitter import SizeEmitter
from mosaic_compiler.passes.row_demand.demands import Condition, Demands, Segment
from mosaic_compiler.passes.row_demand.moves import movement_base, movement_steps, row_index

aten = torch.ops.aten


class Selectors(SizeEmitter):
    """Emits row numbers for the segments of a graph's demands, at its front."""

    def __init__(self, module: fx.GraphModule, demands: Demands) -> None:
        super().__init__(module)
        self.demands = demands
        self._indices: dict[tuple[Segment, ...], fx.Node] = {}
        self._counts: dict[tuple[Segment, ...], fx.Node] = {}
        self._masks: dict[Any, fx.Node] = {}
        self._grids: dict[Segment, fx.Node] = {}
        self._positions: dict[fx.Node, fx.Node | None] = {}
        self._found: list[fx.Node] = []
        self.front = self._hoist()

    # ---------------------------------------------------------------------------------- interface
    def index(self, segments: Sequence[Segment]) -> fx.Node:
        """int64 [M]: the flattened row numbers of the segments, one after the other."""
        key = tuple(segments)
        if key not in self._indices:
            with self.graph.inserting_before(self.front):
                if len(key) > 1:
                    self._indices[key] = self.emit(aten.cat.default, [self.index([s]) for s in key])
                elif key[0].move is None:
                    self._indices[key] = self._nonzero(self._mask(key[0].space))
                else:
                    self._indices[key] = self._moved(key[0])
        return self._indices[key]

    def count(self, segments: Sequence[Segment]) -> fx.Node:
        """How many rows these segments have, as a node."""
        key = tuple(segments)
        if key not in self._counts:
            index = self.index(key)
            with self.graph.inserting_before(self.front):
                self._counts[key] = self.emit(aten.sym_size.int, index, 0)
        return self._counts[key]

    def allow_repeats(self) -> None:
        """Nobody sees how many rows there are: row numbers may be repeated."""
        for node in self._found:
            node.meta[ir.MAY_REPEAT] = True

    def grid(self, segment: Segment) -> list[Any]:
        """The sizes of the rows that a move picks, as arguments: ``x[:, -3:]`` of [B, N, D] has [B, 3]."""
        self.index([segment])
        moved = self._grids[segment]
        sizes = [ir.expr_of(size) for size in rows.shape_of(moved)]
        return [
            int(size) if size.is_Integer else self.emit(aten.sym_size.int, moved, dim) for dim, size in enumerate(sizes)
        ]

    def positions(self, mask: fx.Node, space: Space) -> fx.Node | None:
        """Which of the space's demanded rows one of its masks selects; ``None``: all of them."""
        if mask not in self._positions:
            conditions = self.demands.conditions[space]
            own = next(c for c in conditions if len(c) == 1 and next(iter(c)).mask is mask and next(iter(c)).positive)
            index = self.index([Segment(space)])
            with self.graph.inserting_before(self.front):
                chosen = self._conjunction(own, space)
                inside = self.emit(aten.index_select.default, chosen, 0, index)
                self._positions[mask] = None if conditions == {own} else self._nonzero(inside)
        return self._positions[mask]

    # ---------------------------------------------------------------------------------- hoisting
    def _hoist(self) -> fx.Node:
        """Move what selects rows behind the placeholders; returns the node that row numbers go before."""
        needed = [lit.mask for cs in self.demands.conditions.values() for c in cs for lit in c]
        for demand in self.demands.of.values():
            for segment in demand.moves if demand is not None else ():
                needed += _inputs_of_moves(segment)
        for move in self.demands.moved:  # also where its base is needed whole, and so has no demand
            needed += _inputs_of_moves(Segment((), move))
        wanted = ir.computed_from(needed)
        anchor = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        for node in list(self.graph.nodes):
            if (node in wanted and node.op == "call_function") or node.op == "get_attr":
                anchor.append(node)
                anchor = node
        front: fx.Node = anchor.next
        return front

    # -------------------------------------------------------------------------------- row numbers
    def _nonzero(self, mask: fx.Node) -> fx.Node:
        """Row numbers where a flat mask holds; binds a new symbol."""
        tensor = ir.tensor_of(mask)
        assert tensor is not None
        found = self.bare(aten.nonzero.default, mask)
        self._found.append(found)
        count = self.bind_number(found)
        with self.mode:
            found.meta["val"] = torch.empty((count, 1), dtype=torch.int64, device=tensor.device)
        return self.emit(aten.squeeze.dim, found, 1)

    def _mask(self, space: Space) -> fx.Node:
        """bool [R]: the row is needed by some exit."""
        if space not in self._masks:
            conditions = sorted(self.demands.conditions[space], key=_order_of)
            mask, *rest = (self._conjunction(condition, space) for condition in conditions)
            for part in rest:
                mask = self.emit(aten.bitwise_or.Tensor, mask, part)
            self._masks[space] = mask
        return self._masks[space]

    def _conjunction(self, condition: Condition, space: Space) -> fx.Node:
        """bool [R]: all literals hold."""
        if (condition, space) not in self._masks:
            result: fx.Node | None = None
            for literal in sorted(condition, key=lambda item: (item.mask.name, item.positive)):
                mask = literal.mask
                gone = [dim for dim in range(len(rows.shape_of(mask))) if dim not in literal.kept]
                if gone:
                    mask = self.emit(aten.squeeze.dims, mask, gone)
                if not literal.positive:
                    mask = self.emit(aten.bitwise_not.default, mask)
                result = mask if result is None else self.emit(aten.bitwise_and.Tensor, result, mask)
            assert result is not None
            if tuple(ir.expr_of(size) for size in rows.shape_of(result)) != space:
                result = self.emit(aten.expand.default, result, [self.size(extent) for extent in space])
            if len(space) > 1:
                result = self.emit(aten.reshape.default, result, [self.size(sympy.prod(space))])
            self._masks[condition, space] = result
        return self._masks[condition, space]

    def _moved(self, segment: Segment) -> fx.Node:
        """Rows of a move's base: the same move, applied to row numbers."""
        move = segment.move
        assert move is not None
        base = movement_base(move)
        assert base is not None
        tensor, dims = ir.tensor_of(base), segment.dims
        assert tensor is not None
        sizes = [ir.expr_of(size) for size in tensor.shape[:dims]]
        total = self.size(sympy.prod(sizes))
        numbers = self.emit(aten.arange.default, total, device=tensor.device, pin_memory=False)
        numbers = self.emit(aten.view.default, numbers, [self.size(size) for size in sizes])
        moved = self._grids[segment] = self._apply(move, base, numbers)
        if len(rows.shape_of(moved)) != 1:
            count = sympy.Mul(*(ir.expr_of(size) for size in rows.shape_of(moved)))
            moved = self.emit(aten.reshape.default, moved, [self._product(moved, count)])
        if segment.source is None:
            return moved
        return self.emit(aten.index_select.default, moved, 0, self.index([segment.source]))

    def _product(self, moved: fx.Node, count: sympy.Expr) -> Any:
        """The number of elements of ``moved``; sizes that are not on the inputs are read off itself."""
        if count.is_Integer:
            return int(count)
        result: Any = 1
        for dim, size in enumerate(rows.shape_of(moved)):
            extent = ir.expr_of(size)
            factor = int(extent) if extent.is_Integer else self.emit(aten.sym_size.int, moved, dim)
            result = factor if result == 1 else self.arithmetic(operator.mul, result, factor)
        return result

    def _apply(self, node: fx.Node, base: fx.Node, numbers: fx.Node) -> fx.Node:
        """``node`` with ``numbers`` (shaped as the base's rows) in the place of ``base``."""
        if node is base:
            return numbers
        if node.target is aten.cat.default:
            parts: Any = node.args[0]
            return self.emit(aten.cat.default, [self._apply(part, base, numbers) for part in parts], *node.args[1:])
        if node.target is aten.gather.default:
            index = row_index(node)
            assert index is not None
            rank, kept = len(rows.shape_of(index)), len(rows.shape_of(numbers))
            if rank > kept:
                index = self.emit(aten.squeeze.dims, index, list(range(kept, rank)))
            return self.emit(aten.gather.default, numbers, node.args[1], index)
        return self.emit(node.target, numbers, *node.args[1:], **node.kwargs)


def _inputs_of_moves(segment: Segment | None) -> list[fx.Node]:
    found: list[fx.Node] = []
    while segment is not None and segment.move is not None:
        steps = movement_steps(segment.move)
        inner = {movement_base(segment.move), *steps}
        found += [other for step in steps for other in step.all_input_nodes if other not in inner]
        segment = segment.source
    return found


def _order_of(condition: Condition) -> Any:
    return sorted((literal.mask.name, literal.positive) for literal in condition)
