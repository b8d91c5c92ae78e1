"""Where the values of a graph's symbols are found when it is called, and what is known of them before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.errors import CaptureError
from mosaic_compiler.kernels import ops
from mosaic_compiler.kernels.scatter_rows import pages_per_row
from mosaic_compiler.planning.outline import Selected

UNKNOWN = 64
"""Stands for the example's value of a size that Dynamo was told to know nothing about (``mark_unbacked``)."""


def hints_of(module: fx.GraphModule) -> dict[sympy.Symbol, int]:
    """The example's value of every symbol of the inputs."""
    found: dict[sympy.Symbol, int] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        for number in ir.numbers_in(ir.value_of(node)):
            if isinstance(number, torch.SymInt) and isinstance(expr := ir.expr_of(number), sympy.Symbol):
                hint = number.node.hint if number.node.has_hint() else UNKNOWN
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


def _read_value(index: int, inputs: Sequence[Any]) -> int:
    return int(inputs[index])


def _read_size(index: int, dim: int, inputs: Sequence[Any]) -> int:
    return int(inputs[index].shape[dim])


def _read_stride(index: int, dim: int, inputs: Sequence[Any]) -> int:
    return int(inputs[index].stride(dim))


def symbol_readers(
    module: fx.GraphModule, placeholders: Sequence[fx.Node], bound: Sequence[sympy.Symbol]
) -> tuple[tuple[sympy.Symbol, Callable[[Sequence[Any]], int]], ...]:
    """For every symbol of the graph that the prologue does not bind, where in the inputs its value stands.

    Raises:
        CaptureError: if a symbol is no input's size, stride or value.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    readers: dict[sympy.Symbol, Callable[[Sequence[Any]], int]] = {}

    def offer(number: Any, read: Callable[[Sequence[Any]], int]) -> None:
        if isinstance(number, torch.SymInt) and isinstance(symbol := ir.expr_of(number), sympy.Symbol):
            readers.setdefault(symbol, read)

    for index, node in enumerate(placeholders):
        offer(ir.value_of(node), functools.partial(_read_value, index))
    for index, node in enumerate(placeholders):
        tensor = ir.tensor_of(node)
        for dim in range(tensor.dim() if tensor is not None else 0):
            assert tensor is not None
            offer(tensor.shape[dim], functools.partial(_read_size, index, dim))
            offer(tensor.stride(dim), functools.partial(_read_stride, index, dim))
    for node in module.graph.nodes:
        for number in ir.numbers_in(ir.value_of(node)):
            if not ir.is_symbolic_number(number) or free_unbacked_symbols(number):
                continue
            if isinstance(number, torch.SymFloat):
                continue
            missing = ir.expr_of(number).free_symbols - readers.keys() - set(bound)
            if missing:
                raise CaptureError(f"{node.name} depends on {missing}, which no input's size says")
    return tuple(readers.items())
