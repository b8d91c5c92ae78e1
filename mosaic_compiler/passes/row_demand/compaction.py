"""The rewrite behind ``row-demand``: compute demanded values on gathered rows, scatter results back.

A compact value has the rank of the original: the last dim of the row space becomes M (the number of rows
computed), its other dims become 1, a flat dim becomes M.  So every op is called again as it is.

    q [B, H, N, d], space (B, N)   ->   [1, H, M, d]
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import networkx as nx
import sympy
import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import FLAT, Layout, Space, rows
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.ir.sizes import size_sources
from mosaic_compiler.passes.constants import constant_of
from mosaic_compiler.passes.row_demand.demand import can_resize
from mosaic_compiler.passes.row_demand.demands import Demand, Demands, Segment, choices_of
from mosaic_compiler.passes.row_demand.moves import moved_dims
from mosaic_compiler.passes.row_demand.selectors import Selectors

aten = torch.ops.aten


class Compactor(Emitter):
    """Rewrites one graph according to its demands (see the module docstring)."""

    def __init__(self, module: fx.GraphModule, demands: Demands) -> None:
        super().__init__(module)
        self.demands = demands
        self.selectors = Selectors(module, demands)
        self.compact: dict[fx.Node, fx.Node] = {}
        self._sources = size_sources(module.graph)
        self.gathers: dict[Any, fx.Node] = {}
        self.replaced: list[fx.Node] = []
        self._scattered: dict[fx.Node, fx.Node] = {}
        self._shows_number = False
        """A result of the size M takes the place of one that the graph had (``x[mask]``)."""

    def rewrite(self) -> None:
        exits = set(self.demands.exits)
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in sorted({*self.demands.compact, *exits}, key=order.__getitem__):
            self.origin = node
            with self.graph.inserting_before(node if node in exits else node.next):
                if node in exits:
                    self._rewrite_exit(node)
                else:
                    self.compact[node] = self._compact_node(node)
        self.propagate(set(self.replaced))
        if not self._shows_number:
            self.selectors.allow_repeats()

    def _demand(self, node: fx.Node) -> Demand:
        demand = self.demands.of[node]
        assert demand is not None
        return demand

    # ------------------------------------------------------------------------------ compact nodes
    def _compact_node(self, node: fx.Node) -> fx.Node:
        demand = self._demand(node)
        segments = demand.segments()
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            if source not in self.compact:  # the producer runs in full
                return self._gather(node, demand.layout, segments, demand.space)
            return self.emit_getitem(self.compact[source], index)
        if node in self.demands.moved:
            return self._rows_of_base(node, segments)
        return self._call_on_rows(node, demand.layout, segments, demand.space)

    def _call_on_rows(
        self,
        node: fx.Node,
        layout: Layout,
        segments: list[Segment],
        space: Space,
        again: Collection[tuple[fx.Node, Layout]] | None = None,
    ) -> fx.Node:
        """The node's op called again on some rows; ``again`` says which of its operands are, too."""
        operands = rows.operand_layouts(node, 0, layout, space)
        assert operands is not None
        queue = iter(operands)

        def replace(operand: fx.Node) -> Any:
            if ir.tensor_of(operand) is None:
                return operand
            needed = next(queue)
            assert needed.node is operand
            if needed.layout is None or not rows.is_labelled(needed.layout):
                return operand
            if operand in self.compact:
                return self._part(operand, segments)
            row_dim = _row_dim(layout, space) - len(layout) + len(needed.layout) if _has_rows(layout, space) else None
            return self._gather(operand, needed.layout, segments, space, row_dim, again)

        args = fx.node.map_arg(node.args, replace)
        kwargs = fx.node.map_arg(dict(node.kwargs), replace)
        if node.target is aten.view.default:
            return self.emit(aten.reshape.default, args[0], self._compact_shape(node, layout, segments, space))
        position = book.entry(node).shape_at
        if position is not None:
            shape = self._compact_shape(node, layout, segments, space)
            args = (*args[:position], shape, *args[position + 1 :])
        return self.emit(node.target, *args, **kwargs)

    def _rows_of_base(self, node: fx.Node, segments: list[Segment]) -> fx.Node:
        """Rows of a slice or a shift are rows of what it takes them from."""
        base, dims = self.demands.moved[node]
        tensor = ir.tensor_of(base)
        assert tensor is not None
        layout, space = rows.leading_layout(tensor, dims)
        move = self.demands.same_move(node, dims)
        moved = [Segment(space, move, segment, dims) for segment in segments]
        found = self._part(base, moved) if base in self.compact else self._gather(base, layout, moved, space)
        if len(rows.shape_of(found)) == len(rows.shape_of(node)):
            return found
        demand = self._demand(node)  # x[0] of [1, N, D] is [N, D]: so are its rows
        return self.emit(aten.reshape.default, found, self._compact_shape(node, demand.layout, segments, demand.space))

    def _compact_shape(self, node: fx.Node, layout: Layout, segments: list[Segment], space: Space) -> list[Any]:
        count = self.selectors.count(segments)
        last = (FLAT, len(space) - 1)
        return [
            self.selectors.size(ir.expr_of(size)) if label is None else count if label in last else 1
            for label, size in zip(layout, rows.shape_of(node), strict=True)
        ]

    def _part(self, source: fx.Node, segments: list[Segment]) -> fx.Node:
        """Some segments of a compact value: views, unless they do not stand together."""
        compact, own = self.compact[source], self._demand(source)
        have = own.segments()
        if have == segments:
            return compact
        dim = _row_dim(own.layout, own.space)
        parts = []
        for segment in segments:
            at = have.index(segment)
            start = self.selectors.count(have[:at]) if at else 0
            parts.append(self.emit(aten.slice.Tensor, compact, dim, start, self.selectors.count(have[: at + 1])))
        return parts[0] if len(parts) == 1 else self.emit(aten.cat.default, parts, dim)

    # ------------------------------------------------------------------------------------- gather
    def _gather(
        self,
        source: fx.Node,
        layout: Layout,
        segments: list[Segment],
        space: Space,
        row_dim: int | None = None,
        again: Collection[tuple[fx.Node, Layout]] | None = None,
    ) -> fx.Node:
        """Rows of a value that is computed in full; once for all who want the same ones.

        What is cheaply computed from no more than itself (a norm, cosines of positions) is computed again for these
        rows, so that nobody needs it at full length for the sake of a gather.
        """
        key = (source, layout, tuple(segments), space, row_dim if 0 in layout and FLAT not in layout else None)
        if key not in self.gathers:
            if again is None and _has_rows(layout, space):
                again = computed_again(source, layout, space, self._can_call)
            if again and (source, layout) in again:
                self.gathers[key] = self._call_on_rows(source, layout, segments, space, again)
            else:
                self.gathers[key] = self._emit_gather(source, layout, self.selectors.index(segments), space, row_dim)
        return self.gathers[key]

    def _can_call(self, node: fx.Node, layout: Layout) -> bool:
        return can_resize(node, layout, self._sources)

    def _emit_gather(
        self, source: fx.Node, layout: Layout, index: fx.Node, space: Space, row_dim: int | None
    ) -> fx.Node:
        labels = [label for label in layout if label is not None]
        if labels == [FLAT] or len(space) == 1:
            return self._select_rows(source, layout.index(labels[0]), index)
        assert len(space) == 2, "row spaces have one or two dims"
        inner = self.selectors.size(space[1])
        if labels == [1]:  # the same for every batch entry
            column = self.emit(aten.remainder.Scalar, index, inner)
            return self._select_rows(source, layout.index(1), column)
        row = self.emit(aten.div.Tensor_mode, index, inner, rounding_mode="floor")
        if labels == [0]:  # one value per batch entry: [B, 1, ...] -> [1, M, ...]
            assert row_dim is not None
            picked = self.emit(aten.index_select.default, source, layout.index(0), row)
            return self.emit(aten.transpose.int, picked, layout.index(0), row_dim)
        column = self.emit(aten.remainder.Scalar, index, inner)
        order = [layout.index(0), layout.index(1)]
        order += [dim for dim in ir.memory_order(ir.only_tensor(source)) if dim not in order]
        picked = self.emit(aten.index.Tensor, self.permuted(source, order), [row, column])  # [M, features...]
        picked = self.emit(aten.unsqueeze.default, picked, 0)  # [1, M, features...]
        return self.permuted(picked, [order.index(dim) for dim in range(len(layout))])

    def _select_rows(self, source: fx.Node, dim: int, index: fx.Node) -> fx.Node:
        """``index_select`` that keeps the order of dims in memory, so that whole rows are copied and the
        views behind it stay views."""
        order = ir.memory_order(ir.only_tensor(source))
        picked = self.emit(aten.index_select.default, self.permuted(source, order), order.index(dim), index)
        return self.permuted(picked, [order.index(d) for d in range(len(order))])

    # -------------------------------------------------------------------------------------- exits
    def _rewrite_exit(self, node: fx.Node) -> None:
        choices = choices_of(node)
        if choices is not None:
            for position, _ in choices[1]:
                operand = node.args[position]
                if isinstance(operand, fx.Node) and operand in self.compact:
                    full = self._scatter(operand)
                    node.update_arg(position, full)
                    if self._selects_just_those(node, position):
                        node.replace_all_uses_with(full, propagate_meta=False)
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source not in self.compact:
            return
        own = self._demand(source)
        if moved_dims(node) is None:
            self._shows_number = True
            picked = self._rows_of_mask(node, source, own)
            features = rows.shape_of(source)[_row_dim(own.layout, own.space) + 1 :]
            count = self.emit(aten.sym_size.int, picked, _row_dim(own.layout, own.space))
            shape = [count, *(self.selectors.size(ir.expr_of(size)) for size in features)]
        else:
            segment = next(
                segment
                for segment in own.moves
                if segment.source is None and segment.move is self.demands.same_move(node, segment.dims)
            )
            picked, shape = self._part(source, [segment]), self.selectors.grid(segment)
            features = rows.shape_of(source)[segment.dims :]
            shape += [self.selectors.size(ir.expr_of(size)) for size in features]
        result = self.emit(aten.reshape.default, picked, shape)
        node.replace_all_uses_with(result, propagate_meta=False)
        self.replaced.append(result)

    def _selects_just_those(self, node: fx.Node, position: int) -> bool:
        """``where(m, v, 0)``, and v was computed for just the rows m: what was scattered is 0 elsewhere anyway."""
        if node.target is not aten.where.self:
            return False
        condition, other, scattered = node.args[0], node.args[3 - position], node.args[position]
        assert isinstance(scattered, fx.Node)
        wanted = self.demands.conditions[self._demand(self._scattered[scattered]).space]
        return (
            isinstance(other, fx.Node)
            and constant_of(other) == 0
            and len(wanted) == 1
            and [(lit.mask, lit.positive) for lit in next(iter(wanted))] == [(condition, position == 1)]
            and ir.same_layout(ir.only_tensor(node), ir.only_tensor(scattered))
        )

    def _rows_of_mask(self, node: fx.Node, source: fx.Node, own: Demand) -> fx.Node:
        """Rows of one mask out of those of the union of all masks on the space."""
        compact = self._part(source, [Segment(own.space)])
        indices: Any = node.args[1]
        positions = self.selectors.positions(indices[0], own.space)
        if positions is None:
            return compact
        return self.emit(aten.index_select.default, compact, _row_dim(own.layout, own.space), positions)

    def _scatter(self, operand: fx.Node) -> fx.Node:
        """The full-sized value: zeros, with the computed rows put back."""
        own, tensor = self._demand(operand), ir.tensor_of(operand)
        assert tensor is not None
        segment = [Segment(own.space)]
        shape = [self.selectors.size(ir.expr_of(size)) for size in rows.shape_of(operand)]
        features = shape[_row_dim(own.layout, own.space) + 1 :]
        flat = self.emit(aten.reshape.default, self._part(operand, segment), [self.selectors.count(segment), *features])
        total = self.selectors.size(sympy.prod(own.space))
        zeros = self.emit(
            aten.full.default, [total, *features], 0, dtype=tensor.dtype, layout=torch.strided, device=tensor.device,
            pin_memory=False,
        )  # fmt: skip
        full = self.emit(aten.index_copy.default, zeros, 0, self.selectors.index(segment), flat)
        result = self.emit(aten.view.default, full, shape)
        self._scattered[result] = operand
        return result


def _has_rows(layout: Layout, space: Space) -> bool:
    return FLAT in layout or len(space) - 1 in layout


def computed_again(
    source: fx.Node, layout: Layout, space: Space, can_call: Callable[[fx.Node, Layout], bool]
) -> set[tuple[fx.Node, Layout]]:
    """What to compute again on some rows, so that the fewest bytes have to be gathered for a value.

    A minimum cut between the value and what cannot be computed again cheaply; of equal cuts the one farthest from the
    value: the rows of a norm are computed from the rows of its operand.
    """
    graph, start, goal = nx.DiGraph(), "given", ("out", source, layout)
    todo = [(source, layout)]
    while todo:
        node, wanted = todo.pop()
        if graph.has_edge(("in", node, wanted), ("out", node, wanted)):
            continue
        graph.add_edge(("in", node, wanted), ("out", node, wanted), capacity=rows.row_bytes(node, wanted, unknown=1))
        cheap = node.op == "call_function" and not book.entry(node).is_dear and len(ir.tensors_of(node)) == 1
        cheap = cheap and can_call(node, wanted)
        operands = rows.operand_layouts(node, 0, wanted, space) if cheap else None
        labelled = [(o.node, o.layout) for o in operands or () if o.layout is not None and rows.is_labelled(o.layout)]
        if not labelled or not all(_has_rows(part, space) for _, part in labelled):
            graph.add_edge(start, ("in", node, wanted))
        for operand, part in labelled:
            graph.add_edge(("out", operand, part), ("in", node, wanted))
            todo.append((operand, part))
    _, (computed, _) = nx.minimum_cut(graph.reverse(), goal, start)  # networkx cuts next to the target
    return {key[1:] for key in computed if key[0] == "in"}


def _row_dim(layout: Layout, space: Space) -> int:
    """The dim of a compact value that holds its M rows (for a leading layout, the last dim of its rows)."""
    return layout.index(FLAT) if FLAT in layout else layout.index(len(space) - 1)
