"""Which whole numbers a tensor can hold, whatever the data: positions that ``topk`` found are below the size that it
looked at.

A mixture of experts masks the rows of experts that do not exist; this says that there are none.
"""

from __future__ import annotations

import operator
from typing import TypeAlias

import torch
from torch import fx

from mosaic_compiler import book, ir

Range: TypeAlias = "tuple[int, int]"
"""The least and the largest."""


def range_of(node: fx.Node) -> Range | None:
    """Bounds of every element of a tensor of whole numbers; ``None`` where nothing is known."""
    tensor = ir.tensor_of(node)
    if tensor is None or tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        return None
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or node.op != "call_function":
        return None
    if node.target is operator.getitem:
        known, values = book.entry(source), source.args[0]
        if known.positions == node.args[1]:
            return _positions(source)
        is_taken = known.takes_elements and node.args[1] == 0 and isinstance(values, fx.Node)
        return range_of(values) if is_taken else None  # type: ignore[arg-type]
    known = book.entry(node)
    if known.positions is not None:
        return _positions(node)
    if known.takes_elements:
        return range_of(source)
    if known.family == "copy":
        found, limits = range_of(source), torch.iinfo(tensor.dtype)
        return found if found is not None and limits.min <= found[0] and found[1] <= limits.max else None
    return None


def _positions(search: fx.Node) -> Range | None:
    """Along the dim that is searched, if its size is a number."""
    source, dim = search.args[0], ir.argument(search, "dim")
    tensor = ir.tensor_of(source) if isinstance(source, fx.Node) else None
    if tensor is None or not isinstance(dim, int) or not tensor.dim():
        return None
    size = ir.expr_of(tensor.shape[dim])
    return (0, int(size) - 1) if size.is_Integer else None


def compared(node: fx.Node) -> bool | None:
    """What a comparison with a number is for every element, if that follows from its operand's range."""
    test = book.entry(node).compares
    operand, number = (*node.args, None, None)[:2]
    if test is None or not isinstance(operand, fx.Node) or type(number) is not int:
        return None
    found = range_of(operand)
    if found is None:
        return None
    least, largest = test(found[0], number), test(found[1], number)
    if test in (operator.eq, operator.ne):  # between two that differ from the number it may be equal
        outside = not found[0] <= number <= found[1]
        return least if outside or found[0] == found[1] else None
    return least if least == largest else None
