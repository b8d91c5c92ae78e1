"""A program: one step, bound to one arena, one plan and one set of weights.

Binding does all the work that does not depend on the caller's data: views are made, sizes are numbers,
every call is a ``functools.partial`` with its destination.  A step is then a walk over a flat list.  What was not
bound before the first run is bound as it goes.

What cannot be bound is read from ``slots`` when it is needed: the caller's inputs, outputs (fresh
memory per call, because the caller keeps them) and results of opaque ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.compat.tracing import tree_flatten
from mosaic_compiler.errors import ArenaError
from mosaic_compiler.kernels import attention
from mosaic_compiler.lowering.scopes import Lives
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.runtime.arena import Arena
from mosaic_compiler.runtime.binder import Binder, Shared
from mosaic_compiler.runtime.instructions import Instruction, Slot, drop
from mosaic_compiler.runtime.loops import bind_loop
from mosaic_compiler.runtime.watched import Found


class Program:
    """A step, bound while it runs for the first time.  Not thread-safe: the arena's lease serialises calls.

    Attributes:
        plan: the memory plan it runs in.
        instructions: prebound calls, in schedule order.
        outputs: what the step returns, as slots, tensors and numbers; ``None`` while something is not bound: before the
            first run (or :meth:`finish`), and when :meth:`resize` has changed something.
    """

    def __init__(self, binder: _StepBinder) -> None:
        self._binder = binder
        self.plan = binder.plan
        self.slots = binder.shared.slots
        self.instructions: list[Instruction] = []
        self.fixed = binder.shared.fixed
        self._inputs = binder.inputs
        self.outputs: list[Any] | None = None
        self._checked = False

    @property
    def sizes(self) -> Sizes:
        """What it is bound for."""
        return self._binder.sizes

    def resize(self, sizes: Sizes) -> None:
        """Bind again, in the next run, what depends on the number of computed rows; the plan must have room for it."""
        if sizes.symbols != self._binder.sizes.symbols:
            self._binder.resize(sizes)
            self.outputs = None

    def finish(self) -> None:
        """Bind what is not bound yet."""
        with torch.no_grad():
            for node in self._binder.calls:
                self._binder.bind_pending(node)
        self.outputs = self._load()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the step.  ``inputs`` are the graph's placeholders, then the prologue's results.

        What has to be bound is bound node by node, right before it runs: a GPU is busy with the first nodes while later
        ones are bound.
        """
        slots = self.slots
        try:
            slots[: self._inputs] = inputs
            with torch.no_grad():
                if self.outputs is None:
                    self.outputs = self._bind_and_run()
                else:
                    for instruction in self.instructions:
                        instruction()
            if not self._checked:
                self._check_destinations()
            return [slots[out.index] if type(out) is Slot else out for out in self.outputs]
        finally:
            slots[:] = [None] * len(slots)

    def _bind_and_run(self) -> list[Any]:
        binder = self._binder
        for node, calls in binder.calls.items():
            if node in binder.pending:
                calls = binder.bind_pending(node)
            for call in calls:
                call()
        return self._load()

    def _load(self) -> list[Any]:
        """All is bound: the flat list of calls, and what the step returns."""
        binder = self._binder
        self.instructions = [call for calls in binder.calls.values() for call in calls]
        self._checked = False
        return binder.outputs()

    def _check_destinations(self) -> None:
        """An op that got an ``out=`` of the wrong shape resizes it, with only a warning.  Look once."""
        for tensor, pointer, shape in self.fixed.values():
            if tensor.data_ptr() != pointer or tensor.shape != shape:
                raise ArenaError(f"an operation resized its destination from {tuple(shape)} to {tuple(tensor.shape)}")
        self._checked = True


def bind(
    module: fx.GraphModule,
    lives: Lives,
    plan: MemoryPlan,
    sizes: Sizes,
    inputs: Sequence[Any],
    static: frozenset[int],
    arena: Arena,
    *,
    varying: frozenset[sympy.Symbol] = frozenset(),
    early: Sequence[fx.Node] = (),
    poison: bool = False,
    found: Found = lambda node, problem: None,
) -> Program:
    """Bind a graph to an arena.

    Args:
        module: the graph after all passes.
        lives: its lives; ``plan`` is their placement for ``sizes`` (or for more rows).
        inputs: this call's inputs (placeholders, then the results of the prologue); those at the
            ``static`` positions (weights) are bound for good.
        varying: symbols that :meth:`Program.resize` may change.
        early: the prologue nodes whose results follow the placeholders.
        poison: fill buffers at birth and death, check canaries (the plan must have been made with
            :data:`GUARD` bytes behind each arena buffer).
        found: see :class:`Shared`.
    """
    placed = {buffer.name: buffer for buffer in plan.buffers}
    shared = Shared(arena, placed, lives.loops, [None] * len(inputs), poison, found)
    return Program(_StepBinder(module, lives, plan, sizes, inputs, static, shared, varying, early))


class _StepBinder(Binder):
    """Binds the step's own graph, some of it again when the number of computed rows changes.

    Attributes:
        calls: each node's calls, in schedule order.
        pending: nodes that are to be bound, or bound again; all of them until a run has bound the last one.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        lives: Lives,
        plan: MemoryPlan,
        sizes: Sizes,
        inputs: Sequence[Any],
        static: frozenset[int],
        shared: Shared,
        varying: frozenset[sympy.Symbol],
        early: Sequence[fx.Node],
    ) -> None:
        super().__init__(module, lives.scope, sizes, shared)
        self.plan, self.inputs = plan, len(inputs)  # only their number is kept, so that no caller's tensor is
        self.calls: dict[fx.Node, list[Instruction]] = {node: [] for node in lives.nodes}
        self.pending = set(lives.nodes)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        for index, node in enumerate(placeholders):
            self.values[node] = self._placeholder(node, index, inputs[index], static)
        for index, node in enumerate(early, len(placeholders)):
            self.values[node] = Slot(index)
        self._varying = varying
        self._depending = lives.depending_on(varying)

    def resize(self, sizes: Sizes) -> None:
        """Other numbers of computed rows: what depends on them is pending."""
        self.sizes = sizes
        self.pending.update(self._depending)

    def bind_pending(self, node: fx.Node) -> list[Instruction]:
        """The node's calls, bound if that is pending.  Views must not be inference tensors: later calls may be made
        outside of ``torch.inference_mode()``, and write to them."""
        if node in self.pending:
            self.instructions = self.calls[node] = []
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    self.bind_node(node)
            else:
                self.bind_node(node)
            self.pending.remove(node)
        return self.calls[node]

    def _loop(self, node: fx.Node) -> None:
        """Full-length results, then the body for each chunk."""
        span = self.shared.loops[node]
        self.values[node] = tuple(
            self._output_of(node, index) if spec.into is None else self.values[node.args[spec.into]]  # type: ignore[index]
            for index, spec in enumerate(span.loop.outputs)
        )
        operands, _ = self._resolve(node)
        with self.shared.reusing(node) as slots:
            self.instructions += bind_loop(span, operands, self.values[node], self.sizes, self.shared)
        if slots:
            self.instructions.append(functools.partial(drop, self.shared.slots, [slot.index for slot in slots]))

    def _function_of(self, node: fx.Node) -> Callable[..., Any]:
        scratch = self.shared.placed.get(f"{node.name}.scratch")
        return attention.kernel_of(node, self.sizes, self._varying, 0 if scratch is None else scratch.nbytes)

    def outputs(self) -> list[Any]:
        """What the step returns: slots, tensors, numbers."""
        flat, _ = tree_flatten(self.module.graph.output_node().args[0])
        return [self.values[item] if isinstance(item, fx.Node) else item for item in flat]

    def _placeholder(self, node: fx.Node, index: int, given: Any, static: frozenset[int]) -> Any:
        if isinstance(given, torch.Tensor):
            return given.detach() if index in static else Slot(index)
        if isinstance(given, int) and not self._is_late_number(node):
            return given
        return Slot(index)

    def _is_late_number(self, node: fx.Node) -> bool:
        value = ir.value_of(node)
        return ir.is_symbolic_number(value) and not self.is_bound(value)
