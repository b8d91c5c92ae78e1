"""``keep-state``: a step for all rows that also returns what has to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir.emitter import SizeEmitter
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.state.attended import cut_for
from mosaic_compiler.passes.state.coding import Coder, Coding, codings_of
from mosaic_compiler.passes.state.cut import Cut
from mosaic_compiler.passes.state.places import keep_results, note_state
from mosaic_compiler.passes.state.residual import Residual, residual_in


@dataclass(frozen=True)
class KeepStatePass(Pass):
    """Return the values of the cut (``cut.py``) behind the outputs, to be written where given memory says.

    With a ``precision`` it is codes and scales of them (``coding.py``) that are kept; with ``has_residual`` also the
    last rows of what attentions read codes of, as they are (``residual.py``).

    The memory is an input for each of them that the graph itself does not touch: planning and binding put the result
    there (``STATE`` says which belongs to which), so the loops that compute keys and values write them into state.

    Requires: a canonical graph with a cut.  Guarantees: the same outputs, and those values behind them.

    Before::

        k = add(mul(h, cos), mul(rotated, sin))
        return attention(q, k, v)

    After::

        def step(..., state_k, state_v):
            return attention(q, k, v), k, v
    """

    name: ClassVar[str] = "keep-state"
    precision: str | None = None
    has_residual: bool = False

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        cut = cut_for(module.graph, self.precision)
        assert not cut.problem, cut.problem
        codings, problem = codings_of(cut, self.precision)
        assert not problem, problem
        _Keeper(module, cut, codings, residual_in(cut, self.precision, codings) if self.has_residual else []).rewrite()
        module.graph.lint()
        module.recompile()
        return module


class _Keeper(SizeEmitter):
    def __init__(
        self, module: fx.GraphModule, cut: Cut, codings: Mapping[fx.Node, Coding], residual: Sequence[fx.Node]
    ) -> None:
        super().__init__(module)
        self.module, self.cut, self.codings, self.residual = module, cut, codings, residual

    def rewrite(self) -> None:
        parts = [part for value in self.cut.values for part in self._parts(value)]
        places = keep_results(self, self.module, parts)
        if self.residual:
            memory, last = Residual(self, self.residual, len(places)), []
            for value in self.residual:
                self.origin = value
                with self.graph.inserting_before(self.graph.output_node()):
                    last.append(memory.rows_of(value))
            places += keep_results(self, self.module, last, memory.indices)
        note_state(self.module, places)

    def _parts(self, value: fx.Node) -> list[fx.Node]:
        """What is kept of a value."""
        self.origin = value
        with self.graph.inserting_before(value.next):
            return Coder(self).encode(value, self.codings[value])
