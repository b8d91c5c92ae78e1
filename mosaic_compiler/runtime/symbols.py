"""Where the values of a graph's symbols are found when it is called, and what is known of them before."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.compat.symbols import free_unbacked_symbols, has_hint, hint_of, sources_in
from mosaic_compiler.errors import CaptureError
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.notes import STATE
from mosaic_compiler.kernels.scatter_rows import pages_per_row
from mosaic_compiler.planning.lowered import Reading
from mosaic_compiler.planning.outline import Selected

UNKNOWN = 64
"""Stands for the example's value of a size that Dynamo was told to know nothing about (``mark_unbacked``)."""

aten = torch.ops.aten

_SOURCE = re.compile(r"L\['(\w+)'\](.*?)(?:\.(size|stride)\(\)\[(\d+)\])?")
"""How Dynamo writes where a symbol comes from: ``L['ids'].size()[1]``."""


def hints_of(module: fx.GraphModule) -> dict[sympy.Symbol, int]:
    """The example's value of every symbol of the inputs."""
    found: dict[sympy.Symbol, int] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        for number in ir.numbers_in(ir.value_of(node)):
            if isinstance(number, torch.SymInt) and isinstance(expr := ir.expr_of(number), sympy.Symbol):
                hint = hint_of(number) if has_hint(number) else UNKNOWN
                found.setdefault(expr, int(hint))
    return found


def selected_in(module: fx.GraphModule) -> tuple[Selected, ...]:
    """What is known ahead of each number of the prologue."""
    found = []
    for node in module.graph.nodes:
        if ir.BINDS in node.meta:
            most = counted = ir.most_of(node)
            if node.target is ops.touched_pages:  # scattered rows share no page with each other
                _, total, row_bytes, page = node.args
                rows = ir.expr_of(ir.argument_value(total))
                counted = rows * pages_per_row(row_bytes, page)
            found.append(Selected(node.meta[ir.BINDS], counted, most))
    return tuple(found)


def meanings_of(module: fx.GraphModule) -> tuple[tuple[str, str], ...]:
    """What symbols stand for, as said behind their numbers: ``(("s27", "tokens"), ("s38", "masked rows"))``.

    From structure only: int64 inputs of two dims are sequences of tokens; what the prologue counts is needed rows, or
    masked ones where it looks for one id; other symbols are sizes of an input.  No two symbols mean the same.
    """
    found: dict[str, str] = {}

    def offer(number: Any, *meanings: str) -> None:
        if isinstance(expr := ir.expr_of(number), sympy.Symbol) and str(expr) not in found:
            free = [meaning for meaning in meanings if meaning not in found.values()]
            found.update({str(expr): meaning for meaning in free[:1]})

    for node in module.graph.find_nodes(op="placeholder"):
        tensor = ir.tensor_of(node)
        if tensor is not None and tensor.dtype == torch.int64 and tensor.dim() == 2:
            offer(tensor.shape[1], "tokens")
            offer(tensor.shape[0], "sequences")
    inputs, state = module.graph.find_nodes(op="placeholder"), STATE.of(module)
    if state.rows is not None:
        offer(ir.only_tensor(inputs[state.rows]).shape[1], "computed rows")
    for place in state.places:
        tensor = ir.only_tensor(inputs[place.input])
        if tensor.dtype == torch.int64:
            offer(tensor.shape[2], "chosen keys")
    mode = ir.fake_mode_of(module)
    environment = None if mode is None else mode.shape_env
    for symbol in hints_of(module):
        for source in sources_in(environment, symbol)[:1]:
            if (match := _SOURCE.fullmatch(source)) is not None:
                name, rest, what, dim = match.groups()
                offer(symbol, f"as {what} {dim} of {name}{rest}" if what else f"as {name}{rest}")
    for node in module.graph.nodes:
        if ir.BINDS in node.meta:
            rows = "pages of memory" if node.target is ops.touched_pages else _rows_of(node)
            offer(node.meta[ir.BINDS], rows, f"{rows} by {node.name}")
    return tuple(found.items())


def _rows_of(node: fx.Node) -> str:
    """What a ``nonzero`` numbers: rows where ids equal a constant are masked ones, if nothing else may add to them."""
    before = {found for found in ir.computed_from([node]) if found.op == "call_function"}
    if {aten.bitwise_not, aten.logical_not, aten.bitwise_or, aten.logical_or} & {_packet(n) for n in before}:
        return "needed rows"
    for equal in before:
        if equal.target is aten.eq.Scalar and type(equal.args[1]) is int:
            (ids,) = equal.all_input_nodes
            if ir.only_tensor(ids).dtype == torch.int64:
                return "masked rows"
    return "needed rows"


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def symbol_readings(
    module: fx.GraphModule, placeholders: Sequence[fx.Node], bound: Sequence[sympy.Symbol]
) -> tuple[Reading, ...]:
    """For every symbol of the graph that the prologue does not bind, where in the inputs its value stands.

    Raises:
        CaptureError: if a symbol is no input's size, stride, storage offset or value.
    """
    found: dict[sympy.Symbol, Reading] = {}

    def offer(number: Any, what: str, index: int, dim: int = 0) -> None:
        if isinstance(number, torch.SymInt) and isinstance(symbol := ir.expr_of(number), sympy.Symbol):
            found.setdefault(symbol, Reading(symbol, what, index, dim))

    for index, node in enumerate(placeholders):
        offer(ir.value_of(node), "value", index)
    for index, node in enumerate(placeholders):
        tensor = ir.tensor_of(node)
        for dim in range(tensor.dim() if tensor is not None else 0):
            assert tensor is not None
            offer(tensor.shape[dim], "size", index, dim)
    for index, node in enumerate(placeholders):  # behind sizes: a stride along a dim of size 1 says nothing
        tensor = ir.tensor_of(node)
        for dim in range(tensor.dim() if tensor is not None else 0):
            assert tensor is not None
            offer(tensor.stride(dim), "stride", index, dim)
        if tensor is not None:
            offer(tensor.storage_offset(), "offset", index)
    for node in module.graph.nodes:
        for number in ir.numbers_in(ir.value_of(node)):
            if not ir.is_symbolic_number(number) or free_unbacked_symbols(number):
                continue
            if isinstance(number, torch.SymFloat):
                continue
            missing = ir.expr_of(number).free_symbols - found.keys() - set(bound)
            if missing:
                raise CaptureError(f"{node.name} depends on {missing}, which no input's size says")
    return tuple(found.values())


def reader_of(reading: Reading) -> Callable[[Sequence[Any]], int]:
    """Reads the value of a symbol off the inputs."""
    index, dim = reading.index, reading.dim
    readers: dict[str, Callable[[Sequence[Any]], int]] = {
        "value": lambda inputs: int(inputs[index]),
        "size": lambda inputs: int(inputs[index].shape[dim]),
        "stride": lambda inputs: int(inputs[index].stride(dim)),
        "offset": lambda inputs: int(inputs[index].storage_offset()),
    }
    return readers[reading.what]
