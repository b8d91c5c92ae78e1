"""``CompiledStep``: what ``torch.compile`` gets back for one graph.

It lowers the graphs of the step to data, runs them (:class:`~mosaic_compiler.runtime.engine.Step`), and keeps the
graphs for people who look at them.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.errors import FallbackError
from mosaic_compiler.ir.clusters import clusters_in, own_clusters
from mosaic_compiler.ir.loops import loop_of
from mosaic_compiler.kernels.fused import kernel_for
from mosaic_compiler.lowering.lifetimes import find_lives
from mosaic_compiler.lowering.lower import lower
from mosaic_compiler.lowering.scopes import Lives
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning.caches import POLICIES, refresh_of
from mosaic_compiler.planning.kept import KeptStep
from mosaic_compiler.planning.lowered import LoweredOp, LoweredStep
from mosaic_compiler.planning.outline import StepOutline
from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.planning.reach import Reach
from mosaic_compiler.runtime.automatic import Automatic
from mosaic_compiler.runtime.devices import check_machine
from mosaic_compiler.runtime.engine import running, within_budget
from mosaic_compiler.runtime.fallbacks import find_fallbacks, uncomputed_rows, unmet_options
from mosaic_compiler.runtime.instructions import GUARD
from mosaic_compiler.runtime.kinds import Kinds
from mosaic_compiler.runtime.link import LinkedStep
from mosaic_compiler.runtime.program import Program
from mosaic_compiler.runtime.programs import Variant
from mosaic_compiler.runtime.store import Stateful
from mosaic_compiler.runtime.symbols import hints_of, meanings_of, selected_in, symbol_readings

logger = logging.getLogger("mosaic_compiler")

__all__ = ["CompiledStep", "running", "within_budget"]


class CompiledStep(Stateful):
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
        self._on_plan, self._derive, self._prove = on_plan, derive, prove
        policy = POLICIES[options.cache]
        self.automatic: Automatic | None = None
        if policy.is_kept or (policy.is_exact and options.needed_rows != "all"):
            assert options.mask_token_id is not None
            shifted = options.needed_rows == "before_masked"
            refresh = refresh_of(options.cache_refresh)
            self.automatic = Automatic(policy, refresh, options.mask_token_id, shifted=shifted)
        self._planned_fallbacks = (
            *find_fallbacks(self.lives),
            *unmet_options(module, options),
            *uncomputed_rows(module),
        )
        self._clusters = [found for graph in reversed([*graphs.values()]) for found in clusters_in(graph)]
        self._found_late: dict[str, Fallback] = {}
        self._has_said_approximate = False
        self.options = options
        self._be_strict()
        check_machine(options.budget, self.lives.device)
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
        super().__init__(kept, {name: _variant(graph, lowered[name]) for name, graph in graphs.items()}, options)

    @functools.cached_property
    def kinds(self) -> Kinds:
        """Steps for all rows that keep state, and for some rows that use it: made of the captured graph when they are
        first asked for."""
        return self._derive()

    @functools.cached_property
    def reach(self) -> Reach | None:
        """Which rows depend on which, if not all on all."""
        return self._prove()

    def run_alone(self, inputs: Sequence[Any]) -> list[Any]:
        """A call outside of sessions; with the option ``cache``, with state of its own."""
        if self.automatic is None or (self.automatic.is_exact and self.reach is None):
            return super().run_alone(inputs)
        kinds = self.kinds
        if not kinds.keeps or kinds.ids is None:
            if kinds.is_heavy and "no-state" not in self._found_late:
                reason = kinds.why or "which input holds the token ids cannot be told"
                reason = f"nothing is kept from call to call, every row is computed: {reason}"
                self._found_late["no-state"] = Fallback("no-state", "", "", reason, "")
                logger.warning("mosaic: no-state: %s", reason)
                self._be_strict()
            return super().run_alone(inputs)
        if not self._has_said_approximate and not self.automatic.is_exact:
            self._has_said_approximate = True
            logger.info(
                "mosaic: cache=%r is an approximation: calls compute rows of masked and changed tokens (all rows: %s), "
                "and other rows stay as they were kept",
                self.options.cache,
                self.options.cache_refresh,
            )
        return self.automatic.run(kinds, inputs)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """All named fallbacks; those of fused kernels are known once the step has been bound, what opaque ops really
        return once it has run."""
        found: dict[str, Fallback] = dict(self._found_late)
        for node, cluster in self._clusters:
            failure = kernel_for(cluster).failure
            if failure is not None:
                source = ir.provenance(node).source
                found.setdefault(node.name, Fallback(failure.name, node.name, "", failure.reason, source))
        return (*self._planned_fallbacks, *found.values())

    def end_at(self, breaks: Sequence[str]) -> None:
        """Dynamo has cut the function behind this graph: what is between graphs runs in eager PyTorch.

        Raises:
            FallbackError: in strict mode.
        """
        for number, reason in enumerate(breaks):
            reason = f"{reason}: what stands between graphs runs in eager PyTorch, outside of any plan or budget"
            self._found_late[f"graph break {number}"] = Fallback("graph-break", "", "", reason, "")
        if breaks:
            self._be_strict()

    def found(self, op: LoweredOp, problem: str) -> None:
        """An op returned something else than its schema or fake kernel says: it was copied."""
        if op.name not in self._found_late:
            reason = {
                "undeclared-alias": "returns memory that is not its own, which its schema does not say: it is copied",
                "undeclared-layout": "returns other strides than its fake kernel says: it is copied",
            }[problem]
            self._found_late[op.name] = Fallback(problem, op.name, op.target, reason, op.source)
            self._be_strict()

    def unrecorded(self, problem: str) -> None:
        """A program that was to be replayed runs call by call."""
        if "not-recorded" not in self._found_late:
            self._found_late["not-recorded"] = Fallback("not-recorded", "", "", problem, "")
            logger.info("mosaic: not-recorded: %s", problem)

    def _be_strict(self) -> None:
        if self.options.strict and (found := self.fallbacks):
            raise FallbackError(
                "strict mode: " + "; ".join(f"{f.name}: {f.node} ({f.reason}) {f.source}" for f in found)
            )

    def planned(self, plan: MemoryPlan) -> None:
        """A new plan was made."""
        self._on_plan(plan, self.fallbacks)

    def bound(self, program: Program) -> None:
        """A new program was bound: a kernel that does not compile is found out then."""
        if self.options.strict:
            program.finish()
            self._be_strict()


def _variant(module: fx.GraphModule, lowered: LoweredStep) -> Variant:
    """One graph, linked."""
    clusters = {lowered.graph: own_clusters(module)}
    for node in module.graph.nodes:
        if (loop := loop_of(node)) is not None:
            clusters[lowered.loops[node.name].body] = own_clusters(loop.body)
    constants = {name: operator.attrgetter(name)(module) for name in lowered.constants}
    return Variant(LinkedStep(lowered, clusters, constants))
