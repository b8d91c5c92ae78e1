"""``CompiledStep``: what ``torch.compile`` gets back for one graph.

A call looks up, or makes, three things of decreasing generality: the plan for these sizes and this budget, the program
bound to these weights and this arena, and then runs the program.  Nothing is ever recompiled for a new length or
budget.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.errors import FallbackError, StaleGraphError
from mosaic_compiler.ir.clusters import clusters_in
from mosaic_compiler.kernels.fused import kernel_for
from mosaic_compiler.lowering.scopes import Lives
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning import MemoryPlan
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.outline import StepOutline, capacity
from mosaic_compiler.planning.plan import Fallback
from mosaic_compiler.planning.planner import Planned
from mosaic_compiler.runtime.arena import Arena
from mosaic_compiler.runtime.devices import check_machine, free_memory
from mosaic_compiler.runtime.fallbacks import find_fallbacks, unmet_options
from mosaic_compiler.runtime.instructions import GUARD
from mosaic_compiler.runtime.pools import ArenaPool, pool_for
from mosaic_compiler.runtime.program import bind
from mosaic_compiler.runtime.programs import Bound, Programs, Variant
from mosaic_compiler.runtime.rehearsal import Rehearsal
from mosaic_compiler.runtime.symbols import hints_of, meanings_of, selected_in, symbol_readers

_budget: ContextVar[int | None] = ContextVar("memory_budget", default=None)
_running = threading.local()


@contextmanager
def within_budget(nbytes: int | None) -> Iterator[None]:
    """Steps that this thread runs inside of the ``with`` block are planned for ``nbytes``, whatever their option
    ``memory_budget`` says; ``None``: as it says."""
    token = _budget.set(nbytes)
    try:
        yield
    finally:
        _budget.reset(token)


@contextmanager
def running(observe: Callable[[CompiledStep], None]) -> Iterator[None]:
    """Call ``observe`` with every step that this thread runs inside of the ``with`` block, when it begins."""
    stack = _running.__dict__.setdefault("stack", [])
    stack.append(observe)
    try:
        yield
    finally:
        stack.remove(observe)


class CompiledStep:
    """One compiled graph: call it with the list of graph inputs, get the list of outputs.

    Attributes:
        variants: its graphs by the names of their recipes, the preferred ones first (see ``recipes.py``).
        module: the last of them, after all passes; it still runs by itself.
        captured: the graph before them.
        outline: the step as planning sees it.
        planner: plans its loops.
        lives, fallbacks, passes: what planning and ``explain()`` know about it.
        plan: the plan of the last call, ``None`` before the first.
    """

    _boxed_call = True

    def __init__(
        self,
        graphs: Mapping[str, fx.GraphModule],
        options: MosaicOptions,
        passes: Sequence[Any] = (),
        static_inputs: Sequence[int] = (),
        on_plan: Callable[[MemoryPlan, Sequence[Fallback]], None] = lambda plan, fallbacks: None,
        captured: fx.GraphModule | None = None,
    ) -> None:
        *_, module = graphs.values()
        self.module, self.options, self.passes = module, options, tuple(passes)
        self.captured = captured if captured is not None else module
        self.variants = {name: Variant.of(graph) for name, graph in graphs.items()}
        *_, main = self.variants.values()
        self.lives: Lives = main.lives
        self._planned_fallbacks = find_fallbacks(self.lives) + unmet_options(module, options)
        self._clusters = [found for graph in reversed([*graphs.values()]) for found in clusters_in(graph)]
        self._found_late: dict[str, Fallback] = {}
        self._be_strict()
        self.plan: MemoryPlan | None = None
        self._on_plan = on_plan
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._static = tuple(i for i in static_inputs if ir.tensor_of(placeholders[i]) is not None)
        weights = [(i, placeholders[i].name, ir.only_tensor(placeholders[i])) for i in self._static]
        self._weights = tuple((*weight, _exactly(weight[-1])) for weight in weights)
        check_machine(options.budget, self.lives.device)
        self._prologue = main.prologue
        self.outline = StepOutline(
            {name: variant.lives for name, variant in self.variants.items()},
            hints_of(module),
            selected_in(module),
            placement=options.placement,
            deadline=options.placement_deadline,
            chunk_rows=options.chunk_rows,
            guard=GUARD if options.poison else 0,
            meanings=meanings_of(module),
        )
        self.planner = self.outline.planner
        self._readers = symbol_readers(module, placeholders, self._prologue.symbols)
        preferred = next(iter(graphs.values()))
        self._rehearsal = Rehearsal(preferred.graph, [symbol for symbol, _ in self._readers])
        self._plans: dict[tuple[int | None, ...], tuple[Variant, Planned]] = {}
        self._programs = Programs(self._prologue.symbols)
        self._registered: set[ArenaPool] = set()

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

    def _found(self, node: fx.Node, problem: str) -> None:
        """An op returned something else than its schema or fake kernel says: it was copied."""
        if node.name not in self._found_late:
            reason = {
                "undeclared-alias": "returns memory that is not its own, which its schema does not say: it is copied",
                "undeclared-layout": "returns other strides than its fake kernel says: it is copied",
            }[problem]
            source = ir.provenance(node).source
            self._found_late[node.name] = Fallback(problem, node.name, str(node.target), reason, source)
            self._be_strict()

    def _be_strict(self) -> None:
        if self.options.strict and (found := self.fallbacks):
            raise FallbackError(
                "strict mode: " + "; ".join(f"{f.name}: {f.node} ({f.reason}) {f.source}" for f in found)
            )

    @property
    def _pool(self) -> ArenaPool:
        """The arenas of the device (of the current stream); they keep their memory while this step is alive."""
        pool = pool_for(self.lives.device)
        if pool not in self._registered:
            self._registered.add(pool)
            pool.register(self)
        return pool

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        pointers = tuple([inputs[i].data_ptr() for i in self._static])
        numbers = tuple([read(inputs) for _, read in self._readers])
        for notify in getattr(_running, "stack", ()):
            notify(self)
        with self._pool.lease() as arena:
            place = (arena.number, self.budget)
            early, counts = self._prologue.run(inputs, self._programs.room(place, numbers, pointers))
            sizes = self.sizes(numbers, counts)
            room = tuple([capacity(count) for count in counts])
            key = self._programs.serving((place, numbers, room, pointers))
            bound = self._programs.get(key)
            if bound is None:
                roomy = self.sizes(numbers, room)
                bound = self._programs[key] = self._new(arena, sizes, roomy, inputs, early)
            else:
                self._programs.move_to_end(key)
            planned, program = bound.planned, bound.program
            values = _values(bound.variant, inputs, early)
            del early
            arena.ensure(planned.plan.height)
            program.resize(self._with_chunks(sizes, planned))
            self.plan = program.plan
            return program.run(values)

    def _new(self, arena: Arena, sizes: Sizes, roomy: Sizes, inputs: Sequence[Any], early: Mapping[str, Any]) -> Bound:
        """A program for these sizes, in a plan with room for a few more rows.  What cuDNN has to prepare for them it
        prepares meanwhile."""
        limits = self.budget, self._limit()
        make = functools.partial(self._make, arena, sizes, roomy, inputs, early, limits)
        rehearse = self._rehearsal.of(sizes, arena, self.budget)
        if rehearse is None:
            return make()
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(make, is_whole=True)
            rehearse()
            return made.result()

    def _make(
        self,
        arena: Arena,
        sizes: Sizes,
        roomy: Sizes,
        inputs: Sequence[Any],
        early: Mapping[str, Any],
        limits: tuple[int | None, int | None],
        is_whole: bool = False,
    ) -> Bound:
        """Plan, compile kernels, bind: all of it, or (unless ``is_whole``) the rest while the program runs."""
        variant, planned = self.plan_for(roomy, *limits)
        with self._on_device():
            # before the arena grows: compilers need memory as well
            variant.compile_kernels(self._with_chunks(roomy, planned))
        if arena.moves:
            arena.ensure(planned.plan.height)
        bound = self._bind(arena, sizes, variant, planned, _values(variant, inputs, early))
        if is_whole:
            bound.program.finish()
        return bound

    def _on_device(self) -> AbstractContextManager[Any]:
        """The step's device is current (in another thread than the caller's it need not be)."""
        return torch.cuda.device(self.lives.device) if self.lives.device.type == "cuda" else nullcontext()

    def _bind(self, arena: Arena, sizes: Sizes, variant: Variant, planned: Planned, values: Sequence[Any]) -> Bound:
        """A program for these sizes; forgets stale programs."""
        self._check_weights(sizes, values)
        self._programs.make_space(self.options.program_cache)
        program = bind(
            variant.module,
            variant.lives,
            planned.plan,
            self._with_chunks(sizes, planned),
            values,
            frozenset(self._static),
            arena,
            varying=frozenset(variant.prologue.symbols),
            early=variant.prologue.results,
            poison=self.options.poison,
            found=self._found,
        )
        if self.options.strict:  # a kernel that does not compile is found out when it is bound
            program.finish()
            self._be_strict()
        weights = [(weakref.ref(values[i]), values[i].data_ptr()) for i in self._static]
        return Bound(variant, planned, program, weights)

    def _check_weights(self, sizes: Sizes, values: Sequence[Any]) -> None:
        """Dynamo may take a module's parameters for immutable, and not look at what their ``.data`` is now."""
        for index, name, expected, exactly in self._weights:
            if exactly is not None and _exactly(values[index]) == exactly:
                continue  # the quick way: this is asked of hundreds of weights for every length
            was, now = _layout(expected, sizes), _layout(values[index], sizes)
            if was != now:
                raise StaleGraphError(
                    f"{name} was compiled as (dtype, device, sizes, strides) {was}, and now is {now}: call "
                    "torch._dynamo.reset() after such a change, or set "
                    "torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False before compiling"
                )

    def sizes(self, numbers: Sequence[int], counts: Sequence[int]) -> Sizes:
        """Values for all symbols: of the inputs' sizes, and of the numbers of computed rows."""
        values = dict(zip([symbol for symbol, _ in self._readers], numbers, strict=True))
        return Sizes(values | dict(zip(self._prologue.symbols, counts, strict=True)))

    def _with_chunks(self, sizes: Sizes, planned: Planned) -> Sizes:
        return Sizes(sizes.symbols | dict(planned.chunks))

    @property
    def budget(self) -> int | None:
        """Bytes that the next call of this thread may need (see :func:`within_budget`)."""
        given = _budget.get()
        return self.options.budget if given is None else given

    def _limit(self) -> int | None:
        """Bytes that a plan made now may need: of the budget, or what is free."""
        if self.budget is not None or not self.lives.chunks:
            return self.budget
        return free_memory(self.lives.device, self._pool.reserved())

    def plan_for(self, sizes: Sizes, budget: int | None, limit: int | None) -> tuple[Variant, Planned]:
        """The verified plan for these sizes, made once for each budget, and the graph that it is for.

        Args:
            limit: the budget; without one, what is free if the plan is made now.

        Raises:
            BudgetError: if no chunk sizes fit the memory budget.
        """
        key = (budget, *(sizes(symbol) for symbol in self.planner.symbols))
        planned = self._plans.get(key)
        if planned is None:
            planned = self._plans[key] = self.choose(sizes, limit)
            if len(self._plans) > 4 * self.options.program_cache:
                self._plans.pop(next(iter(self._plans)))
            self._on_plan(planned[1].plan, self.fallbacks)
        return planned

    def choose(self, sizes: Sizes, budget: int | None) -> tuple[Variant, Planned]:
        """The first graph that fits the budget (see :meth:`StepOutline.choose`)."""
        name, planned = self.outline.choose(sizes, budget)
        return self.variants[name], planned


def _values(variant: Variant, inputs: Sequence[Any], early: Mapping[str, Any]) -> list[Any]:
    """What a program is called with."""
    return [*inputs, *(early[node.name] for node in variant.prologue.results)]


def _exactly(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Dtype, device, sizes and strides; ``None`` if they depend on symbols."""
    shape, stride = tensor.shape, tensor.stride()
    numbers = all(type(number) is int for number in (*shape, *stride))
    return (tensor.dtype, tensor.device, shape, stride) if numbers else None


def _layout(tensor: Any, sizes: Sizes) -> tuple[Any, ...]:
    """Dtype, device, sizes and strides as numbers; the stride of a size of 0 or 1 does not count."""
    shape = [sizes(size) for size in tensor.shape]
    strides = [sizes(step) if size > 1 else 0 for size, step in zip(shape, tensor.stride(), strict=True)]
    return str(tensor.dtype), str(tensor.device), shape, strides
