"""Chosen keys that are read where all are kept: a step for some rows that chooses, and one that reads what was chosen.

State is that of ``keep.py``, for all rows, as it is or in codes, and positions beside it.  The first step for the rows
of a block attends to all keys and chooses among them; those that follow gather.  Nothing is lost, so the next block
chooses anew without a step for all rows (arXiv 2602.14209 does so where rows see blocks up to their own, and keys stay
exact).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.state.attended import Attended, attended_in, cut_for, reading_codes
from mosaic_compiler.passes.state.coding import Coding, codings_of
from mosaic_compiler.passes.state.cut import Cut
from mosaic_compiler.passes.state.places import keep_results, note_state
from mosaic_compiler.passes.state.reuse import Rewriter
from mosaic_compiler.passes.state.select import SelectedRewriter, States, taken, whole_size
from mosaic_compiler.planning.selection import Selection

_READS = Selection(evicts=False)


@dataclass(frozen=True)
class ChooseKeysPass(Pass):
    """As ``reuse-state``, and the positions of the keys that the computed rows attend to most.

    Row numbers are ascending, the last one may come again.

    Requires: a canonical graph with a cut of attentions.  Guarantees: the outputs of ``reuse-state``, and the positions
    behind them.

    Before::

        return attention(q, k, v)                           # k [E, G, N, d]

    After::

        def step(..., computed_rows, state_k, state_v, positions):
            k = index_copy_(state_k, ..)                    # and v
            chosen = select_keys(q, k, computed_rows, ..., S)            # [E, G, S], ascending
            return attention(q, k, v), chosen               # C queries, N keys
    """

    name: ClassVar[str] = "choose-keys"
    precision: str | None = None
    selection: Selection = _READS

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        return _rewritten(module, self.precision, self.selection, _Chooser)


@dataclass(frozen=True)
class ReadChosenPass(Pass):
    """As ``reuse-state``, but attentions read chosen keys of all those that are kept; the computed rows are among them.

    Before::

        return attention(q, k, v)                           # k [E, G, N, d]

    After::

        def step(..., computed_rows, state_k, state_v, positions):
            k = index_copy_(state_k, ..)                    # and v
            return attention(q, gather(k, 2, positions), gather(v, 2, positions))          # C queries, S keys
    """

    name: ClassVar[str] = "read-chosen"
    precision: str | None = None
    selection: Selection = _READS

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        return _rewritten(module, self.precision, self.selection, _Reader)


def _rewritten(
    module: fx.GraphModule, precision: str | None, selection: Selection, rewriter: type[_Chooser] | type[_Reader]
) -> fx.GraphModule:
    module = ir.copy_graph(module)
    cut = cut_for(module.graph, precision)
    attended, problem = attended_in(cut, precision)
    assert not problem, problem
    codings, problem = codings_of(cut, precision)
    assert not problem, problem
    reads = reading_codes(cut, precision, codings)
    as_read = [reads.get(each.node, replace(each, codings=(Coding(None), Coding(None)))) for each in attended]
    rewriter(module, cut, as_read, selection, codings).rewrite()
    ir.remove_dead_code(module.graph)
    module.graph.lint()
    module.recompile()
    return module


class _Chooser(Rewriter):
    def __init__(
        self,
        module: fx.GraphModule,
        cut: Cut,
        attended: Sequence[Attended],
        selection: Selection,
        codings: Mapping[fx.Node, Coding],
    ) -> None:
        super().__init__(module, cut, codings, {each.node: each for each in attended if each.reads_codes})
        self._attended: Mapping[fx.Node, Attended] = {each.node: each for each in attended}
        self._selection = selection
        self._chosen: list[fx.Node] = []

    def rewrite(self) -> None:
        super().rewrite()
        places = [self._positions.indices[node][0] for node in self._attended]
        note_state(self.module, [*self._places, *keep_results(self, self.module, self._chosen, places)])

    def _add_states(self) -> None:
        super()._add_states()
        self._positions = States(self, list(self._attended.values()), self._selection, len(self._places))

    def _compute(self, node: fx.Node) -> fx.Node:
        found = super()._compute(node)
        if node in self._attended:
            self._chosen.append(self._choose(self._attended[node]))
        return found

    def _choose(self, each: Attended) -> fx.Node:
        """Positions of keys; those that are kept in codes are decoded, one attention at a time."""
        key = self._in_full(each.parts[0])
        (query, _, _, *more), _ = self._operands_with(each, [key, key])
        return self._positions.choose(each, query, key, more, self._given)


class _Reader(SelectedRewriter):
    def _add_states(self) -> None:
        Rewriter._add_states(self)
        positions = States(self, list(self._attended.values()), self._selection, len(self._places))
        self._use(positions)

    def _read(self, each: Attended, positions: fx.Node, memory: Sequence[fx.Node], places: fx.Node) -> list[fx.Node]:
        if each.reads_codes:
            pieces = [piece for part in each.parts for piece in self._written[part]]
        else:
            pieces = [self._in_full(part) for part in each.parts]
        lead = [whole_size(self, each.parts[0], 0), whole_size(self, each.parts[0], 1), self._chosen.count]
        return [taken(self, piece, positions, [*lead, whole_size(self, piece, 3)]) for piece in pieces]
