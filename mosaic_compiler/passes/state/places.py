"""Where state comes in and goes out of a graph: inputs for its memory, and results that are written there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.ir.notes import STATE, STATIC_INPUTS, StatePlace
from mosaic_compiler.lowering.forms import form_of
from mosaic_compiler.planning.lowered import Kind

aten = torch.ops.aten


def keep_results(
    emitter: Emitter, module: fx.GraphModule, parts: Sequence[fx.Node], memory: Sequence[int] = ()
) -> list[StatePlace]:
    """Return these behind the outputs, to be written into inputs that are there (their positions), or that are made
    here; which belong together."""
    storage = ir.StorageMap(emitter.graph)
    taken = ir.escaping_roots(emitter.graph, storage) | ir.written_roots(emitter.graph, storage)
    output = emitter.graph.output_node()
    places: list[StatePlace] = []
    kept: list[fx.Node] = []
    given: Any = output.args[0]
    results = [given] if isinstance(given, fx.Node) else list(given)
    for value in parts:
        root = storage.root(value)
        is_own = root is not None and root[0] is value and root not in taken
        if not is_own or form_of(value, ir.main_device_of(module)).kind is not Kind.DESTINATION:
            value = _copied(emitter, value)
        index = memory[len(places)] if memory else add_state(emitter, value, len(places))
        places.append(StatePlace(index, len(results) + len(kept)))
        kept.append(value)
    output.args = ((*results, *kept),)
    output.meta["val"] = tuple(ir.argument_value(result) for result in output.args[0])
    return places


def _copied(emitter: Emitter, value: fx.Node) -> fx.Node:
    """In memory of its own, which all of its readers read from now on."""
    users = list(value.users)
    emitter.origin = value
    with emitter.graph.inserting_before(value.next):
        copy = emitter.emit(aten.clone.default, value, memory_format=torch.preserve_format)
    for user in users:
        if user.op != "output":
            user.replace_input_with(value, copy)
    if ir.layout_of(ir.value_of(copy)) != ir.layout_of(ir.value_of(value)):
        emitter.propagate({copy})
    return copy


def add_state(emitter: Emitter, value: fx.Node, number: int) -> int:
    """An input for the memory that a value is kept in, behind all others; returns its position."""
    placeholders = emitter.graph.find_nodes(op="placeholder")
    tensor = ir.only_tensor(value)
    with emitter.mode, emitter.graph.inserting_after(placeholders[-1]):
        node = emitter.graph.placeholder(f"state_{number}")
        node.meta = {k: v for k, v in value.meta.items() if k in ("stack_trace", "nn_module_stack")}
        node.meta[ir.STATE_MEMORY] = True
        node.meta["val"] = torch.empty_strided(
            list(tensor.shape), _dense_strides(tensor), dtype=tensor.dtype, device=tensor.device
        )
    return len(placeholders)


def _dense_strides(tensor: torch.Tensor) -> list[Any]:
    """Of a copy: dims in the same order in memory, without gaps."""
    strides: list[Any] = [1] * tensor.dim()
    step: Any = 1
    for dim in reversed(ir.memory_order(tensor)):
        strides[dim] = step
        step = step * tensor.shape[dim]
    return strides


def note_state(module: fx.GraphModule, places: Sequence[StatePlace]) -> None:
    """Where state comes in and goes out; its memory stays where it is, as that of weights."""
    STATE.write(module, replace(STATE.of(module), places=tuple(places)))
    STATIC_INPUTS.write(module, (*STATIC_INPUTS.of(module), *(place.input for place in places)))
