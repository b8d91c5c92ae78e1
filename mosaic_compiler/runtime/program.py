"""A program: one step, bound to one arena, one plan and one set of weights.

Binding does all the work that does not depend on the caller's data: views are made, sizes are numbers,
every call is a ``functools.partial`` with its destination.  A step is then a walk over a flat list.

What cannot be bound is read from ``slots`` when it is needed: the caller's inputs, outputs (fresh
memory per call, because the caller keeps them) and results of opaque ops.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.errors import ArenaError
from mosaic_compiler.planning.forms import Call, Kind
from mosaic_compiler.planning.lifetimes import Lives, Sizes
from mosaic_compiler.planning.plan import Buffer, MemoryPlan
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


class Program:
    """A bound step.  Not thread-safe: the arena's lease serialises calls.

    Attributes:
        plan: the memory plan it runs in.
        instructions: prebound calls, in schedule order.
    """

    def __init__(self, binder: _Binder) -> None:
        self._binder = binder
        self.plan = binder.plan
        self.slots = binder.slots
        self._load()

    def _load(self) -> None:
        binder = self._binder
        self.instructions: list[Instruction] = [call for calls in binder.calls.values() for call in calls]
        self.outputs, self._inputs, self.fixed = binder.outputs, len(binder.inputs), binder.fixed
        self._checked = False

    def resize(self, sizes: Sizes) -> None:
        """Bind again what depends on the number of computed rows; the plan must have room for it."""
        if sizes.symbols != self._binder.sizes.symbols:
            self._binder.rebind(sizes)
            self._load()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the step.  ``inputs`` are the graph's placeholders, then the prologue's results."""
        slots = self.slots
        try:
            slots[: self._inputs] = inputs
            with torch.no_grad():
                for instruction in self.instructions:
                    instruction()
            if not self._checked:
                self._check_destinations()
            return [slots[out.index] if type(out) is Slot else out for out in self.outputs]
        finally:
            slots[:] = [None] * len(slots)

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
            :func:`with_guards`).
    """
    binder = _Binder(module, lives, plan, sizes, inputs, static, arena, varying, early, poison)
    binder.rebind(sizes)
    return Program(binder)


def with_guards(buffers: Sequence[Buffer]) -> tuple[Buffer, ...]:
    """The same lives with room for a canary behind each arena buffer."""
    import dataclasses

    return tuple(dataclasses.replace(b, nbytes=b.nbytes + GUARD) if b.kind == "arena" else b for b in buffers)


class _Binder:
    """Turns nodes into calls, node by node, so that some of them can be bound again."""

    def __init__(
        self,
        module: fx.GraphModule,
        lives: Lives,
        plan: MemoryPlan,
        sizes: Sizes,
        inputs: Sequence[Any],
        static: frozenset[int],
        arena: Arena,
        varying: frozenset[sympy.Symbol],
        early: Sequence[fx.Node],
        poison: bool,
    ) -> None:
        self.module, self.lives, self.plan, self.sizes = module, lives, plan, sizes
        self.static, self.arena, self.poison = static, arena, poison
        self.placed = {buffer.name: buffer for buffer in plan.buffers}
        self.values: dict[fx.Node, Any] = {}
        self.slots: list[Any] = [None] * len(inputs)
        self.inputs = [None] * len(inputs)  # only their number is kept, so that no caller's tensor is
        self.calls: dict[fx.Node, list[Instruction]] = {node: [] for node in lives.nodes}
        self.fixed: dict[tuple[fx.Node, int], tuple[torch.Tensor, int, torch.Size]] = {}
        self._slot_of: dict[tuple[fx.Node, int], Slot] = {}
        self._slots_in: dict[ir.Root, list[int]] = {}
        self._todo = lives.nodes
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        for index, node in enumerate(placeholders):
            self._placeholder(node, index, inputs[index])
        for index, node in enumerate(early, len(placeholders)):
            self.values[node] = Slot(index)
        self._deaths = self._find_deaths()
        self._varying = self._find_varying(varying)

    def rebind(self, sizes: Sizes) -> None:
        """Bind all nodes the first time, then those that depend on varying sizes."""
        self.sizes = sizes
        with torch.inference_mode(False), torch.no_grad():
            for node in self._todo:
                self.instructions = self.calls[node] = []
                self._node(node)
                self._bury(self._deaths.get(node, ()))
        flat, _ = torch.utils._pytree.tree_flatten(self.module.graph.output_node().args[0])
        self.outputs = [self.values[item] if isinstance(item, fx.Node) else item for item in flat]
        self._todo = self._varying

    def _find_varying(self, symbols: frozenset[sympy.Symbol]) -> tuple[fx.Node, ...]:
        found: set[fx.Node] = set()
        for node in self.lives.nodes:
            if found.intersection(node.all_input_nodes) or ir.free_symbols(node) & symbols:
                found.add(node)
        return tuple(node for node in self.lives.nodes if node in found)

    # ------------------------------------------------------------------------------------- inputs
    def _placeholder(self, node: fx.Node, index: int, given: Any) -> None:
        if isinstance(given, torch.Tensor):
            self.values[node] = given.detach() if index in self.static else Slot(index)
        elif isinstance(given, int) and not self._late_number(node):
            self.values[node] = given
        else:
            self.values[node] = Slot(index)

    def _late_number(self, node: fx.Node) -> bool:
        value = ir.value_of(node)
        return ir.is_symbolic_number(value) and not self._bound(value)

    def _bound(self, value: Any) -> bool:
        """The value follows from the symbols that are bound."""
        return bool(ir.expr_of(value).free_symbols <= self.sizes.symbols.keys())

    # ------------------------------------------------------------------------------------- nodes
    def _node(self, node: fx.Node) -> None:
        form = self.lives.forms[node]
        if form.kind is Kind.CONSTANT:
            self.values[node] = operator.attrgetter(str(node.target))(self.module)
        elif form.kind is Kind.NUMBER:
            self.values[node] = self._number(node)
        elif form.kind is Kind.DESTINATION:
            self._destination(node)
        else:
            args, kwargs = self._resolve(node)
            late = has_slot((args, kwargs))
            if form.kind is Kind.VIEW and not late:
                self.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif form.kind is Kind.MUTATION and (base := ir.alias_base(node)) is not None:
                self._append(Call(node.target, tuple(args), tuple(kwargs.items())))  # type: ignore[arg-type]
                self.values[node] = self.values[base]
            else:
                self._opaque(node, args, kwargs)

    def _number(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return self.values[source][index]  # type: ignore[index]
        value = ir.value_of(node)
        if isinstance(value, (bool, float)) or not ir.is_symbolic_number(value):
            return value
        return bool(self.sizes(value)) if isinstance(value, torch.SymBool) else self.sizes(value)

    def _resolve(self, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        args = fx.node.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.node.map_arg(dict(node.kwargs), self.values.__getitem__)
        return list(args), dict(kwargs)

    def _destination(self, node: fx.Node) -> None:
        outs = tuple(self._output_of(node, index) for index in range(len(ir.tensors_of(node))))
        self.values[node] = outs if isinstance(ir.value_of(node), (tuple, list)) else outs[0]
        if self._is_empty(node):
            return
        args, kwargs = self._resolve(node)
        emit = self.lives.forms[node].emit
        assert emit is not None
        for call in emit(outs, args, kwargs):
            self._append(call)

    def _output_of(self, node: fx.Node, index: int) -> Any:
        """The destination of one output: a tensor in the arena, or a slot with fresh memory."""
        tensor = ir.tensors_of(node)[index]
        assert tensor is not None
        shape = [self.sizes(size) for size in tensor.shape]
        stride = [self.sizes(step) for step in tensor.stride()]
        buffer = self.placed[self.lives.root_buffers[(node, index)].name]
        if buffer.kind == "arena":
            assert buffer.offset is not None
            limit = buffer.offset + buffer.nbytes
            view = self.arena.tensor(buffer.offset, tensor.dtype, shape, stride, limit)
            self.fixed[node, index] = (view, view.data_ptr(), view.shape)
            if self.poison:
                self.instructions.append(functools.partial(self.arena.fill, buffer.offset, limit - GUARD, DEAD))
                self.instructions.append(functools.partial(self.arena.fill, limit - GUARD, limit, CANARY))
            return view
        slot = self._slot(node, index, (node, index))
        make = functools.partial(torch.empty_strided, shape, stride, dtype=tensor.dtype, device=tensor.device)
        self.instructions.append(store(self.slots, slot.index, make))
        return slot

    def _opaque(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Run as it is; each tensor result goes to a slot of its own, so that it can die by itself."""
        run = bound_call(Call(node.target, tuple(args), tuple(kwargs.items())), self.slots)  # type: ignore[arg-type]
        if self._is_empty(node):
            run = functools.partial(self._empty_results, node)
        roots = self.lives.storage.roots(node)
        if not isinstance(ir.value_of(node), (tuple, list)):
            slot = self._slot(node, 0, roots[0])
            self.instructions.append(store(self.slots, slot.index, run))
            self.values[node] = slot
            return
        slots = tuple(self._slot(node, index, root) for index, root in enumerate(roots))
        self.values[node] = slots
        self.instructions.append(store_all(self.slots, [slot.index for slot in slots], run))

    def _is_empty(self, node: fx.Node) -> bool:
        """All results have zero elements: there is nothing to run.  (Some kernels divide by their number of
        rows: attention on the CPU crashes the process for 0 queries.)"""
        tensors = [tensor for tensor in ir.tensors_of(node) if tensor is not None]
        if not tensors or ir.has_effect(node) or not all(map(self._bound, ir.numbers_in(tuple(tensors)))):
            return False
        return all(any(self.sizes(size) == 0 for size in tensor.shape) for tensor in tensors)

    def _empty_results(self, node: fx.Node) -> Any:
        made = tuple(
            None
            if tensor is None
            else torch.empty_strided(
                [self.sizes(size) for size in tensor.shape],
                [self.sizes(step) for step in tensor.stride()],
                dtype=tensor.dtype,
                device=tensor.device,
            )
            for tensor in ir.tensors_of(node)
        )
        return made if isinstance(ir.value_of(node), (tuple, list)) else made[0]

    def _slot(self, node: fx.Node, index: int, root: ir.Root | None) -> Slot:
        """The slot of one output of a node; the same one each time it is bound."""
        if (node, index) not in self._slot_of:
            slot = self._slot_of[node, index] = Slot(len(self.slots))
            self.slots.append(None)
            if root is not None:
                self._slots_in.setdefault(root, []).append(slot.index)
        return self._slot_of[node, index]

    def _append(self, call: Call) -> None:
        self.instructions.append(bound_call(call, self.slots))

    # ------------------------------------------------------------------------------------- deaths
    def _find_deaths(self) -> dict[fx.Node, list[ir.Root]]:
        """Roots by the node that uses them last; outputs never die."""
        escaping = ir.escaping_roots(self.module.graph, self.lives.storage)
        last: dict[ir.Root, fx.Node] = {}
        for node in self.lives.nodes:
            for user in (node, *node.all_input_nodes):
                for root in self.lives.storage.roots(user):
                    if root is not None and root[0].op == "call_function" and root not in escaping:
                        last[root] = node
        deaths: dict[fx.Node, list[ir.Root]] = {}
        for root, node in last.items():
            deaths.setdefault(node, []).append(root)
        return deaths

    def _bury(self, roots: Sequence[ir.Root]) -> None:
        indices = [index for root in roots for index in self._slots_in.get(root, ())]
        if indices:
            self.instructions.append(functools.partial(drop, self.slots, indices))
        if not self.poison:
            return
        for root in roots:
            symbolic = self.lives.root_buffers.get(root)
            buffer = self.placed[symbolic.name] if symbolic is not None else None
            if buffer is not None and buffer.kind == "arena":
                self.instructions.append(functools.partial(check_canary, self.arena, buffer))
