"""A program: one step, bound to one arena, one plan and one set of weights.

Binding does all the work that does not depend on the caller's data: views are made, sizes are numbers,
every call is a ``functools.partial`` with its destination.  A step is then a walk over a flat list.  What was not
bound before the first run is bound as it goes.

What cannot be bound is read from ``slots`` when it is needed: the caller's inputs, outputs (fresh
memory per call, because the caller keeps them) and results of opaque ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from mosaic_compiler.errors import ArenaError
from mosaic_compiler.kernels import attention
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.lowered import Input, Ref
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.runtime.arena import Arena
from mosaic_compiler.runtime.binder import Binder, Shared
from mosaic_compiler.runtime.instructions import Instruction, Slot, drop
from mosaic_compiler.runtime.link import Linked, LinkedStep
from mosaic_compiler.runtime.loops import bind_loop
from mosaic_compiler.runtime.recorder import Recorder
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
        self.recorder: Recorder | None = None

    def record(self, fixed: Collection[int], device: torch.device) -> None:
        """Replay the kernels of later runs, as one (see ``recorder.py``)."""
        self.recorder = Recorder(self._run, fixed, device)

    @property
    def sizes(self) -> Sizes:
        """What it is bound for."""
        return self._binder.sizes

    def resize(self, sizes: Sizes) -> None:
        """Bind again, in the next run, what depends on the number of computed rows; the plan must have room for it."""
        if sizes.symbols != self._binder.sizes.symbols:
            self._binder.resize(sizes)
            self.outputs = None
            if self.recorder is not None:
                self.recorder.forget()

    def finish(self) -> None:
        """Bind what is not bound yet."""
        with torch.no_grad():
            for linked in self._binder.ops:
                self._binder.bind_pending(linked)
        self.outputs = self._load()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the step.  ``inputs`` are the graph's placeholders, then the prologue's results."""
        is_first = self.outputs is None or not self._checked
        return self._run(inputs) if self.recorder is None or is_first else self.recorder(inputs)

    def _run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the step, call by call.

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
        for linked in binder.ops:
            for call in binder.bind_pending(linked):
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
    linked: LinkedStep,
    plan: MemoryPlan,
    sizes: Sizes,
    inputs: Sequence[Any],
    static: frozenset[int],
    arena: Arena,
    *,
    poison: bool = False,
    found: Found = lambda op, problem: None,
) -> Program:
    """Bind a step to an arena.

    Args:
        linked: one graph of the step.
        plan: its plan for ``sizes`` (or for more rows).
        inputs: this call's inputs (placeholders, then the results of the prologue); those at the
            ``static`` positions (weights) are bound for good.
        poison: fill buffers at birth and death, check canaries (the plan must have been made with
            :data:`GUARD` bytes behind each arena buffer).
        found: see :class:`Shared`.
    """
    placed = {buffer.name: buffer for buffer in plan.own}
    shared = Shared(linked, arena, placed, [None] * len(inputs), poison, found)
    return Program(_StepBinder(plan, sizes, inputs, static, shared))


class _StepBinder(Binder):
    """Binds the step's own graph, some of it again when the number of computed rows changes.

    Attributes:
        calls: each op's calls, in schedule order.
        pending: names of ops that are to be bound, or bound again; all of them until a run has bound the last one.
    """

    def __init__(
        self, plan: MemoryPlan, sizes: Sizes, inputs: Sequence[Any], static: frozenset[int], shared: Shared
    ) -> None:
        linked = shared.step
        super().__init__(linked.graph, sizes, shared)
        self.plan, self.inputs = plan, len(inputs)  # only their number is kept, so that no caller's tensor is
        self.calls: dict[str, list[Instruction]] = {op.name: [] for op in self.ops}
        self.pending = set(self.calls)
        for index, given in enumerate(self.graph.inputs):
            self.values[given.name] = self._placeholder(given, index, inputs[index], static)
        for index, name in enumerate(linked.step.early_results, len(self.graph.inputs)):
            self.values[name] = Slot(index)

    def resize(self, sizes: Sizes) -> None:
        """Other numbers of computed rows: what depends on them is pending."""
        self.sizes = sizes
        self.pending.update(self.shared.step.varying)

    def bind_pending(self, linked: Linked) -> list[Instruction]:
        """The op's calls, bound if that is pending.  Views must not be inference tensors: later calls may be made
        outside of ``torch.inference_mode()``, and write to them."""
        name = linked.name
        if name in self.pending:
            self.instructions = self.calls[name] = []
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    self.bind_node(linked)
            else:
                self.bind_node(linked)
            self.pending.remove(name)
        return self.calls[name]

    def _loop(self, linked: Linked) -> None:
        """Full-length results, then the body for each chunk."""
        name, op = linked.name, linked.op
        self.values[name] = tuple(
            self._output_of(linked, index) if spec.into is None else self.values[op.args[spec.into].name]
            for index, spec in enumerate(self.shared.step.loop(name).outputs)
        )
        operands, _ = linked.arguments(self.values)
        with self.shared.reusing(name) as slots:
            self.instructions += bind_loop(name, operands, self.values[name], self.sizes, self.shared)
        if slots:
            self.instructions.append(functools.partial(drop, self.shared.slots, [slot.index for slot in slots]))

    def _function_of(self, linked: Linked) -> Callable[..., Any]:
        scratch = self.shared.placed.get(f"{linked.name}.scratch")
        room = 0 if scratch is None else scratch.nbytes
        return attention.kernel_of(linked.op.attention, linked.function, self.sizes, room)

    def outputs(self) -> list[Any]:
        """What the step returns: slots, tensors, numbers."""
        return [self.values[item.name] if isinstance(item, Ref) else item for item in self.graph.results]

    def _placeholder(self, lowered: Input, index: int, given: Any, static: frozenset[int]) -> Any:
        if isinstance(given, torch.Tensor):
            return given.detach() if index in static else Slot(index)
        is_late = lowered.number is not None and not self.is_bound(lowered.number)
        return given if isinstance(given, int) and not is_late else Slot(index)
