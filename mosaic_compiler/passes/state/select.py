"""Selected keys: a step for all rows that keeps keys which some rows attend to most, and a step for those rows.

For the rows of a block few of the keys count, and which ones changes little from step to step.  So a step for all rows
chooses them, attention by attention, and the steps that follow attend to those only.  The computed rows' own keys are
always among them; where all are chosen, the steps are those of ``keep.py`` and ``reuse.py``, number for number.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import rows
from mosaic_compiler.compat.symbols import new_number
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.emitter import SizeEmitter
from mosaic_compiler.ir.notes import StatePlace
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.chunk_loops.labels import Edge
from mosaic_compiler.passes.state.attended import Attended, attended_in, cut_for
from mosaic_compiler.passes.state.coding import Coder, Coding
from mosaic_compiler.passes.state.cut import Cut
from mosaic_compiler.passes.state.places import add_state, keep_results, note_state
from mosaic_compiler.passes.state.reuse import Rewriter
from mosaic_compiler.planning.selection import Selection

aten = torch.ops.aten

_HINT = 37
"""An example of a number of keys; a prime, so that no other size is equal to it by accident."""


@dataclass(frozen=True)
class KeepSelectedPass(Pass):
    """Return keys and values of some positions, chosen for given rows, and the positions.

    Requires: a canonical graph with a cut of attentions.  Guarantees: the same outputs, and those values behind them.

    Before::

        return attention(q, k, v)                            # k [E, G, N, d]

    After::

        def step(..., computed_rows, positions, state_k, state_v):
            chosen = select_keys(q[computed_rows], k, computed_rows, ..., S)     # [E, G, S], ascending
            return attention(q, k, v), chosen, gather(k, 2, chosen), gather(v, 2, chosen)
    """

    name: ClassVar[str] = "keep-selected"
    precision: str | None = None
    selection: Selection = field(default_factory=Selection)

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        return _rewritten(module, self.precision, self.selection, _Chooser)


@dataclass(frozen=True)
class ReuseSelectedPass(Pass):
    """As ``reuse-state``, with chosen keys: computed rows are replaced where they stand among those.

    Before::

        k = rotary(mm(h, wk))                                # h [N, D]
        return attention(q, k, v)

    After::

        def step(..., computed_rows, positions, state_k, state_v):
            place = searchsorted(positions, computed_rows)   # [E, G, C]
            k = index_put_(state_k, [.., .., place], rotary(mm(h[computed_rows], wk)))
            return attention(q, k, v)                        # C queries, S keys
    """

    name: ClassVar[str] = "reuse-selected"
    precision: str | None = None
    selection: Selection = field(default_factory=Selection)

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        return _rewritten(module, self.precision, self.selection, SelectedRewriter)


def _rewritten(
    module: fx.GraphModule,
    precision: str | None,
    selection: Selection,
    rewriter: type[_Chooser] | type[SelectedRewriter],
) -> fx.GraphModule:
    module = ir.copy_graph(module)
    cut = cut_for(module.graph, precision)
    attended, problem = attended_in(cut, precision)
    assert not problem, problem
    rewriter(module, cut, attended, selection).rewrite()
    ir.remove_dead_code(module.graph)
    module.graph.lint()
    module.recompile()
    return module


class States:
    """Inputs for the memory of what is chosen: positions, and (unless all is kept elsewhere) keys and values.

    Args:
        before: inputs of that kind that are there.

    Attributes:
        indices: for each attention, which inputs these are.
    """

    def __init__(
        self, emitter: SizeEmitter, attended: Sequence[Attended], selection: Selection, before: int = 0
    ) -> None:
        self._emitter, self._selection = emitter, selection
        self._count: fx.Node | None = None
        self.indices: dict[fx.Node, list[int]] = {}
        _, self._number = new_number(emitter.mode.shape_env, "chosen_keys", _HINT)
        coder, self._made = Coder(emitter), before
        for each in attended:
            emitter.origin = each.node
            with emitter.graph.inserting_before(each.node):
                places = self._positions(each.parts[0])
            self.indices[each.node] = [self._add(places)]
            self._read_count(self.indices[each.node][0])
            if not selection.evicts:
                continue
            with emitter.graph.inserting_before(each.node):
                for part, coding in zip(each.parts, each.codings, strict=True):
                    self.indices[each.node] += [self._add(piece) for piece in coder.encode(self._picked(part), coding)]

    def _read_count(self, index: int) -> None:
        if self._count is None:
            memory = self._emitter.graph.find_nodes(op="placeholder")[index]
            with self._emitter.graph.inserting_before(self._emitter.front):
                self._count = self._emitter.emit(aten.sym_size.int, memory, 2)
            self._emitter.know(self._number, self._count)

    @property
    def count(self) -> fx.Node:
        """How many keys are chosen."""
        assert self._count is not None
        return self._count

    def choose(self, each: Attended, query: fx.Node, key: fx.Node, more: Sequence[Any], given: fx.Node) -> fx.Node:
        """Positions of keys for some rows' queries; ``more``: what their attention takes behind keys and values."""
        selection = self._selection
        return self._emitter.emit(
            ops.select_keys, query, key, given, *each.bounds(more), each.scale, self.count, selection.score,
            selection.sets,
        )  # fmt: skip

    def _add(self, like: fx.Node) -> int:
        index = add_state(self._emitter, like, self._made)
        self._made += 1
        return index

    def _positions(self, key: fx.Node) -> fx.Node:
        """Stands for the positions of chosen keys."""
        entries, heads = ir.only_tensor(key).shape[:2]
        sizes = entries, heads if self._selection.sets == "head" else 1, self._number
        return self._stand_in(key, sizes, torch.int64)

    def _picked(self, part: fx.Node) -> fx.Node:
        """Stands for chosen rows of a value."""
        tensor = ir.only_tensor(part)
        return self._stand_in(part, (*tensor.shape[:2], self._number, tensor.shape[3]), tensor.dtype)

    def _stand_in(self, like: fx.Node, sizes: Sequence[Any], dtype: torch.dtype) -> fx.Node:
        """A node that is there for its layout only."""
        node = self._emitter.bare(aten.empty.memory_format, [])
        with self._emitter.mode:
            node.meta["val"] = ir.only_tensor(like).new_empty(sizes, dtype=dtype)
        return node


def whole_size(emitter: SizeEmitter, operand: fx.Node, dim: int) -> Any:
    """A size of an operand, as an argument."""
    return emitter.size(ir.expr_of(rows.shape_of(operand)[dim]))


def taken(emitter: SizeEmitter, source: fx.Node, positions: fx.Node, sizes: Sequence[Any]) -> fx.Node:
    """source[b, h, positions[b, h or 0, s], d]: [B, H, S, d] of a value [B, H, N, d]."""
    wide = emitter.emit(aten.expand.default, emitter.emit(aten.unsqueeze.default, positions, 3), list(sizes))
    return emitter.emit(aten.gather.default, source, 2, wide)


class _Chooser(Rewriter):
    are_all_others_kept = False

    def __init__(self, module: fx.GraphModule, cut: Cut, attended: Sequence[Attended], selection: Selection) -> None:
        super().__init__(module, cut, {})
        self._attended, self._selection = attended, selection

    def rewrite(self) -> None:
        self._add_inputs()
        coder, parts = Coder(self), []
        for each in self._attended:
            with self.graph.inserting_before(each.node.next):
                chosen = self._chosen(each)
                parts.append(chosen)
                for part, coding in zip(each.parts, each.codings, strict=True):
                    sizes = [
                        whole_size(self, part, 0),
                        whole_size(self, part, 1),
                        self._states_of.count,
                        whole_size(self, part, 3),
                    ]
                    parts += coder.encode(taken(self, part, chosen, sizes), coding)
        places = [index for each in self._attended for index in self._states_of.indices[each.node]]
        note_state(self.module, keep_results(self, self.module, parts, places))

    def _add_states(self) -> None:
        self._states_of = States(self, self._attended, self._selection)

    def _in_full(self, operand: fx.Node) -> fx.Node:
        return operand  # all rows are there

    def _chosen(self, each: Attended) -> fx.Node:
        """The positions of the keys that count for the queries of the given rows."""
        for node in _computed_again(each.node, self.order, self.cut):
            self.origin = node
            self._computed[node] = self._compute(node)
        self.origin = each.node
        (query, _, _, *more), _ = self._operands(each.node)
        return self._states_of.choose(each, query, each.parts[0], more, self._given)


def _computed_again(node: fx.Node, order: Sequence[fx.Node], cut: Cut) -> list[fx.Node]:
    """What the queries of some rows are computed from, in graph order: back to what something behind the attention
    reads as well, and is there anyway.  (To take them out of all queries would keep all of those in memory.)"""
    behind = {node}
    for other in order[order.index(node) + 1 :]:
        if behind.intersection(other.all_input_nodes):
            behind.add(other)
    found: set[fx.Node] = set()
    waiting = [node.args[0]]
    while waiting:
        value = waiting.pop()
        assert isinstance(value, fx.Node)
        is_there = bool(behind.difference((node,)).intersection(value.users)) or book.is_attention(value)
        if value in cut.inside and value not in found and not is_there and ir.has_tensors(value):
            found.add(value)
            waiting += [operand for operand, kind, _ in cut.labels.edges(value) if kind is Edge.ROW]
    return [value for value in order if value in found]


class SelectedRewriter(Rewriter):
    """Attentions read what was chosen."""

    def __init__(
        self,
        module: fx.GraphModule,
        cut: Cut,
        attended: Sequence[Attended],
        selection: Selection,
        codings: Mapping[fx.Node, Coding] = MappingProxyType({}),
    ) -> None:
        super().__init__(module, cut, codings, {each.node: each for each in attended if each.reads_codes})
        self._attended: Mapping[fx.Node, Attended] = {each.node: each for each in attended}
        self._selection = selection
        self._of_selected: dict[fx.Node, list[fx.Node]] = {}

    def _add_states(self) -> None:
        self._use(States(self, list(self._attended.values()), self._selection))

    def _use(self, states: States) -> None:
        """As memory of what was chosen."""
        self._chosen = states
        placeholders = self.graph.find_nodes(op="placeholder")
        for node, indices in states.indices.items():
            self._of_selected[node] = [placeholders[index] for index in indices]
            self._places += [StatePlace(index, None) for index in indices]

    def _compute(self, node: fx.Node) -> fx.Node:
        if node not in self._attended:
            return super()._compute(node)
        each = self._attended[node]
        positions, *memory = self._of_selected[node]
        entries, heads = whole_size(self, each.parts[0], 0), whole_size(self, each.parts[0], 1)
        places = self._places_of(positions, self.emit(aten.unsqueeze.default, self._given, 1))
        read = self._read(each, positions, memory, places)
        if node.target is ops.interval_attention:
            own = [self._computed[part] for part in each.parts]
            return self._attend_runs(
                each, positions, [*read, *own, places] if each.reads_codes else read, entries, heads
            )
        if each.reads_codes:
            return self._attend_codes(each, read, places, [self._computed[part] for part in each.parts])
        args, kwargs = self._operands_with(each, read)
        return self.emit(node.target, *args, **kwargs)

    def _read(self, each: Attended, positions: fx.Node, memory: Sequence[fx.Node], places: fx.Node) -> list[fx.Node]:
        """Codes and scales of chosen keys and values, or both as they are, with the computed rows in their places."""
        found: list[fx.Node] = []
        entries, heads = whole_size(self, each.parts[0], 0), whole_size(self, each.parts[0], 1)
        for part, coding in zip(each.parts, each.codings, strict=True):
            number = 2 if coding.has_scales else 1
            states, memory = memory[:number], memory[number:]
            new = self._computed[part]
            written = [
                self._put_chosen(state, places, piece, entries, heads)
                for state, piece in zip(states, self.coder.encode(new, coding), strict=True)
            ]
            if each.reads_codes or coding.is_exact:
                found += written
                continue
            known = self.coder.decode(written, coding, ir.only_tensor(part).dtype, range(4))
            found.append(self._put_chosen(known, places, new, entries, heads))  # its own rows as they are
        return found

    def _places_of(self, positions: fx.Node, wanted: fx.Node) -> fx.Node:
        """Where positions [E, 1, C] stand among the chosen ones [E, G or 1, S]: [E, G or 1, C]."""
        sizes = [whole_size(self, positions, 0), whole_size(self, positions, 1), whole_size(self, wanted, 2)]
        wide = self.emit(aten.clone.default, self.emit(aten.expand.default, wanted, sizes),
                         memory_format=torch.contiguous_format)  # fmt: skip
        return self.emit(aten.searchsorted.Tensor, positions, wide)

    def _attend_runs(
        self, each: Attended, positions: fx.Node, read: Sequence[fx.Node], entries: Any, heads: Any
    ) -> fx.Node:
        """Runs of positions are runs of the chosen ones, other ones for each head: heads are batch entries there.

        ``read``: keys and values; or codes and scales of both, own keys and values, and their places.
        """
        node = each.node
        parts = read[:4:2] if each.reads_codes else read
        (query, _, _, first, last, only, scale, order), _ = self._operands_with(each, parts)
        count, rows_now = self._chosen.count, whole_size(self, query, 2)
        share = int(ir.expr_of(rows.shape_of(node.args[0])[1]) / ir.expr_of(rows.shape_of(each.parts[0])[1]))
        depth, value_depth = whole_size(self, query, 3), whole_size(self, each.parts[1], 3)
        both = self.arithmetic(operator.mul, entries, heads)
        wide = self.emit(aten.clone.default, self.emit(aten.expand.default, positions, [entries, heads, count]),
                         memory_format=torch.contiguous_format)  # fmt: skip
        bounds: list[Any] = []
        for bound in (first, last):
            if bound is None:
                bounds.append(None)
                continue
            flat = self.emit(aten.expand.default, bound, [entries, heads, rows_now, 1])
            flat = self.emit(aten.reshape.default, flat, [entries, heads, rows_now])
            found = self.emit(aten.searchsorted.Tensor, wide, flat)
            bounds.append(self.emit(aten.view.default, found, [both, 1, rows_now, 1]))
        if only is not None:
            every = self.emit(aten.expand.default, only, [entries, heads, 1, whole_size(self, only, 3)])
            taken = self.emit(aten.gather.default, every, 3, self.emit(aten.unsqueeze.default, wide, 2))
            bounds.append(self.emit(aten.view.default, taken, [both, 1, 1, count]))
        else:
            bounds.append(None)
        folded = [self.emit(aten.reshape.default, query, [both, share, rows_now, depth])]
        for part in read:
            sizes = [whole_size(self, part, dim) for dim in range(2, len(rows.shape_of(part)))]
            wide = self.emit(aten.expand.default, part, [entries, heads, *sizes])
            folded.append(self.emit(aten.reshape.default, wide, [both, 1, *sizes]))
        inner = [0, 1, 2, 3]
        if each.reads_codes:
            out = self.emit(ops.coded_attention, *folded, *bounds, scale, each.codings[0].precision, inner)
        else:
            out = self.emit(ops.interval_attention, *folded, *bounds, scale, inner)
        whole = self.emit(aten.view.default, out, [entries, whole_size(self, query, 1), rows_now, value_depth])
        return self.laid_out(whole, order)
