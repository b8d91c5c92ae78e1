"""``Step``: a lowered step that runs.

A call looks up, or makes, two things, the one more general than the other: the plan for these sizes and this budget,
and the program bound to these weights and this arena.  Then it runs the program.  Nothing is ever recompiled for a new
length or budget, and nothing here knows a graph.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning.kept import KeptStep
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.lowered import LoweredGraph, LoweredOp
from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.planning.planner import Planned
from mosaic_compiler.planning.room import capacity
from mosaic_compiler.runtime.arena import Arena
from mosaic_compiler.runtime.devices import free_memory
from mosaic_compiler.runtime.observers import Observers
from mosaic_compiler.runtime.pools import ArenaPool, pool_for
from mosaic_compiler.runtime.program import Program, bind
from mosaic_compiler.runtime.programs import Bound, Programs, Variant
from mosaic_compiler.runtime.rehearsal import Rehearsal
from mosaic_compiler.runtime.symbols import reader_of
from mosaic_compiler.runtime.weights import Weights
from mosaic_compiler.waiting import doing

_budget: ContextVar[int | None] = ContextVar("memory_budget", default=None)


@contextmanager
def within_budget(nbytes: int | None) -> Iterator[None]:
    """Steps that this thread runs inside of the ``with`` block are planned for ``nbytes``, whatever their option
    ``memory_budget`` says; ``None``: as it says."""
    token = _budget.set(nbytes)
    try:
        yield
    finally:
        _budget.reset(token)


_held: ContextVar[int] = ContextVar("held_for_state", default=0)


@contextmanager
def holding(nbytes: int) -> Iterator[None]:
    """So many bytes of what a step that this thread runs inside of the ``with`` block needs are there already: they are
    no longer free, and in its plan."""
    token = _held.set(nbytes)
    try:
        yield
    finally:
        _held.reset(token)


def running(observe: Callable[[Step], None]) -> AbstractContextManager[None]:
    """Call ``observe`` with every step that this thread runs inside of the ``with`` block, when it begins."""
    return _running.told(observe)


_running: Observers[Step] = Observers()


class Step:
    """One graph of a caller's: call it with the list of graph inputs, get the list of outputs.

    Args:
        kept: the step as data.
        variants: its graphs, linked, by the names of their recipes.

    Attributes:
        outline: the step as planning sees it.
        planner: plans the graph that is always there.
        plan: the plan of the last call, ``None`` before the first.
        replays: on a GPU, programs are recorded and replayed.
    """

    _boxed_call = True

    def __init__(self, kept: KeptStep, variants: Mapping[str, Variant], options: MosaicOptions) -> None:
        self.kept, self.variants, self.options = kept, variants, options
        self.outline, self.planner = kept.outline, kept.outline.planner
        self.plan: MemoryPlan | None = None
        self.replays = False
        preferred, main = next(iter(variants.values())), [*variants.values()][-1]
        self.device = main.linked.device
        self._prologue = main.prologue
        self._readers = [(reading.symbol, reader_of(reading)) for reading in kept.readings]
        self._weights = Weights(main.linked.step.graph.inputs, kept.static)
        self._static = kept.static
        self._rehearsal = Rehearsal(preferred.linked.graph, [symbol for symbol, _ in self._readers])
        self._plans: dict[tuple[int | None, ...], tuple[Variant, Planned]] = {}
        self._programs = Programs(self._prologue.symbols)
        self._registered: set[ArenaPool] = set()

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """What plans do not fully cover, as far as it is known."""
        return ()

    @property
    def main_graph(self) -> LoweredGraph:
        """The graph that is always there."""
        return [*self.kept.variants.values()][-1].graph

    def planned(self, plan: MemoryPlan) -> None:
        """A new plan was made."""

    def found(self, op: LoweredOp, problem: str) -> None:
        """An op returned something else than its schema or fake kernel says: it was copied."""

    def unrecorded(self, problem: str) -> None:
        """A program that was to be replayed runs call by call."""

    def bound(self, program: Program) -> None:
        """A new program was bound."""

    @property
    def _pool(self) -> ArenaPool:
        """The arenas of the device (of the current stream); they keep their memory while this step is alive."""
        pool = pool_for(self.device)
        if pool not in self._registered:
            self._registered.add(pool)
            pool.register(self)
        return pool

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        pointers = tuple([inputs[i].data_ptr() for i in self._static])
        numbers = tuple([read(inputs) for _, read in self._readers])
        _running.tell(self)
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
            results = program.run(values)
            if program.recorder is not None and program.recorder.problem:
                self.unrecorded(program.recorder.problem)
            return results

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
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _bind(self, arena: Arena, sizes: Sizes, variant: Variant, planned: Planned, values: Sequence[Any]) -> Bound:
        """A program for these sizes; forgets stale programs."""
        self._weights.check(values, sizes)
        self._programs.make_space(self.options.program_cache)
        program = bind(
            variant.linked,
            planned.plan,
            self._with_chunks(sizes, planned),
            values,
            frozenset(self._static),
            arena,
            poison=self.kept.outline.guard > 0,
            found=self.found,
        )
        if self.replays and self.device.type == "cuda" and not self.kept.outline.guard:
            program.record(self._static, self.device)
        self.bound(program)
        weights = [(weakref.ref(values[i]), values[i].data_ptr()) for i in self._static]
        return Bound(variant, planned, program, weights)

    def numbers(self, inputs: Sequence[Any]) -> Sizes:
        """The symbols that the inputs say (those that are there: state may be missing)."""
        known = zip(self.kept.readings, self._readers, strict=True)
        return Sizes({symbol: read(inputs) for reading, (symbol, read) in known if reading.index < len(inputs)})

    def forget(self, inputs: Sequence[Any]) -> None:
        """Drop programs that are bound to one of these tensors."""
        given = {id(tensor) for tensor in inputs}
        for key in [
            key for key, bound in self._programs.items() if any(id(ref()) in given for ref, _ in bound.weights)
        ]:
            del self._programs[key]

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
        if self.budget is not None or not self.planner.lives.chunks:
            return self.budget
        return free_memory(self.device, self._pool.reserved() + _held.get())

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
            with doing("planning"):
                planned = self._plans[key] = self.choose(sizes, limit)
            if len(self._plans) > 4 * self.options.program_cache:
                self._plans.pop(next(iter(self._plans)))
            self.planned(planned[1].plan)
        return planned

    def choose(self, sizes: Sizes, budget: int | None) -> tuple[Variant, Planned]:
        """The first graph that fits the budget (see :meth:`StepOutline.choose`)."""
        name, planned = self.outline.choose(sizes, budget)
        return self.variants[name], planned


def _values(variant: Variant, inputs: Sequence[Any], early: Mapping[str, Any]) -> list[Any]:
    """What a program is called with."""
    return [*inputs, *(early[name] for name in variant.prologue.results)]
