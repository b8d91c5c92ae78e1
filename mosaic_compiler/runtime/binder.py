"""Binding: from the ops of a lowered graph to calls with everything bound that can be bound."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean

from mosaic_compiler.book import Call
from mosaic_compiler.errors import CaptureError
from mosaic_compiler.planning.buffers import Buffer
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.lowered import GETITEM, Kind, Root
from mosaic_compiler.runtime.arena import Arena
from mosaic_compiler.runtime.instructions import (
    CANARY,
    DEAD,
    GUARD,
    Instruction,
    Slot,
    bound_call,
    check_canary,
    drop,
    has_slot,
    store,
    store_all,
)
from mosaic_compiler.runtime.link import Linked, LinkedGraph, LinkedStep
from mosaic_compiler.runtime.sparse import sparse_zeros
from mosaic_compiler.runtime.watched import Found, Layout, watched

Destination: TypeAlias = "tuple[torch.Tensor, int, torch.Size]"
"""A bound destination, with the address and shape that it must keep."""


@dataclass
class Shared:
    """What the step and the bodies of its loops have in common.

    Attributes:
        step: what is bound.
        placed: the plan's buffers by name.
        slots: values that are known only during a call; a call's inputs come first.
        found: called with an op whose results are not what its schema or fake kernel says, and what is wrong.
        fixed: bound destinations.
    """

    step: LinkedStep
    arena: Arena
    placed: Mapping[str, Buffer]
    slots: list[Any]
    poison: bool = False
    found: Found = lambda op, problem: None
    fixed: dict[Any, Destination] = field(default_factory=dict)
    _pools: dict[str, list[Slot]] = field(default_factory=dict)
    _pool: list[Slot] | None = None
    _taken: int = 0

    def new_slot(self) -> Slot:
        if self._pool is not None and self._taken < len(self._pool):
            self._taken += 1
            return self._pool[self._taken - 1]
        self.slots.append(None)
        slot = Slot(len(self.slots) - 1)
        if self._pool is not None:
            self._pool.append(slot)
            self._taken += 1
        return slot

    @contextmanager
    def reusing(self, owner: str) -> Iterator[list[Slot]]:
        """Slots made inside are those that were made for the same owner last time (it is being bound again)."""
        self._pool, self._taken = self._pools.setdefault(owner, []), 0
        try:
            yield self._pool
        finally:
            self._pool = None


class Binder:
    """Turns the ops of one graph into calls, op by op.

    Attributes:
        values: what each bound op's value is, by its name: a tensor over the arena, a number, or a slot.
        instructions: where calls are appended.
        prefix: of the graph's buffers in the plan.
    """

    role = "step"
    """Tells apart the two times that a loop's body is bound."""

    prefix = ""

    def __init__(self, linked: LinkedGraph, sizes: Sizes, shared: Shared) -> None:
        self.graph, self.ops, self.sizes, self.shared = linked.graph, linked.ops, sizes, shared
        self.values: dict[str, Any] = {}
        self.instructions: list[Instruction] = []
        self._slot_of: dict[tuple[str, int], Slot] = {}
        self._slots_in: dict[Root, list[int]] = {}

    def is_bound(self, number: sympy.Expr) -> bool:
        """The number follows from the symbols that are bound."""
        return bool(number.free_symbols <= self.sizes.symbols.keys())

    def bind_node(self, linked: Linked) -> None:
        """Append the calls that compute a value, and those that mark the death of what it reads last."""
        self._bind(linked)
        self._bury(linked.op.dies)

    # --------------------------------------------------------------------------------------- ops
    def _bind(self, linked: Linked) -> None:
        kind = linked.kind
        if kind is Kind.CONSTANT:
            self.values[linked.name] = self.shared.step.constants[linked.op.target]
        elif kind is Kind.NUMBER:
            self.values[linked.name] = self._number(linked)
        elif kind is Kind.DESTINATION:
            self._destination(linked)
        elif kind is Kind.LOOP:
            self._loop(linked)
        else:
            args, kwargs = linked.arguments(self.values)
            late = has_slot(args) or has_slot(kwargs)
            if kind is Kind.VIEW and not late:
                self.values[linked.name] = linked.function(*args, **kwargs)
            elif kind is Kind.MUTATION and linked.op.base is not None:
                self._append(Call(linked.function, tuple(args), tuple(kwargs.items())))
                self.values[linked.name] = self.values[linked.op.base]
            else:
                self._opaque(linked, args, kwargs)

    def _number(self, linked: Linked) -> Any:
        number = linked.op.number
        if linked.op.target == GETITEM or number is None:  # floats as Python does: it rounds each time
            args, kwargs = linked.arguments(self.values)
            return linked.function(*args, **kwargs)
        if not isinstance(number, sympy.Basic):
            return number
        is_true_or_false = isinstance(number, Boolean) and not number.is_Symbol  # a symbol could be either
        return bool(self.sizes(number)) if is_true_or_false else self.sizes(number)

    def _destination(self, linked: Linked) -> None:
        op = linked.op
        positions = op.into or [None] * len(op.outputs)
        outs = tuple(
            self._output_of(linked, index) if into is None else self.values[op.args[into].name]
            for index, into in enumerate(positions)
        )
        self.values[linked.name] = outs if op.is_list else outs[0]
        if self._is_empty(linked):
            return
        args, kwargs = linked.arguments(self.values)
        assert linked.emit is not None
        for call in linked.emit(outs, args, kwargs):
            self._append(call)

    def _output_of(self, linked: Linked, index: int) -> Any:
        """The destination of one output: a tensor in the arena, or a slot with fresh memory."""
        made, name = linked.outputs[index], linked.op.buffers[index]
        assert made is not None
        assert name is not None
        shape = [self.sizes(size) for size in made.facts.shape]
        stride = [self.sizes(step) for step in made.facts.strides]
        buffer, scatter = self.shared.placed[self.prefix + name], linked.op.scatters[index]
        if buffer.space == "arena":
            assert buffer.offset is not None
            assert scatter is None, "rows are scattered into memory of the caller's"
            limit = buffer.offset + buffer.nbytes
            view = self.shared.arena.tensor(buffer.offset, made.dtype, shape, stride, limit)
            self.shared.fixed[buffer.name, self.role] = (view, view.data_ptr(), view.shape)
            if self.shared.poison:
                fill = self.shared.arena.fill
                self.instructions.append(functools.partial(fill, buffer.offset, limit - GUARD, DEAD))
                self.instructions.append(functools.partial(fill, limit - GUARD, limit, CANARY))
            return view
        if buffer.space == "state":  # given by whoever owns it, with an offset and a storage of its own
            return self.values[buffer.name].as_strided(shape, stride)
        assert buffer.space == "heap", f"{buffer.describe()}: steps have no memory of their own but the arena and state"
        slot = self._slot(linked, index, (linked.name, index))
        make: Instruction = functools.partial(torch.empty_strided, shape, stride, dtype=made.dtype, device=made.device)
        if scatter is not None:
            arguments = (self.values[scatter[0].name], shape, made.dtype, made.device)
            make = bound_call(Call(sparse_zeros, arguments), self.shared.slots)
        self.instructions.append(store(self.shared.slots, slot.index, make))
        return slot

    def _opaque(self, linked: Linked, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Run as it is; each tensor result goes to a slot of its own, so that it can die by itself.

        Raises:
            CaptureError: for results that are lists of several, beside other results.
        """
        op = linked.op
        if op.has_lists:
            raise CaptureError(
                f"{op.target} returns a list among other results, which has no place in a plan: let it return all of "
                "its tensors in one list or tuple"
            )
        run = bound_call(Call(self._function_of(linked), tuple(args), tuple(kwargs.items())), self.shared.slots)
        if self._is_empty(linked):
            run = functools.partial(self._empty_results, linked)
        elif op.base is None:
            shared = self.shared
            known = self._known_layouts(linked)
            run = watched(linked, run, (args, kwargs), known, shared.arena.addresses, shared.slots, shared.found)
        if not op.is_list:
            slot = self._slot(linked, 0, op.roots[0])
            self.instructions.append(store(self.shared.slots, slot.index, run))
            self.values[linked.name] = slot
            return
        slots = tuple(self._slot(linked, index, root) for index, root in enumerate(op.roots))
        self.values[linked.name] = slots
        self.instructions.append(store_all(self.shared.slots, [slot.index for slot in slots], run))

    def _known_layouts(self, linked: Linked) -> list[Layout]:
        """Layouts of each result, as fake tensors say; ``None`` where only the data knows, or nobody reads it."""
        op = linked.op
        if op.target == "aten.empty_strided.default":
            return [None]  # as asked for, also where elements share a place
        layouts: list[Layout] = []
        for index, facts in enumerate(op.outputs):
            numbers = () if facts is None else facts.strides
            is_known = all(n.free_symbols <= self.sizes.symbols.keys() for n in numbers)
            if facts is None or not is_known or (op.is_list and index not in op.read):
                layouts.append(None)
            else:
                layouts.append((tuple(map(self.sizes, numbers)), facts.bits))
        return layouts

    def _function_of(self, linked: Linked) -> Callable[..., Any]:
        """What computes an opaque op."""
        function: Callable[..., Any] = linked.function
        return function

    def _loop(self, linked: Linked) -> None:
        """Full-length results, then the body for each chunk."""
        raise AssertionError(f"{linked.name}: the body of a loop has no loops")

    def _is_empty(self, linked: Linked) -> bool:
        """All results have zero elements: there is nothing to run.  (Some kernels divide by their number of
        rows: attention on the CPU crashes the process for 0 queries.)"""
        op = linked.op
        if not op.can_be_empty or not op.symbols <= self.sizes.symbols.keys():
            return False
        return all(0 in map(self.sizes, facts.shape) for facts in op.outputs if facts is not None)

    def _empty_results(self, linked: Linked) -> Any:
        made = tuple(
            None
            if output is None
            else torch.empty_strided(
                [self.sizes(size) for size in output.facts.shape],
                [self.sizes(step) for step in output.facts.strides],
                dtype=output.dtype,
                device=output.device,
            )
            for output in linked.outputs
        )
        return made if linked.op.is_list else made[0]

    def _slot(self, linked: Linked, index: int, root: Root | None) -> Slot:
        """The slot of one result of an op; the same one each time it is bound."""
        key = linked.name, index
        if key not in self._slot_of:
            slot = self._slot_of[key] = self.shared.new_slot()
            if root is not None:
                self._slots_in.setdefault(root, []).append(slot.index)
        return self._slot_of[key]

    def _append(self, call: Call) -> None:
        self.instructions.append(bound_call(call, self.shared.slots))

    # ------------------------------------------------------------------------------------- deaths
    def _bury(self, roots: Sequence[Root]) -> None:
        indices = [index for root in roots for index in self._slots_in.get(root, ())]
        if indices:
            self.instructions.append(functools.partial(drop, self.shared.slots, indices))
        if not self.shared.poison:
            return
        for root in roots:
            name = self.graph.places.get(root)
            buffer = self.shared.placed[self.prefix + name] if name is not None else None
            if buffer is not None and buffer.space == "arena":
                self.instructions.append(functools.partial(check_canary, self.shared.arena, buffer))
