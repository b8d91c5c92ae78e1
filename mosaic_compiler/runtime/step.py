"""``CompiledStep``: what ``torch.compile`` gets back for one graph.

It lowers the graphs of the step to data, runs them (:class:`~mosaic_compiler.runtime.engine.Step`), and keeps the
graphs for people who look at them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.compat.symbols import conditions_in
from mosaic_compiler.ir.clusters import own_clusters
from mosaic_compiler.ir.loops import loop_of
from mosaic_compiler.kernels.fused import FusedUse
from mosaic_compiler.lowering.lifetimes import find_lives
from mosaic_compiler.lowering.lower import lower
from mosaic_compiler.lowering.scopes import Lives
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning.kept import KeptStep
from mosaic_compiler.planning.lowered import LoweredStep
from mosaic_compiler.planning.outline import StepOutline
from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.planning.reach import Reach
from mosaic_compiler.runtime.engine import running, within_budget
from mosaic_compiler.runtime.fallbacks import find_fallbacks, uncomputed_rows, unmet_options
from mosaic_compiler.runtime.instructions import GUARD
from mosaic_compiler.runtime.kinds import Kinds
from mosaic_compiler.runtime.link import LinkedStep
from mosaic_compiler.runtime.named import NamedStep
from mosaic_compiler.runtime.programs import Variant
from mosaic_compiler.runtime.symbols import hints_of, meanings_of, selected_in, symbol_readings

__all__ = ["CompiledStep", "running", "within_budget"]


class CompiledStep(NamedStep):
    """One compiled graph: call it with the list of graph inputs, get the list of outputs.

    Attributes:
        graphs: its graphs by the names of their recipes, the preferred ones first (see ``recipes.py``).
        module: the last of them, after all passes; it still runs by itself.
        captured: the graph before them.
        lives, fallbacks, passes: what planning and ``explain()`` know about it.
    """

    def __init__(
        self,
        graphs: Mapping[str, fx.GraphModule],
        options: MosaicOptions,
        passes: Sequence[Any] = (),
        static_inputs: Sequence[int] = (),
        on_plan: Callable[[MemoryPlan, Sequence[Fallback]], None] = lambda plan, fallbacks: None,
        captured: fx.GraphModule | None = None,
        derive: Callable[[], Kinds] = Kinds,
        prove: Callable[[], Reach | None] = lambda: None,
    ) -> None:
        *_, module = graphs.values()
        self.graphs, self.module, self.passes = graphs, module, tuple(passes)
        self.captured = captured if captured is not None else module
        lives = {name: find_lives(graph) for name, graph in graphs.items()}
        self.lives: Lives = [*lives.values()][-1]
        self._on_plan = on_plan
        lowered = {name: lower(graph, lives[name]) for name, graph in graphs.items()}
        placeholders = module.graph.find_nodes(op="placeholder")
        outline = StepOutline(
            dict(lives),
            hints_of(module),
            selected_in(module),
            placement=options.placement,
            deadline=options.placement_deadline,
            chunk_rows=options.chunk_rows,
            guard=GUARD if options.poison else 0,
            meanings=meanings_of(module),
        )
        kept = KeptStep(
            lowered,
            outline,
            symbol_readings(module, placeholders, lowered[[*lowered][-1]].symbols),
            tuple(i for i in static_inputs if ir.tensor_of(placeholders[i]) is not None),
        )
        fallbacks = (*find_fallbacks(self.lives), *unmet_options(module, options), *uncomputed_rows(module))
        variants = {name: _variant(graph, lowered[name]) for name, graph in graphs.items()}
        super().__init__(kept, variants, options, fallbacks, derive, prove)

    @property
    def conditions(self) -> list[Any]:
        """What was taken for granted of the sizes of its inputs."""
        mode = ir.fake_mode_of(self.captured)
        return conditions_in(None if mode is None else mode.shape_env)

    def planned(self, plan: MemoryPlan) -> None:
        """A new plan was made."""
        self._on_plan(plan, self.fallbacks)


def _variant(module: fx.GraphModule, lowered: LoweredStep) -> Variant:
    """One graph, linked."""
    clusters = {lowered.graph: _uses(module)}
    for node in module.graph.nodes:
        if (loop := loop_of(node)) is not None:
            clusters[lowered.loops[node.name].body] = _uses(loop.body)
    constants = {name: operator.attrgetter(name)(module) for name in lowered.constants}
    return Variant(LinkedStep(lowered, clusters, constants))


def _uses(module: fx.GraphModule) -> dict[str, FusedUse]:
    return {name: FusedUse(cluster) for name, cluster in own_clusters(module).items()}
