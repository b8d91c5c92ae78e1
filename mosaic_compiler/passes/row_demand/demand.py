"""Backward analysis: at which rows is each value read?  See ``passes/row_demand/``."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import networkx as nx
import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import book, ir
from mosaic_compiler.book import Layout, Space, rows
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.sizes import is_readable, size_sources
from mosaic_compiler.passes.row_demand.demands import (
    Condition,
    Demand,
    Demands,
    Literal,
    Segment,
    choices_of,
    is_complete,
)
from mosaic_compiler.passes.row_demand.moves import kept_dims, moved_dims, movement_base, movement_steps

aten = torch.ops.aten


def analyse(graph: fx.Graph) -> Demands:
    """Propagate demands from the outputs to the inputs."""
    return _Analysis(graph).run()


class _Analysis:
    def __init__(self, graph: fx.Graph) -> None:
        self.demands = Demands(graph)
        self.graph = graph
        self.early = early_nodes(graph)
        self.sizes = size_sources(graph)
        self.storage = ir.StorageMap(graph)
        self.returned = ir.escaping_roots(graph, self.storage)

    def run(self) -> Demands:
        nodes = list(self.graph.nodes)
        for node in reversed(nodes):
            if node.op in ("placeholder", "get_attr"):
                continue
            if node.op == "output":
                self._everything(node)
                continue
            if node not in self.demands.of and not ir.has_effect(node):
                continue  # nobody reads it
            if node.op != "call_function" or ir.has_effect(node):
                self.demands.of[node] = None
            if not self._exit(node):
                self._pass_on(node)
        order = {node: index for index, node in enumerate(nodes)}
        self.demands.compact.sort(key=order.__getitem__)
        self._keep_worthwhile()
        return self.demands

    # ------------------------------------------------------------------------------ propagation
    def _everything(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            self._need_all(operand, node)

    def _need_all(self, operand: fx.Node, consumer: fx.Node) -> None:
        if operand not in self.demands.of or self.demands.of[operand] is not None:
            self.demands.of[operand] = None
            self.demands.blame[operand] = consumer

    def _need(self, operand: fx.Node, demand: Demand, consumer: fx.Node) -> None:
        """Add a demand to what the operand is already needed for."""
        known = self.demands.of.get(operand, demand)
        if known is None:
            return
        if known.layout != demand.layout or known.space != demand.space:
            self._need_all(operand, consumer)
            return
        known.conditions |= demand.conditions
        known.moves += [segment for segment in demand.moves if segment not in known.moves]
        self.demands.of[operand] = Demand(known.layout, known.space, known.conditions, known.moves)
        self.demands.blame.setdefault(operand, consumer)

    def _pass_on(self, node: fx.Node) -> None:
        demand = self.demands.of[node]
        if demand is None:
            self._everything(node)
            return
        if node.target is operator.getitem:
            self._pass_to_producer(node, demand)
            return
        if self._pass_through_move(node, demand):
            return
        operands = rows.operand_layouts(node, 0, demand.layout, demand.space)
        if operands is None or not can_resize(node, demand.layout, self.sizes):
            self._everything(node)  # the node itself is computed in full, its demanded rows gathered from it
            return
        self.demands.compact.append(node)
        blame = self.demands.blame[node]
        for operand in operands:
            if operand.layout is None or not is_complete(operand.layout, demand.space):
                self._need_all(operand.node, node)
            else:
                self._need(operand.node, demand.on(operand.layout), blame)

    def _pass_to_producer(self, node: fx.Node, demand: Demand) -> None:
        """A ``getitem`` demands its rows of the multi-output op; all outputs must agree on the layout."""
        producer = node.args[0]
        assert isinstance(producer, fx.Node)
        first, own = ir.tensors_of(producer)[0], ir.tensor_of(node)
        if first is None or own is None or first.dim() != own.dim():
            self._need_all(producer, node)
            return
        self.demands.compact.append(node)
        self._need(producer, demand.on(demand.layout), self.demands.blame[node])

    # ------------------------------------------------------------------------------------ exits
    def _exit(self, node: fx.Node) -> bool:
        """Handle a node that reads only some rows of an operand, whatever is demanded of itself."""
        if choices_of(node) is not None:
            return self._choice_exit(node)
        if node.target is aten.index.Tensor and self._boolean_index_exit(node):
            return True
        return self.demands.of[node] is None and node.target is not ops.put_rows and self._move_exit(node)

    def _choice_exit(self, node: fx.Node) -> bool:
        choices = choices_of(node)
        assert choices is not None
        condition, operands = choices
        out, demand = ir.tensor_of(node), self.demands.of[node]
        assert out is not None
        mask_shape = rows.shape_of(condition)
        varying = [dim for dim, size in enumerate(mask_shape) if ir.expr_of(size) != 1]
        if not varying or len(mask_shape) != out.dim():
            return False
        layout, space = rows.leading_layout(out, varying[-1] + 1)
        small = all(label is not None or ir.expr_of(s) == 1 for label, s in zip(layout, out.shape, strict=True))
        if not self._readable(out, space) or (demand is not None and not small):
            return False
        if demand is not None and (demand.layout != layout or demand.space != space or demand.moves):
            return False
        if layout[varying[-1]] is None:
            return False
        outer: set[Condition] = {frozenset()} if demand is None else demand.conditions
        self._need_all(condition, node)
        for position, positive in operands:
            operand = node.args[position]
            if not isinstance(operand, fx.Node):
                continue
            literals = self._literals(condition, positive, layout)
            conditions = {frozenset(c | literals) for c in outer}
            tensor = ir.tensor_of(operand)
            whole = tensor is not None and tensor.dim() == out.dim() and rows.aligned(operand, layout) == layout
            if not whole or frozenset() in conditions:
                self._need_all(operand, node)
                continue
            self._need(operand, Demand(layout, space, conditions), node)
        self.demands.exits.append(node)
        return True

    def _boolean_index_exit(self, node: fx.Node) -> bool:
        """``v[mask]`` with a boolean mask over v's leading dims."""
        source, indices = node.args
        if not isinstance(indices, (list, tuple)) or len(indices) != 1 or not isinstance(indices[0], fx.Node):
            return False
        mask = ir.tensor_of(indices[0])
        if not isinstance(source, fx.Node) or mask is None or mask.dtype != torch.bool or indices[0] not in self.early:
            return False
        if not mask.dim():
            return False  # a number has no rows
        tensor = ir.tensor_of(source)
        assert tensor is not None
        layout, space = rows.leading_layout(tensor, mask.dim())
        if layout[mask.dim() - 1] is None or not self._readable(tensor, space):
            return False
        if not ir.is_contiguous(ir.only_tensor(node)):
            return False  # rows of transposed features, which eager keeps transposed; picked rows would be dense
        kept = tuple(dim for dim in range(mask.dim()) if layout[dim] is not None)
        condition = frozenset({Literal(indices[0], True, kept)})
        self._need_all(indices[0], node)
        self._need(source, Demand(layout, space, {condition}), node)
        self.demands.exits.append(node)
        return True

    def _move_exit(self, node: fx.Node) -> bool:
        """All rows of ``x[:, a:b]`` are some rows of x."""
        dims = moved_dims(node)
        source = node.args[0] if node.args else None
        if dims is None or not isinstance(source, fx.Node) or not self._is_early_move(node):
            return False
        out, tensor = ir.tensor_of(node), ir.tensor_of(source)
        assert out is not None
        assert tensor is not None
        if self.storage.root(node) in self.returned and not ir.is_contiguous(out):
            return False  # the caller gets the strides of eager; picked rows would be dense
        dims = max(dims, min(2, tensor.dim() - 1))
        layout, space = rows.leading_layout(tensor, dims)
        if layout[dims - 1] is None or not _has_features(layout, tensor) or not self._readable(tensor, space):
            return False
        for operand in node.all_input_nodes:
            if operand is not source:
                self._need_all(operand, node)
        self._need(
            source, Demand(layout, space, moves=[Segment(space, self.demands.same_move(node, dims), None, dims)]), node
        )
        self.demands.exits.append(node)
        return True

    def _pass_through_move(self, node: fx.Node, demand: Demand) -> bool:
        """Rows of a slice, an index or a shift of x are rows of x."""
        base = movement_base(node)
        if base is None or not self._is_early_move(node):
            return False
        out, tensor = ir.tensor_of(node), ir.tensor_of(base)
        assert out is not None
        assert tensor is not None
        moved_by = max(dims for step in movement_steps(node) if (dims := moved_dims(step)) is not None)
        lost = moved_by - kept_dims(node, moved_by)
        needed = 1 + max(dim for dim, label in enumerate(demand.layout) if label is not None)
        dims = max(moved_by, needed + lost)
        if (demand.layout, demand.space) != rows.leading_layout(out, dims - lost) and not _are_flat_rows(node, demand):
            return False
        layout, space = rows.leading_layout(tensor, dims)
        if layout[dims - 1] is None or not self._readable(tensor, space):
            return False
        move = self.demands.same_move(node, dims)
        moved = [Segment(space, move, segment, dims) for segment in demand.segments()]
        self.demands.compact.append(node)
        self.demands.moved[node] = base, dims
        for operand in movement_steps(node):
            for other in operand.all_input_nodes:
                if ir.tensor_of(other) is not None and other is not base and movement_base(other) is not base:
                    self._need_all(other, node)
        self._need(base, Demand(layout, space, moves=moved), self.demands.blame[node])
        return True

    def _is_early_move(self, node: fx.Node) -> bool:
        steps = movement_steps(node)
        base = movement_base(node)
        inner = {base, *steps}
        others = [other for step in steps for other in step.all_input_nodes if other not in inner]
        return all(other in self.early or ir.tensor_of(other) is None for other in others)

    # --------------------------------------------------------------------------------- literals
    def _literals(self, mask: fx.Node, positive: bool, layout: Layout) -> Condition:
        """Masks known early whose conjunction is implied by ``mask`` (or by its negation).

        ``commit = masked & (rank < count)`` depends on the logits, but implies ``masked``: the rows of
        ``masked`` are a sound superset.  A mask that gives nothing is no literal: all rows.
        """
        if mask in self.early:
            skipped = len(layout) - len(rows.shape_of(mask))  # broadcast: aligned at the last dim
            kept = tuple(d - skipped for d, label in enumerate(layout) if label is not None and d >= skipped)
            return frozenset({Literal(mask, positive, kept)})
        logic = book.entry(mask).logic
        if logic == "not":
            return self._literals(mask.args[0], not positive, layout)  # type: ignore[arg-type]
        if logic == ("and" if positive else "or"):
            found: set[Literal] = set()
            for operand in mask.args:
                if isinstance(operand, fx.Node):
                    found |= self._literals(operand, positive, layout)
            return frozenset(found)
        return frozenset()

    def _readable(self, tensor: torch.Tensor, space: Space) -> bool:
        """The value has rows, and the inputs say how many, and how wide: some rows of it can be made, and put back."""
        return bool(space) and all(is_readable(ir.expr_of(size), self.sizes) for size in (*tensor.shape, *space))

    def _keep_worthwhile(self) -> None:
        """Keep what is connected to a matmul that runs on fewer rows; elsewhere there is nothing to gain."""
        members = set(self.demands.compact)
        linked = nx.Graph()
        linked.add_nodes_from(members)
        for node in members:
            sources = [self.demands.moved[node][0]] if node in self.demands.moved else node.all_input_nodes
            linked.add_edges_from((node, operand) for operand in sources if operand in members)
        heavy = set(self.demands.heavy)
        kept = {n for part in nx.connected_components(linked) if part & heavy for n in part}
        self.demands.compact = [node for node in self.demands.compact if node in kept]
        self.demands.exits = [node for node in self.demands.exits if kept.intersection(node.all_input_nodes)]
        for node in self.demands.compact:
            demand = self.demands.of[node]
            assert demand is not None
            if demand.conditions:
                self.demands.conditions.setdefault(demand.space, set()).update(demand.conditions)


def can_resize(node: fx.Node, layout: Layout, sources: Mapping[sympy.Expr, Any]) -> bool:
    """Whether the op can be called with another number of rows: the feature sizes of its shape argument must be
    numbers or readable off the inputs."""
    if book.entry(node).shape_at is None:
        return True
    sizes = [ir.expr_of(s) for label, s in zip(layout, rows.shape_of(node), strict=True) if label is None]
    return all(is_readable(size, sources) for size in sizes)


def early_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that can be computed before the step's heavy work: everything behind them is cheap, has no
    effect, and draws no random numbers."""
    early: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            early.add(node)
        elif node.op == "call_function" and all(operand in early for operand in node.all_input_nodes):
            plain = isinstance(node.target, OpOverload) or not ir.tensors_of(node)[0:1] or ir.tensor_of(node) is None
            if plain and not ir.has_effect(node) and not book.is_matmul(node) and not book.is_attention(node):
                early.add(node)
    return early


def _are_flat_rows(node: fx.Node, demand: Demand) -> bool:
    """Rows of all batch entries, one after the other, put where they belong: rows of a space are numbered like that."""
    return node.target is ops.put_rows and demand.layout[0] == book.FLAT


def _has_features(layout: Layout, tensor: torch.Tensor) -> bool:
    return any(label is None and ir.expr_of(s) != 1 for label, s in zip(layout, tensor.shape, strict=True))
