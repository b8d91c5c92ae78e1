"""Binding: from the nodes of a graph to calls with everything bound that can be bound."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book import Call
from mosaic_compiler.errors import CaptureError
from mosaic_compiler.lowering.forms import Kind
from mosaic_compiler.lowering.scopes import LoopSpan, Scope
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.plan import Buffer
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
from mosaic_compiler.runtime.sparse import sparse_zeros
from mosaic_compiler.runtime.watched import Found, Layout, watched

Destination: TypeAlias = "tuple[torch.Tensor, int, torch.Size]"
"""A bound destination, with the address and shape that it must keep."""


@dataclass
class Shared:
    """What the step and the bodies of its loops have in common.

    Attributes:
        placed: the plan's buffers by name.
        loops: the step's loops by the node that calls them.
        slots: values that are known only during a call; a call's inputs come first.
        found: called with a node whose results are not what its schema or fake kernel says, and what is wrong.
        fixed: bound destinations.
    """

    arena: Arena
    placed: Mapping[str, Buffer]
    loops: Mapping[fx.Node, LoopSpan]
    slots: list[Any]
    poison: bool = False
    found: Found = lambda node, problem: None
    fixed: dict[Any, Destination] = field(default_factory=dict)
    _pools: dict[Any, list[Slot]] = field(default_factory=dict)
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
    def reusing(self, owner: fx.Node) -> Iterator[list[Slot]]:
        """Slots made inside are those that were made for the same owner last time (it is being bound again)."""
        self._pool, self._taken = self._pools.setdefault(owner, []), 0
        try:
            yield self._pool
        finally:
            self._pool = None


class Binder:
    """Turns the nodes of one graph into calls, node by node.

    Attributes:
        values: what each bound node's value is: a tensor over the arena, a number, or a slot.
        instructions: where calls are appended.
    """

    role = "step"
    """Tells apart the two times that a loop's body is bound."""

    def __init__(self, module: fx.GraphModule, scope: Scope, sizes: Sizes, shared: Shared) -> None:
        self.module, self.scope, self.sizes, self.shared = module, scope, sizes, shared
        self.values: dict[fx.Node, Any] = {}
        self.instructions: list[Instruction] = []
        self._slot_of: dict[tuple[fx.Node, int], Slot] = {}
        self._slots_in: dict[ir.Root, list[int]] = {}
        self._deaths = scope.deaths

    def is_bound(self, value: Any) -> bool:
        """The value follows from the symbols that are bound."""
        return bool(ir.expr_of(value).free_symbols <= self.sizes.symbols.keys())

    def bind_node(self, node: fx.Node) -> None:
        """Append the calls that compute a node, and those that mark the death of what it reads last."""
        self._bind(node)
        self._bury(self._deaths.get(node, ()))

    # ------------------------------------------------------------------------------------- nodes
    def _bind(self, node: fx.Node) -> None:
        form = self.scope.forms[node]
        if form.kind is Kind.CONSTANT:
            self.values[node] = operator.attrgetter(str(node.target))(self.module)
        elif form.kind is Kind.NUMBER:
            self.values[node] = self._number(node)
        elif form.kind is Kind.DESTINATION:
            self._destination(node)
        elif form.kind is Kind.LOOP:
            self._loop(node)
        else:
            args, kwargs = self._resolve(node)
            late = has_slot(args) or has_slot(kwargs)
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
        if isinstance(value, torch.SymFloat):  # computed as Python does, which rounds after each operation
            args, kwargs = self._resolve(node)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        return bool(self.sizes(value)) if isinstance(value, torch.SymBool) else self.sizes(value)

    def _resolve(self, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        args = fx.node.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self.values.__getitem__) if node.kwargs else {}
        return list(args), dict(kwargs)

    def _destination(self, node: fx.Node) -> None:
        positions = ir.taken_over(node) or [None] * len(ir.tensors_of(node))
        outs = tuple(
            self._output_of(node, index) if into is None else self.values[node.args[into]]  # type: ignore[index]
            for index, into in enumerate(positions)
        )
        self.values[node] = outs if isinstance(ir.value_of(node), (tuple, list)) else outs[0]
        if self._is_empty(node):
            return
        args, kwargs = self._resolve(node)
        emit = self.scope.forms[node].emit
        assert emit is not None
        for call in emit(outs, args, kwargs):
            self._append(call)

    def _output_of(self, node: fx.Node, index: int) -> Any:
        """The destination of one output: a tensor in the arena, or a slot with fresh memory."""
        tensor = self.scope.facts_of(node).outputs[index]
        assert tensor is not None
        shape = [self.sizes(size) for size in tensor.shape]
        stride = [self.sizes(step) for step in tensor.strides]
        buffer = self.shared.placed[self.scope.root_buffers[(node, index)].name]
        if buffer.space == "arena":
            assert buffer.offset is not None
            assert ir.scatter_of(node, index) is None, "rows are scattered into memory of the caller's"
            limit = buffer.offset + buffer.nbytes
            view = self.shared.arena.tensor(buffer.offset, tensor.dtype, shape, stride, limit)
            self.shared.fixed[buffer.name, self.role] = (view, view.data_ptr(), view.shape)
            if self.shared.poison:
                fill = self.shared.arena.fill
                self.instructions.append(functools.partial(fill, buffer.offset, limit - GUARD, DEAD))
                self.instructions.append(functools.partial(fill, limit - GUARD, limit, CANARY))
            return view
        slot = self._slot(node, index, (node, index))
        make: Instruction = functools.partial(
            torch.empty_strided, shape, stride, dtype=tensor.dtype, device=tensor.device
        )
        if (scatter := ir.scatter_of(node, index)) is not None:
            arguments = (self.values[scatter[0]], shape, tensor.dtype, tensor.device)
            make = bound_call(Call(sparse_zeros, arguments), self.shared.slots)
        self.instructions.append(store(self.shared.slots, slot.index, make))
        return slot

    def _opaque(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Run as it is; each tensor result goes to a slot of its own, so that it can die by itself.

        Raises:
            CaptureError: for results that are lists of several, beside other results.
        """
        value = ir.value_of(node)
        if isinstance(value, (tuple, list)) and any(isinstance(part, (tuple, list)) for part in value):
            raise CaptureError(
                f"{node.target} returns a list among other results, which has no place in a plan: let it return all of "
                "its tensors in one list or tuple"
            )
        run = bound_call(Call(self._function_of(node), tuple(args), tuple(kwargs.items())), self.shared.slots)
        if self._is_empty(node):
            run = functools.partial(self._empty_results, node)
        elif ir.alias_base(node) is None:
            shared = self.shared
            known = self._known_layouts(node)
            run = watched(node, run, (args, kwargs), known, shared.arena.addresses, shared.slots, shared.found)
        roots = self.scope.storage.roots(node)
        if not isinstance(ir.value_of(node), (tuple, list)):
            slot = self._slot(node, 0, roots[0])
            self.instructions.append(store(self.shared.slots, slot.index, run))
            self.values[node] = slot
            return
        slots = tuple(self._slot(node, index, root) for index, root in enumerate(roots))
        self.values[node] = slots
        self.instructions.append(store_all(self.shared.slots, [slot.index for slot in slots], run))

    def _known_layouts(self, node: fx.Node) -> list[Layout]:
        """Layouts of each result, as fake tensors say; ``None`` where only the data knows, or nobody reads it."""
        if node.target is torch.ops.aten.empty_strided.default:
            return [None]  # as asked for, also where elements share a place
        is_one = not isinstance(ir.value_of(node), (tuple, list))
        read = {user.args[1] for user in node.users if user.target is operator.getitem}
        layouts: list[Layout] = []
        outputs = zip(self.scope.facts_of(node).outputs, ir.tensors_of(node), strict=True)
        for index, (facts, tensor) in enumerate(outputs):
            numbers = () if facts is None else facts.strides
            is_known = all(n.free_symbols <= self.sizes.symbols.keys() for n in numbers)
            if tensor is None or not is_known or not (is_one or index in read):
                layouts.append(None)
            else:
                layouts.append((tuple(map(self.sizes, numbers)), ir.lazy_bits(tensor)))
        return layouts

    def _function_of(self, node: fx.Node) -> Callable[..., Any]:
        """What computes an opaque node."""
        assert callable(node.target)
        return node.target

    def _loop(self, node: fx.Node) -> None:
        """Full-length results, then the body for each chunk."""
        raise AssertionError(f"{node}: the body of a loop has no loops")

    def _is_empty(self, node: fx.Node) -> bool:
        """All results have zero elements: there is nothing to run.  (Some kernels divide by their number of
        rows: attention on the CPU crashes the process for 0 queries.)"""
        facts = self.scope.facts_of(node)
        if not facts.can_be_empty or not facts.symbols <= self.sizes.symbols.keys():
            return False
        return all(0 in map(self.sizes, tensor.shape) for tensor in facts.outputs if tensor is not None)

    def _empty_results(self, node: fx.Node) -> Any:
        made = tuple(
            None
            if tensor is None
            else torch.empty_strided(
                [self.sizes(size) for size in tensor.shape],
                [self.sizes(step) for step in tensor.strides],
                dtype=tensor.dtype,
                device=tensor.device,
            )
            for tensor in self.scope.facts_of(node).outputs
        )
        return made if isinstance(ir.value_of(node), (tuple, list)) else made[0]

    def _slot(self, node: fx.Node, index: int, root: ir.Root | None) -> Slot:
        """The slot of one output of a node; the same one each time it is bound."""
        if (node, index) not in self._slot_of:
            slot = self._slot_of[node, index] = self.shared.new_slot()
            if root is not None:
                self._slots_in.setdefault(root, []).append(slot.index)
        return self._slot_of[node, index]

    def _append(self, call: Call) -> None:
        self.instructions.append(bound_call(call, self.shared.slots))

    # ------------------------------------------------------------------------------------- deaths
    def _bury(self, roots: Sequence[ir.Root]) -> None:
        indices = [index for root in roots for index in self._slots_in.get(root, ())]
        if indices:
            self.instructions.append(functools.partial(drop, self.shared.slots, indices))
        if not self.shared.poison:
            return
        for root in roots:
            symbolic = self.scope.root_buffers.get(root)
            buffer = self.shared.placed[symbolic.name] if symbolic is not None else None
            if buffer is not None and buffer.space == "arena":
                self.instructions.append(functools.partial(check_canary, self.shared.arena, buffer))
