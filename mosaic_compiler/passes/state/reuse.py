"""``reuse-state``: a step for some rows, with all others as they were kept."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import FLAT, Layout, rows
from mosaic_compiler.compat.symbols import new_number
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.emitter import SizeEmitter
from mosaic_compiler.ir.notes import STATE, StatePlace
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.chunk_loops.labels import Edge, reads_values
from mosaic_compiler.passes.state.attended import Attended, cut_for, reading_codes
from mosaic_compiler.passes.state.coding import Coder, Coding, codings_of
from mosaic_compiler.passes.state.cut import Cut
from mosaic_compiler.passes.state.places import add_state, note_state
from mosaic_compiler.passes.state.residual import Residual, residual_in

aten = torch.ops.aten

_HINT = 31
"""An example of a number of rows; a prime, so that no other size is equal to it by accident."""


@dataclass(frozen=True)
class ReuseStatePass(Pass):
    """Compute given rows only; what is needed whole is state, in which those rows are replaced.

    There is one domain of computed rows per step, an input: row numbers [E, C], C in each of E batch entries (ascending
    with a ``precision``: attentions that can read codes do so, ``mosaic::coded_attention``).  A value
    has the rank of the original; its row dim has C (a flat one E * C)::

        q [E, H, N, d]   ->   [E, H, C, d]          h [E * N, D]   ->   [E * C, D]

    What reads all rows of a computed value (the sampler, the caller) gets them by ``mosaic::put_rows``: rows that were
    not computed are nothing in particular.  ``row-demand`` makes positions among the computed rows of rows that are
    picked there.

    Requires: a canonical graph with a cut.  Guarantees: with state as the same ids gave it, the same at computed rows.

    Before::

        k = rotary(mm(h, wk))                               # h [N, D]
        return mm(attention(mm(h, wq), k, v), wo)           # [N, D]

    After::

        def step(..., computed_rows, state_k, state_v):
            h = index_select(..., computed_rows)            # [C, D]
            k = index_copy_(state_k, 0, computed_rows, rotary(mm(h, wk)))
            out = mm(attention(mm(h, wq), k, v), wo)        # [C, D]
            return put_rows(out, computed_rows, N)          # [N, D]
    """

    name: ClassVar[str] = "reuse-state"
    precision: str | None = None
    has_residual: bool = False

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        cut = cut_for(module.graph, self.precision)
        assert not cut.problem, cut.problem
        codings, problem = codings_of(cut, self.precision)
        assert not problem, problem
        residual = residual_in(cut, self.precision, codings) if self.has_residual else []
        Rewriter(module, cut, codings, reading_codes(cut, self.precision, codings), residual).rewrite()
        ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module


class Rewriter(SizeEmitter):
    are_all_others_kept = True
    """Every row that is picked is a computed one."""

    def __init__(
        self,
        module: fx.GraphModule,
        cut: Cut,
        codings: Mapping[fx.Node, Coding],
        reading_codes: Mapping[fx.Node, Attended] = MappingProxyType({}),
        residual: Sequence[fx.Node] = (),
    ) -> None:
        super().__init__(module)
        self._residual_of = residual
        self._residual: Residual | None = None
        self._indexes: dict[tuple[Any, Any], list[fx.Node]] = {}
        self._reading_codes = reading_codes
        self.codings, self.coder = codings, Coder(self)
        self.module, self.cut, self.labels, self.space = module, cut, cut.labels, cut.space
        self.kept_as = dict(cut.kept_as)
        self.order = list(self.graph.nodes)
        self._computed: dict[fx.Node, fx.Node] = {}
        self._written: dict[fx.Node, list[fx.Node]] = {}
        self._kept: dict[fx.Node, fx.Node] = {}
        self._now: Mapping[fx.Node, fx.Node] = {}
        self._whole: dict[fx.Node, fx.Node] = {}
        self._gathered: dict[tuple[fx.Node, Layout, Layout], fx.Node] = {}
        self._all_rows: dict[fx.Node, fx.Node] = {}
        self._places: list[StatePlace] = []
        self._states: dict[fx.Node, list[fx.Node]] = {}

    def rewrite(self) -> None:
        self._add_inputs()
        for node in self.order:
            self.origin = node
            if node in self.cut.inside:
                with self.graph.inserting_before(node.next):
                    self._computed[node] = self._compute(node)
                    if node in self._states:
                        self._replace_rows(node)
            elif node.op == "call_function" or node.op == "output":
                with self.graph.inserting_before(node):
                    self._read_all_rows(node)
        note_state(self.module, self._places)

    # ------------------------------------------------------------------------------------- inputs
    def _add_inputs(self) -> None:
        """Row numbers, then state, behind the other inputs; sizes and row numbers that are used all over."""
        placeholders = self.graph.find_nodes(op="placeholder")
        entries = self.space[0] if len(self.space) > 1 else sympy.Integer(1)
        _, count = new_number(self.mode.shape_env, "computed_rows", _HINT)
        number = ir.argument_value(self.size(entries))
        with self.mode, self.graph.inserting_after(placeholders[-1]):
            self._given = self.graph.placeholder("computed_rows")
            device = ir.main_device_of(self.module)
            if self.are_all_others_kept:
                self._given.meta[ir.COMPUTED_ROWS] = True
            self._given.meta["val"] = torch.empty((number, count), dtype=torch.int64, device=device)
        STATE.write(self.module, replace(STATE.of(self.module), rows=len(placeholders)))
        self._add_states()
        with self.graph.inserting_before(self.front):
            self._count = self.emit(aten.sym_size.int, self._given, 1)
            if len(self.space) == 1:
                self._flat = self._among_all = self.emit(aten.view.default, self._given, [self._count])
                self._flat_count = self._count
                self._sizes[ir.expr_of(count)] = self._count
                return
            length, many = self.size(self.space[1]), self.size(self.space[0])
            first = self.emit(aten.arange.default, many, device=device, pin_memory=False)
            self._entry_numbers = self.emit(aten.unsqueeze.default, first, 1)
            starts = self.emit(aten.mul.Tensor, self._entry_numbers, length)
            self._among_all = self.emit(aten.add.Tensor, self._given, starts)
            self._flat_count = self.arithmetic(operator.mul, many, self._count)
            self._flat = self.emit(aten.view.default, self._among_all, [self._flat_count])
            self._sizes[ir.expr_of(count)] = self._count
            self._sizes[ir.expr_of(ir.argument_value(self._flat_count))] = self._flat_count
            self._flat_positions = self.emit(aten.reshape.default, self._given, [self._flat_count])

    def _add_states(self) -> None:
        for value in self.cut.values:
            with self.graph.inserting_before(value.next):
                parts = self.coder.encode(value, self.codings[value])  # of all rows: for their layouts only
            self._states[value] = [self._state(part) for part in parts]
        if self._residual_of:
            self._residual = Residual(self, self._residual_of, len(self._places))
            self._places += [StatePlace(index, None) for index in self._residual.indices]

    def _state(self, like: fx.Node) -> fx.Node:
        """Memory for a value."""
        index = add_state(self, like, len(self._places))
        self._places.append(StatePlace(index, None))
        found: fx.Node = self.graph.find_nodes(op="placeholder")[index]
        return found

    # ------------------------------------------------------------------------------ computed rows
    def _compute(self, node: fx.Node) -> fx.Node:
        """The node's op on the computed rows."""
        if node.target is operator.getitem:
            source, index = node.args
            if source in self._reading_codes:
                return self._computed[source]  # type: ignore[index]
            return self.emit_getitem(self._computed[source], index)  # type: ignore[index]
        if node in self._reading_codes:
            each = self._reading_codes[node]
            codes = [piece for part in each.parts for piece in self._written[part]]
            own, places = [self._computed[part] for part in each.parts], self._given
            if self._residual is not None:
                own, places = self._residual.read(each.parts, own, self._given)
            return self._attend_codes(each, codes, self.emit(aten.unsqueeze.default, places, 1), own)
        args, kwargs = self._operands(node)
        target: Any = aten.reshape.default if node.target is aten.view.default else node.target
        return self.emit(target, *args, **kwargs)

    def _attend_codes(
        self, each: Attended, codes: Sequence[fx.Node], places: fx.Node, own: Sequence[fx.Node]
    ) -> fx.Node:
        """Attention of codes and scales of keys, then of values; ``places``: [E, 1 or G, C], where the keys that are
        there as they are, ``own`` [E, G, C, d] and values, are among them."""
        (query, _, _, *more), _ = self._operands_with(each, codes[::2])
        return self.emit(
            ops.coded_attention, query, *codes, *own, places, *each.bounds(more), each.scale, each.codings[0].precision,
            list(each.order),
        )  # fmt: skip

    def _operands_with(self, each: Attended, parts: Sequence[fx.Node]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """What an attention takes for the computed rows, with these as keys and values."""
        self._now = dict(zip(each.parts, parts, strict=True))
        try:
            return self._operands(each.node)
        finally:
            self._now = {}  # others read them as they are

    def _operands(self, node: fx.Node) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """What the node's op takes for the computed rows."""
        queue = iter(self.labels.edges(node))

        def replace_operand(operand: fx.Node) -> Any:
            if not ir.has_tensors(operand):
                return operand
            found, kind, layout = next(queue)
            assert found is operand
            if kind is Edge.ROW and operand in self._computed:
                return self._aligned(self._computed[operand], self.labels.layout(operand), node)
            whole = self._in_full(operand)
            return whole if layout is None or not self._has_rows(layout) else self._gather(whole, layout, node)

        args: Any = node.args
        position = book.entry(node).shape_at
        if position is not None:
            shape = self._shape(node)
            args = tuple(
                shape if index == position else fx.node.map_arg(given, replace_operand)
                for index, given in enumerate(args)
            )
        else:
            args = fx.node.map_arg(args, replace_operand)
        return args, fx.node.map_arg(dict(node.kwargs), replace_operand)

    def _has_rows(self, layout: Layout) -> bool:
        return FLAT in layout or len(self.space) - 1 in layout

    def _is_flat(self, layout: Layout) -> bool:
        """Its row dim has the rows of all entries, one after the other (what has positions only, too)."""
        return FLAT in layout or (len(self.space) > 1 and 0 not in layout)

    def _shape(self, node: fx.Node) -> list[Any]:
        """Sizes of the computed rows of a value."""
        layout = self.labels.layout(node)
        count = self._flat_count if self._is_flat(layout) else self._count
        return [
            count if label in (FLAT, len(self.space) - 1) else self.size(ir.expr_of(size))
            for label, size in zip(layout, rows.shape_of(node), strict=True)
        ]

    def _aligned(self, computed: fx.Node, layout: Layout, reader: fx.Node) -> fx.Node:
        """Rows of a value that has positions only, as a reader with batch entries wants them: each entry has rows of
        its own, so the dim of the entries, where it had 1, has all of them."""
        theirs = self.labels.layout(reader)
        has_positions_only = len(self.space) > 1 and FLAT not in layout and 0 not in layout
        if not has_positions_only or FLAT in theirs or 0 not in theirs:
            return computed
        return self._by_entry(computed, layout.index(1), theirs)

    def _by_entry(self, flat: fx.Node, dim: int, theirs: Layout) -> fx.Node:
        """[.., E * C, ..] -> [E, .., C, ..], as it is broadcast to a reader's layout (aligned at the last dim)."""
        sizes: list[Any] = [
            self.size(ir.expr_of(size)) if d != dim else None for d, size in enumerate(rows.shape_of(flat))
        ]
        entries, at, skip = self.size(self.space[0]), theirs.index(0), len(theirs) - len(sizes)
        split = self.emit(aten.reshape.default, flat, [*sizes[:dim], entries, self._count, *sizes[dim + 1 :]])
        front = self.permuted(split, [dim, *(d for d in range(len(sizes) + 1) if d != dim)])
        sizes[dim] = self._count
        wide = [1] * skip + sizes
        del wide[at]  # it had 1 there
        moved = self.emit(aten.reshape.default, front, [entries, *wide])
        return self.permuted(moved, [*range(1, at + 1), 0, *range(at + 1, len(theirs))])

    # -------------------------------------------------------------------------------- whole values
    def _in_full(self, operand: fx.Node) -> fx.Node:
        """All rows of a value: itself where it is cheap, or state."""
        if operand in self._now or operand not in self.kept_as:
            return self._now.get(operand, operand)
        value = self.kept_as[operand]
        if operand is value:
            return self._as_it_is_read(value)
        if operand not in self._whole:
            source = next(o for o, kind, _ in self.labels.edges(operand) if kind is Edge.ROW)
            self.kept_as.setdefault(source, value)
            whole = self._in_full(source)
            args = fx.node.map_arg(operand.args, lambda given: whole if given is source else given)
            self._whole[operand] = self.emit(operand.target, *args, **operand.kwargs)
        return self._whole[operand]

    def _replace_rows(self, value: fx.Node) -> None:
        """State with the computed rows in their places."""
        parts = self.coder.encode(self._computed[value], self.codings[value])
        layout = self.labels.layout(value)
        self._written[value] = [
            self._put(state, part, layout) for state, part in zip(self._states[value], parts, strict=True)
        ]
        if self._residual is not None:
            self._residual.write(value, self._computed[value], self._given, self._put_chosen)

    def _as_it_is_read(self, value: fx.Node) -> fx.Node:
        """State as numbers of the value's dtype."""
        if value not in self._kept:
            coding, written, tensor = self.codings[value], self._written[value], ir.only_tensor(value)
            self._kept[value] = written[0]
            if not coding.is_exact:
                known = self.coder.decode(written, coding, tensor.dtype, ir.memory_order(tensor))
                layout = self.labels.layout(value)
                self._kept[value] = self._put(known, self._computed[value], layout)  # its own rows as they are
        return self._kept[value]

    def _put(self, state: fx.Node, computed: fx.Node, layout: Layout) -> fx.Node:
        if len(self.space) == 1 or FLAT in layout:
            dim = layout.index(FLAT if FLAT in layout else 0)
            return self.emit(aten.index_copy_.default, state, dim, self._flat, computed)
        order, back = self._rows_first(layout)
        target, new = self.permuted(state, order), self.permuted(computed, order)
        written = self.emit(aten.index_put_.default, target, [self._entry_numbers, self._given], new)
        return self.permuted(written, back)

    def _put_chosen(self, target: fx.Node, places: fx.Node, new: fx.Node, entries: Any, heads: Any) -> fx.Node:
        """target[e, h, places[e, h]] = new[e, h], in place."""
        indexes = self._indexes.setdefault((entries, heads), [])
        if not indexes:
            device = ir.main_device_of(self.module)
            with self.graph.inserting_before(self.front):
                for size, dims in ((entries, (1, 2)), (heads, (0, 2))):
                    index = self.emit(aten.arange.default, size, device=device, pin_memory=False)
                    for dim in dims:
                        index = self.emit(aten.unsqueeze.default, index, dim)
                    indexes.append(index)
        return self.emit(aten.index_put_.default, target, [*indexes, places], new)

    def _rows_first(self, layout: Layout) -> tuple[list[int], list[int]]:
        """The order of dims with those of rows in front, and the one that leads back."""
        order = [layout.index(label) for label in (FLAT, *range(len(self.space))) if label in layout]
        order += [dim for dim in range(len(layout)) if dim not in order]
        return order, [order.index(dim) for dim in range(len(layout))]

    # ------------------------------------------------------------------------------------- gathers
    def _gather(self, source: fx.Node, layout: Layout, reader: fx.Node) -> fx.Node:
        """The computed rows of a value that exists at full length."""
        theirs = self.labels.layout(reader)
        by_entry = len(self.space) > 1 and FLAT not in layout and 0 not in layout
        key = (source, layout, theirs) if by_entry and 0 in theirs else (source, layout, ())
        if key not in self._gathered:
            self._gathered[key] = self._emit_gather(source, layout, theirs)
        return self._gathered[key]

    def _emit_gather(self, source: fx.Node, layout: Layout, theirs: Layout) -> fx.Node:
        if len(self.space) == 1 or FLAT in layout:
            dim = layout.index(FLAT if FLAT in layout else 0)
            return self.emit(aten.index_select.default, source, dim, self._flat)
        if 0 not in layout:  # the same positions for all entries
            dim = layout.index(1)
            picked = self.emit(aten.index_select.default, source, dim, self._flat_positions)
            return self._by_entry(picked, dim, theirs) if 0 in theirs else picked
        order, back = self._rows_first(layout)
        front = self.permuted(source, order)
        return self.permuted(
            self.emit(aten.index.Tensor, front, [self._entry_numbers, self._given]), back
        )  # [E, C, ..]

    # --------------------------------------------------------------------------------- all rows
    def _read_all_rows(self, node: fx.Node) -> None:
        """A reader of all rows of a dear value reads the computed ones, put where they belong."""

        def replace_operand(operand: fx.Node) -> fx.Node:
            return self._put_back(operand) if operand in self.cut.dear and ir.has_tensors(operand) else operand

        if not reads_values(node):
            return
        node.args = fx.node.map_arg(node.args, replace_operand)
        node.kwargs = fx.node.map_arg(node.kwargs, replace_operand)

    def _put_back(self, operand: fx.Node) -> fx.Node:
        if operand not in self._all_rows:
            self.origin = operand
            layout, computed = self.labels.layout(operand), self._computed[operand]
            order, back = self._rows_first(layout)
            lead = 2 if len(self.space) > 1 and FLAT not in layout else 1
            features = [self.size(ir.expr_of(rows.shape_of(operand)[dim])) for dim in order[lead:]]
            entries = [self.size(size) for size in self.space[:-1]]
            split = self.emit(aten.reshape.default, self.permuted(computed, order), [*entries, self._count, *features])
            put = self.emit(ops.put_rows, split, self._among_all, self.size(sympy.prod(self.space)))
            sizes = [self.size(ir.expr_of(rows.shape_of(operand)[dim])) for dim in order]
            full = put if lead == 1 else self.emit(aten.view.default, put, sizes)
            self._all_rows[operand] = self.permuted(full, back)
        return self._all_rows[operand]
